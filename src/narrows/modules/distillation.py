"""What a teacher answers, kept in few bytes, and the training that brings a student's answers back to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from narrows.errors import NarrowsError
from narrows.progress import Tell

WARM_UP = 0.1  # of the steps, in which the rate rises
LONGEST_GRADIENT = 1.0

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Answers:
    """What a teacher says of a batch: how likely its likeliest classes are, or its features.

    values   logarithms of probabilities [..., k + 1], the last that of all other classes together; or features [..., D]
    classes  which ones [..., k]; None for features
    """

    values: Tensor
    classes: Tensor | None

    def loss(self, output: Tensor) -> Tensor:
        """How far a student is from them: the KL divergence in nats a position, or the squared error over the squares."""
        if self.classes is None:
            return (output - self.values).square().mean() / self.values.square().mean()
        said = _with_rest(output.gather(-1, self.classes.long()) - output.logsumexp(-1, keepdim=True))
        return (self.values.exp() * (self.values - said)).sum(-1).mean()


def _with_rest(likeliest: Tensor) -> Tensor:
    """Logarithms of the probabilities of some classes, and behind them that of all others."""
    rest = (1 - likeliest.exp().sum(-1, keepdim=True)).clamp_min(1e-6)
    return torch.cat([likeliest, rest.log()], -1)


def answers(teacher: nn.Module, batch: Batch, classes: int = 2**31) -> Answers:
    """What a teacher says of a batch, of as many of its likeliest classes at each position; of all of them by default."""
    training = teacher.training
    with torch.no_grad():
        output, chooses = _output(teacher.eval(), batch)
        teacher.train(training)
        if not chooses:
            return Answers(output, None)
        likeliest, which = output.log_softmax(-1).topk(min(classes, output.shape[-1]), -1)
        return Answers(_with_rest(likeliest), which.int())


def _output(model: nn.Module, batch: Batch) -> tuple[Tensor, bool]:
    """A model's main output in fp32, and whether it chooses among classes: logits by name, or a row for each input."""
    found: Any = model(**batch)
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(found, name, None), Tensor):
            return getattr(found, name).float(), name == "logits"
    found = found if isinstance(found, Tensor) else found[0]
    return found.float(), found.dim() == 2


def train(model: nn.Module, lesson: Callable[[int], tuple[Batch, Answers]], steps: int, rate: float, tell: Tell) -> nn.Module:
    """Train all weights of a model but embeddings, of which a few batches reach few rows, on what each step's lesson asks.

    The model is trained as it will run: nothing is dropped, and statistics of batch norms stay as they are. Weights in less
    than fp32 are trained in fp32 and rounded at the end. The same steps give the same bits.

    rate: how far a step moves a weight, as a share of its tensor's root mean square (Adafactor, which keeps no second copy
    of what it trains); it rises, then falls to zero. Raises NarrowsError where the loss is no number.
    """
    training, held = model.training, [(t, t.dtype, t.requires_grad) for t in (*model.parameters(), *model.buffers())]
    for t, _, _ in held:
        if t.is_floating_point():
            t.data = t.data.float()
        t.requires_grad_(False)
    rows = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.is_floating_point() and id(p) not in rows]
    optimizer = torch.optim.Adafactor([p.requires_grad_(True) for p in trained], lr=rate)
    model.eval()
    for i in range(steps):
        tell("recovering", i, steps)
        batch, said = lesson(i)
        batch = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
        with torch.enable_grad():
            loss = said.loss(_output(model, batch)[0])
            if not loss.isfinite():
                raise NarrowsError(f"the loss is {loss.item()}.", where=f"recovering: step {i}", remedy="Lower the rate.")
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, LONGEST_GRADIENT)
        optimizer.param_groups[0]["lr"] = rate * min((i + 1) / max(1, steps * WARM_UP), (steps - i) / steps)
        optimizer.step()
        optimizer.zero_grad()
    for t, dtype, asked in held:
        t.data = t.data.to(dtype)
        t.requires_grad_(asked)
    return model.train(training)


def turn(step: int, count: int) -> int:
    """Which of so many batches a step is given: each once in every round, in an order of its own."""
    generator = torch.Generator().manual_seed(step // count)
    return int(torch.randperm(count, generator=generator)[step % count])
