"""What SparseProp claims: exact gradients at the nonzeros, faster steps, time by density, and the same training."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrows import samples
from narrows.experiments.steady import one_thread, time_ratio
from narrows.techniques.sparsity_pruning.sparseprop import SparseProp


def _pruned(technique: SparseProp, model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """A dense copy of a model without the weights that the technique drops, and which are kept, found by sorting."""
    model, masks = deepcopy(model), {}
    with torch.no_grad():
        for name, linear in technique.layers(model).items():
            size = linear.weight.abs().flatten().sort().values
            masks[name] = linear.weight.abs() >= size[len(size) - technique.nonzeros(linear.in_features, linear.out_features)]
            linear.weight *= masks[name]
    return model, masks


@cache
def _encoder() -> Any:
    """Two layers of MiniLM."""
    model: Any = samples.minilm()[0]
    model.encoder.layer = model.encoder.layer[:2]
    return model


@one_thread()
def gradient_error(technique: SparseProp) -> float:
    """Largest distance of outputs and gradients of MiniLM's layers from masked dense autograd's, over their largest number.

    Infinite where no layer is sparse, or one keeps weights other than the nonzeros. 200 rows: the last tile is not full.
    """
    generator = torch.Generator().manual_seed(0)
    inner = _encoder().encoder.layer[0]
    dense, masks = _pruned(technique, inner)
    sparse = technique.apply(deepcopy(inner), [])
    worst = 0.0 if masks else math.inf
    for name, mask in masks.items():
        theirs: Any = dense.get_submodule(name)
        ours: Any = sparse.get_submodule(name)
        if ours.values.numel() != mask.sum():
            return math.inf
        x, dy = torch.randn(200, mask.shape[1], generator=generator), torch.randn(200, mask.shape[0], generator=generator)
        found = []
        for layer, weight in ((theirs, theirs.weight), (ours, ours.values)):
            given = x.clone().requires_grad_()
            y = layer(given)
            found.append((y, *torch.autograd.grad(y, (given, weight, layer.bias), dy)))
        plain, kept = found
        for a, b in zip((plain[0], plain[1], plain[2][mask], plain[3]), kept, strict=True):
            worst = max(worst, float((a - b).detach().abs().max() / a.detach().abs().max()))
    return worst


def _passes(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """A forward and a backward pass, from a gradient of the outputs to those of inputs and parameters."""
    x = x.clone().requires_grad_()

    def output() -> Tensor:
        out: Any = model(x)
        return getattr(out, "last_hidden_state", out)

    dy = torch.randn_like(output())
    return lambda: torch.autograd.grad(output(), (x, *model.parameters()), dy)


@one_thread()
def step_speed(technique: SparseProp) -> float:
    """Time of a forward and a backward pass of two dense layers of MiniLM over that of the sparse ones."""
    model = _encoder()
    x = model.embeddings(torch.arange(8 * 64).view(8, 64)).detach()  # no time depends on which tokens they are
    dense: nn.Module = deepcopy(model.encoder)
    sparse = technique.apply(deepcopy(model.encoder), [])
    return time_ratio(_passes(dense, x), _passes(sparse, x))


@one_thread()
def time_by_density(technique: SparseProp) -> float:
    """Time of one layer's forward and backward pass over that of the same layer with a fifth of the nonzeros.

    A technique that drops nothing has no fewer nonzeros: there it is the same layer twice.
    """
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(768, 3072, bias=False)), torch.randn(512, 768)
    fewer = replace(technique, sparsity=technique.sparsity and 1 - (1 - technique.sparsity) / 5)
    first, second = (_passes(each.apply(deepcopy(network), []), x) for each in (technique, fewer))
    return time_ratio(first, second)


@one_thread()
def same_training(technique: SparseProp) -> float:
    """Largest relative distance of a sparse network's losses from those of a masked dense one, while both learn text.

    They predict the next character from twelve, and must learn: infinite where the loss falls by less than a tenth,
    or where no layer is sparse.
    """
    prose = samples.text()[1][:100_000].lower()
    alphabet = {c: i for i, c in enumerate(sorted(set(prose)))}
    windows = torch.tensor([alphabet[c] for c in prose]).unfold(0, 13, 1)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(len(alphabet), 16), nn.Flatten(), nn.Linear(192, 384), nn.ReLU(),
                            nn.Linear(384, 384), nn.ReLU(), nn.Linear(384, len(alphabet)))  # fmt: skip
    dense, masks = _pruned(technique, network)
    sparse = technique.apply(network, [])
    if not masks:
        return math.inf
    losses: list[list[float]] = []
    model: Any
    for model in (dense, sparse):
        optimizer, generator = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9), torch.Generator().manual_seed(0)
        losses.append([])
        for _ in range(60):
            rows = windows[torch.randint(len(windows), (256,), generator=generator)]
            loss = F.cross_entropy(model(rows[:, :12]), rows[:, 12])
            optimizer.zero_grad()
            loss.backward()
            if model is dense:
                for name, mask in masks.items():
                    model.get_submodule(name).weight.grad *= mask
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    if not losses[1][-1] < 0.9 * losses[1][0]:
        return math.inf
    return max(abs(a / b - 1) for a, b in zip(losses[0], losses[1], strict=True))
