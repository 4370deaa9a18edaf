"""A small language model trained with Adam in more than one way, which must come to the same weights."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrows.experiments.pipelines import model, tokens
from narrows.experiments.steady import one_thread
from narrows.modules.disk_adam import disk_adam

if TYPE_CHECKING:
    import torch

STEPS = 6


def network() -> "torch.nn.Module":
    """The model, always with the same weights."""
    import torch

    return torch.nn.Sequential(*model(1, blocks=2)).float()


def train(network: "torch.nn.Module", update: Callable[[], Any]) -> None:
    """Some steps on batches of several sizes; `update` steps the optimizer once the gradients are there."""
    import torch

    for step in range(STEPS):
        network.zero_grad()
        batch = tokens().roll(step, 0)[: 4 + step]
        logits = network(batch[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        update()


@one_thread()
def same_weights(folder: Path | None, early: bool) -> float:
    """Bytes in `folder` (None: trained in memory) over those of two moments; not a number unless weights agree bit by bit."""
    import torch

    plain, other = network(), network()
    reference = torch.optim.Adam(plain.parameters(), 1e-2)
    ours = disk_adam(other, folder, early, lr=1e-2) if folder else torch.optim.Adam(other.parameters(), 1e-2)
    for one, optimizer in ((plain, reference), (other, ours)):
        train(one, optimizer.step)
    pairs = list(zip(plain.parameters(), other.parameters(), strict=True))
    if not all(torch.equal(a, b) for a, b in pairs) or any(ours.state.values()) != (folder is None):
        return math.nan
    stored = sum(file.stat().st_size - 4 for file in folder.iterdir()) if folder else 0
    return stored / float(sum(8 * a.numel() for a, _ in pairs))
