"""What COAT claims: training in two thirds of the bytes at an equal loss, finer moments, and 7B parameters in less memory."""

from collections.abc import Iterable
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from narrows.backward import training
from narrows.capture import capture
from narrows.experiments.small_tasks import characters, learn
from narrows.experiments.steady import one_thread
from narrows.footprint import footprint
from narrows.modules.fp8_training import ExpandedAdamW, packed
from narrows.step import Step
from narrows.techniques.quantization.coat import COAT

CONTEXT, BATCH, STEPS, WIDTH = 12, 256, 120, 192


class Made(TorchDispatchMode):  # type: ignore[misc]
    """Knows the storages that ops make while it is entered, and so the bytes of those that are still alive."""

    def __init__(self, besides: Iterable[Tensor]) -> None:
        super().__init__()
        self.besides = {StorageWeakRef(t.untyped_storage()) for t in besides}
        self.sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)):
            self.sizes[StorageWeakRef(made)] = made.nbytes()
        return out

    @property
    def alive(self) -> int:
        return sum(size for made, size in self.sizes.items() if made not in self.besides and not made.expired())


class Block(nn.Module):  # type: ignore[misc]
    """A transformer's MLP with its norm and residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]


@cache
@one_thread()
def _trained(technique: COAT) -> tuple[float, int, nn.Module, ExpandedAdamW]:
    """Held-out nats per character of a model trained in bf16, bytes of all that its training keeps, it and its optimizer."""
    rows, symbols = characters(CONTEXT)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(symbols, 16), nn.Flatten(), *(Block() for _ in range(2)), nn.LayerNorm(WIDTH),
                            nn.Linear(WIDTH, symbols)).bfloat16()  # fmt: skip
    optimizer: Any = technique.attach(network, lr=2e-3)
    loss, batch = learn(network, optimizer, rows, STEPS, BATCH), rows[:BATCH]
    with Made((*network.parameters(), batch)) as made:
        answer = network(batch[:, :CONTEXT])
    left = made.alive - answer.nbytes
    states = (t for one in optimizer.state.values() for t in one.values() if isinstance(t, Tensor))
    gradients = (p.grad for p in network.parameters() if p.grad is not None)
    return loss, left + sum(t.nbytes for t in (*network.parameters(), *gradients, *states)), network, optimizer


def bytes_at_equal_loss(technique: COAT) -> float:
    """Bytes that AdamW in bf16 keeps over those of the technique; 0 where the loss ends more than 1 % above."""
    (loss, kept, *_), (plain_loss, plain, *_) = _trained(technique), _trained(technique.baseline())
    return plain / kept if loss <= 1.01 * plain_loss else 0.0


def moment_error(technique: COAT) -> float:
    """Squared error of mean / sqrt(square) over that without stretching, both moments in E4M3: the median over all parameters."""
    _, _, network, optimizer = _trained(technique.baseline())
    group, ratios = technique.group or COAT().group, []
    for parameter in network.parameters():
        mean, square = optimizer.moments(parameter)
        errors = []
        for expand in (technique.expand, False):
            first, second = (packed(moment, group, expand).numbers() for moment in (mean, square))
            errors.append((first / (second.sqrt() + 1e-8) - mean / (square.sqrt() + 1e-8)).square().sum())
        ratios.append(float(errors[0] / errors[1]))
    return median(ratios)


def footprint_7b(technique: COAT) -> float:
    """Bytes at the peak of a training step of Llama-2-7B over those with the technique."""
    graph, step = training(capture("llama-2-7b")), Step.train(4, 2048)
    return float(footprint(graph, step).total_bytes / footprint(technique.rewrite(graph), step).total_bytes)
