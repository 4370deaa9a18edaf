"""What STen claims: grouped n:m products are right, faster than dense and than compressed rows, and cost little magnitude."""

import math
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn

from narrows import samples
from narrows.experiments.steady import one_thread, time_ratio
from narrows.modules.grouped_linear import GroupedLinear
from narrows.modules.sparse_linear import SparseLinear
from narrows.techniques.sparsity_pruning.sten import FORMS, STen


@cache
def _mlp() -> nn.Sequential:
    """The two linear layers of a MiniLM layer's MLP."""
    layer: Any = samples.minilm()[0]
    layer = layer.encoder.layer[1]
    return nn.Sequential(layer.intermediate.dense, layer.output.dense)


def _sparse(technique: STen) -> nn.Sequential:
    model: Any = technique.apply(deepcopy(_mlp()))
    return model  # type: ignore[no-any-return]


@one_thread()
def product_error(technique: STen) -> float:
    """Largest distance of outputs and gradients from those of the masked dense layer, over the largest number of each.

    For every n:m; infinite where a layer is dense, or keeps other than n of some m weights.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for form in FORMS if technique.form != "none" else ("none",):
        for plain, ours in zip(_mlp(), _sparse(replace(technique, form=form)), strict=True):
            if not isinstance(ours, GroupedLinear) or not _is_n_of_m(ours):
                return math.inf
            dense: Any = deepcopy(plain)
            dense.weight.data = ours.weight
            x, dy = (torch.randn(200, size, generator=generator) for size in (ours.in_features, ours.out_features))
            found = []
            for layer, weight in ((dense, dense.weight), (ours, ours.values)):
                given = x.clone().requires_grad_()
                y = layer(given)
                found.append((y, *torch.autograd.grad(y, (given, weight, layer.bias), dy)))
            theirs, mine = found
            pairs = (
                (theirs[0], mine[0]),
                (theirs[1], mine[1]),
                (theirs[2].flatten()[ours.places], mine[2]),
                (theirs[3], mine[3]),
            )
            worst = max(worst, *(float((a - b).detach().abs().max() / a.detach().abs().max()) for a, b in pairs))
    return worst


def _is_n_of_m(layer: GroupedLinear) -> bool:
    kept = (layer.weight != 0).unflatten(0, (-1, layer.form.m)).sum(1)
    return bool((kept <= layer.form.n).all()) and int(kept.sum()) >= 0.999 * layer.values.numel()


@one_thread()
@torch.no_grad()  # type: ignore[untyped-decorator]
def layer_speed(technique: STen) -> float:
    """Time of the dense layers over that of the sparse ones."""
    dense, sparse, x = _mlp(), _sparse(technique), torch.randn(512, 384)
    return time_ratio(lambda: dense(x), lambda: sparse(x))


@one_thread()
@torch.no_grad()  # type: ignore[untyped-decorator]
def over_compressed_rows(technique: STen) -> float:
    """Time of half of the weights as compressed rows over that of the technique's layers; without a layout those are the same."""
    rows, x = (
        nn.Sequential(*(SparseLinear.of(plain, plain.weight.numel() // 2) for plain in deepcopy(_mlp()))),
        torch.randn(512, 384),
    )
    ours = rows if technique.form == "none" else _sparse(replace(technique, form="2:4"))
    return time_ratio(lambda: rows(x), lambda: ours(x))


@torch.no_grad()  # type: ignore[untyped-decorator]
def energy_kept(technique: STen) -> float:
    """Sum of the magnitudes that the technique keeps over that of the n largest of each m; above 1 for what keeps all."""
    (n, m), kept, free = map(int, STen().form.split(":")), 0.0, 0.0
    for plain, ours in zip(_mlp(), _sparse(technique), strict=True):
        blocks = plain.weight.abs().unflatten(0, (-1, m))  # type: ignore[operator, union-attr]
        kept, free = kept + float(ours.weight.abs().sum()), free + float(blocks.topk(n, 1).values.sum())  # type: ignore[operator, union-attr]
    return kept / free
