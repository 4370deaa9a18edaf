"""Small things to learn that the claims of training techniques share."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrows import samples


@cache
def letters(count: int) -> tuple[Tensor, int]:
    """So many characters of the sample text as numbers, and how many different ones there are."""
    prose = samples.text()[1][:count].lower()
    alphabet = {c: i for i, c in enumerate(sorted(set(prose)))}
    return torch.tensor([alphabet[c] for c in prose]), len(alphabet)


def characters(context: int) -> tuple[Tensor, int]:
    """Rows of `context` characters of the sample text and the one after them, in order, and how many symbols there are."""
    codes, symbols = letters(400_000)
    return codes.unfold(0, context + 1, 1), symbols


def learn(network: nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor, steps: int, batch: int) -> float:
    """Train a network on all rows but the last, whose last number it is to tell; its nats on those it did not see."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    train, held_out = rows[:-20_100], rows[-20_000::5]
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        loss = _loss(network, train[torch.randint(len(train), (batch,), generator=generator)])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float(_loss(network, held_out))


def _loss(network: nn.Module, rows: Tensor) -> Tensor:
    return F.cross_entropy(network(rows[:, :-1]).float(), rows[:, -1])
