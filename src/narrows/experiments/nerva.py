"""What Nerva claims: sparse from the start, several times as fast as masks, in a fraction of the memory, and as accurate."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrows import samples
from narrows.experiments.steady import one_thread, time_ratio
from narrows.modules.sparse_linear import SparseLinear
from narrows.techniques.sparsity_pruning.nerva import Nerva


def _mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class _Trained:
    """A network with its optimizer; where weights are masked, the masks are put on them again after each step."""

    def __init__(self, model: nn.Module, masks: dict[str, Tensor]) -> None:
        self.model, self.masks = model, masks
        self.optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)

    def step(self, x: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), labels).backward()
        self.optimizer.step()
        with torch.no_grad():
            for name, mask in self.masks.items():
                self.model.get_submodule(name).weight *= mask

    def correct(self, x: Tensor, labels: Tensor) -> float:
        """Percent right."""
        return 100 * float((self.model(x).argmax(1) == labels).float().mean())

    def nbytes(self) -> int:
        """All that is kept between two steps."""
        state = [t for one in self.optimizer.state.values() for t in one.values() if isinstance(t, Tensor)]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        held = (*self.model.parameters(), *self.model.buffers(), *gradients, *state, *self.masks.values())
        return sum(t.nbytes for t in held)


def _pair(technique: Nerva, *widths: int) -> tuple[_Trained, _Trained]:
    """The network with masks on dense weights, and the one that keeps the same weights alone."""
    sparse = technique.apply(_mlp(*widths))
    dense, masks = _mlp(*widths), {}
    with torch.no_grad():
        for name, layer in sparse.named_modules():
            if isinstance(layer, SparseLinear):
                plain: Any = dense.get_submodule(name)
                plain.weight.copy_(layer.weight)
                masks[name] = layer.weight != 0
    return _Trained(dense, masks), _Trained(sparse, {})


def _random(rows: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=generator), torch.randint(10, (rows,), generator=generator)


@one_thread()
def step_speed(technique: Nerva) -> float:
    """Time of a training step with masks over that of a sparse one."""
    masked, sparse = _pair(technique, 3072, 1024, 512, 10)
    batch = _random(100, 3072)  # no time depends on what the images show
    return time_ratio(lambda: masked.step(*batch), lambda: sparse.step(*batch))


@one_thread()
def memory(technique: Nerva) -> float:
    """Bytes that training with masks keeps over those that sparse training does."""
    masked, sparse = _pair(technique, 3072, 1024, 512, 10)
    for one in (masked, sparse):
        one.step(*_random(64, 3072))
    return masked.nbytes() / sparse.nbytes()


@one_thread()
def accuracy_lost(technique: Nerva) -> float:
    """Percentage points of unseen digits right with masks, less those right without; infinite where nothing is sparse."""
    masked, sparse = _pair(technique, 784, 512, 256, 10)
    if not masked.masks:
        return math.inf
    images, labels = samples.digits()
    images = images.flatten(1)
    for one in (masked, sparse):
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            for batch in torch.randperm(8000, generator=generator).split(100):
                one.step(images[batch], labels[batch])
    found = [one.correct(images[8000:], labels[8000:]) for one in (masked, sparse)]
    return found[0] - found[1] if found[1] > 85 else math.inf


@one_thread()
def time_by_size(technique: Nerva) -> float:
    """Time of a training step of a square layer over that of one with twice the inputs and outputs."""
    small, large = (_pair(technique, width, width)[1] for width in (1024, 2048))
    few, many = ((x, labels) for x, labels in (_random(256, 1024), _random(256, 2048)))
    return time_ratio(lambda: small.step(*few), lambda: large.step(*many))
