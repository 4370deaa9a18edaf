"""What Greenformer claims: sizes by its formula, optimal factors, latency, and quality after brief tuning."""

import math
import time
from copy import deepcopy
from functools import cache
from statistics import median
from typing import TYPE_CHECKING, Any

from narrows import samples
from narrows.experiments.steady import one_thread
from narrows.techniques.low_rank_codebook_sharing.greenformer import Greenformer

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@one_thread()
def size_by_formula(technique: Greenformer) -> float:
    """Largest share of parameters or FLOP that factored layers of an MLP, a CNN and a transformer keep.

    Parameters are counted in the modules and FLOP by torch's own counter; NaN where either is not the formula's
    rank x (K + N), 2 FLOP for each row.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def count(model: Any, batch: Any) -> tuple[int, int]:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**batch)
        return sum(p.numel() for p in model.parameters()), counter.get_total_flops()

    shares: list[float] = []
    for model, batch in _networks():
        layers = technique._layers(model)
        rows = _rows(model, layers, batch)
        before = count(model, batch)
        if not layers:
            continue
        after = count(technique.apply(model, [batch]), batch)
        saved, whole = [0, 0], [0, 0]
        for name, (layer, rank) in layers.items():
            outputs, inputs = layer.weight.flatten(1).shape  # type: ignore[operator, union-attr]
            for i, each in enumerate((1, 2 * rows[name])):
                saved[i] += each * (inputs * outputs - rank * (inputs + outputs))
                whole[i] += each * inputs * outputs
        if any(b - a != s for b, a, s in zip(before, after, saved, strict=True)):
            return math.nan
        shares += [1 - s / w for s, w in zip(saved, whole, strict=True) if w]
    return max(shares, default=1.0)


def _networks() -> "list[tuple[torch.nn.Module, dict[str, Tensor]]]":
    import torch
    from torch import nn
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(300, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    cnn = nn.Sequential(nn.Conv2d(3, 48, 5, 2, 2), nn.ReLU(), nn.Conv2d(48, 96, 3, padding=1, bias=False), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))  # fmt: skip
    config = BertConfig(hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=384, vocab_size=200)
    bert, ids = BertModel(config).eval(), torch.randint(200, (2, 20))
    return [(mlp, {"input": torch.randn(7, 300)}), (cnn, {"input": torch.randn(2, 3, 33, 33)}), (bert, {"input_ids": ids})]


def _rows(model: Any, layers: Any, batch: Any) -> dict[str, int]:
    """How many outputs, or output positions, each layer gives for a batch."""
    import torch

    rows: dict[str, int] = {}

    def after(name: str) -> Any:
        def note(layer: Any, args: Any, out: Any) -> None:
            rows[name] = out.numel() // layer.weight.shape[0]

        return note

    hooks = [layer.register_forward_hook(after(name)) for name, (layer, _) in layers.items()]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return rows


@one_thread()
def optimal_error(technique: Greenformer) -> float:
    """Over MiniLM's layers, the largest relative distance of the factors' error from the optimum; NaN if none was factored."""
    import torch

    model: Any = _encoder().encoder.layer[:2]
    layers = technique._layers(model)
    if not layers:
        return math.nan
    factored = technique.apply(deepcopy(model), [])
    worst = []
    for name, (layer, rank) in layers.items():
        first, second = factored.get_submodule(name)  # type: ignore[misc]
        weight: Any = layer.weight.detach().double()  # type: ignore[operator, union-attr]
        tail = torch.linalg.svdvals(weight)[rank:].square().sum().sqrt()
        error = (weight - second.weight.detach().double() @ first.weight.detach().double()).norm()  # type: ignore[has-type]
        worst.append(abs(float(error / tail) - 1))
    return max(worst)


@cache
def _encoder() -> Any:
    return samples.minilm()[0]


@one_thread()
def latency(technique: Greenformer) -> float:
    """CPU seconds of MiniLM on 16 x 128 tokens over those of its factored form: the median of nine alternating pairs."""
    import torch

    model = _encoder()
    factored = technique.apply(deepcopy(model), []) if technique._layers(model) else deepcopy(model)
    batch = {"input_ids": torch.arange(16 * 128).view(16, 128)}  # no time depends on which tokens they are
    ratios = []
    with torch.no_grad():
        for _ in range(10):
            start = time.process_time()
            model(**batch)
            middle = time.process_time()
            factored(**batch)
            ratios.append((middle - start) / (time.process_time() - middle))
    return median(ratios[1:])


@one_thread()
def removed_at_equal_accuracy(technique: Greenformer) -> float:
    """Share of the parameters that a character model loses while its accuracy, after brief tuning, falls by at most 0.01.

    An MLP that predicts the next character of the sample text from twelve; 0 where the accuracy falls further.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    prose = samples.text()[1][:400_000].lower()
    alphabet = {c: i for i, c in enumerate(sorted(set(prose)))}
    codes = torch.tensor([alphabet[c] for c in prose])
    windows = codes.unfold(0, 13, 1)
    train, test = windows[:320_000], windows[330_000::4]
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Embedding(len(alphabet), 16), nn.Flatten(), nn.Linear(192, 384), nn.GELU(),
                                     nn.Linear(384, 384), nn.GELU(), nn.Linear(384, len(alphabet)))  # fmt: skip

    def fit(network: nn.Module, steps: int, rate: float) -> None:
        optimizer = torch.optim.Adam(network.parameters(), lr=rate)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / steps)
            rows = train[torch.randint(len(train), (512,), generator=generator)]
            loss = F.cross_entropy(network(rows[:, :12]), rows[:, 12])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def accuracy(network: nn.Module) -> float:
        with torch.no_grad():
            return float((network(test[:, :12]).argmax(-1) == test[:, 12]).float().mean())

    fit(model, 300, 3e-3)
    before, size = accuracy(model), sum(p.numel() for p in model.parameters())
    small = technique.apply(model, []) if technique._layers(model) else model
    fit(small, 50, 1e-3)
    removed = 1 - sum(p.numel() for p in small.parameters()) / size
    return removed if accuracy(small) >= before - 0.01 else 0.0
