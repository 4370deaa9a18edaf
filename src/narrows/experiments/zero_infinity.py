"""What ZeRO-Infinity claims: sizes and speeds simulated on DGX-2 nodes, tiles and states in files run."""

import math
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

from narrows.experiments.offloaded import same_weights
from narrows.machine import Cluster, cluster
from narrows.measured.published import Shape, decoder
from narrows.modules.tiled_linear import tiled_linear
from narrows.techniques.training_memory_offload.zero_infinity import ZeroInfinity

_WIDTH, _HEADS, _LAYERS, _CONTEXT, _BATCH = 25600, 256, 128, 1024, 5


@cache
def _dgx2() -> Cluster:
    """DGX-2 nodes: 16 V100 each, which share eight network cards of 100 Gb/s."""
    return replace(cluster("dgx-v100"), devices_per_node=16)


def largest_on_dgx2(technique: ZeroInfinity) -> float:
    """Parameters, in units of 1e12, of the deepest network of that width that fits; 0 where not one layer does."""
    node = replace(technique, devices=16)

    def parameters(layers: int) -> float:
        model = node.model(decoder(Shape(_WIDTH, layers, _HEADS), _CONTEXT), _dgx2(), 1, _CONTEXT)
        return model.parameters / 1e12 if node.fits(model, _dgx2()) else 0.0

    low, high = 0, 1024
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters(middle) else (low, middle)
    return parameters(low) if low else 0.0


def _tflops(technique: ZeroInfinity, devices: int) -> float:
    graph = decoder(Shape(_WIDTH, _LAYERS, _HEADS), _CONTEXT)
    return replace(technique, devices=devices).tflop_per_s(graph, _dgx2(), _BATCH, _CONTEXT)


def petaflop_512(technique: ZeroInfinity) -> float:
    """PFLOP/s of 512 devices together."""
    return _tflops(technique, 512) * 512 / 1e3


def superlinear(technique: ZeroInfinity) -> float:
    """FLOP/s of one of 512 devices over those of one of 64."""
    return _tflops(technique, 512) / _tflops(technique, 64)


def tile(technique: ZeroInfinity) -> float:
    """The largest weight at hand over the whole layer's, when results and gradients are the same."""
    import torch

    torch.manual_seed(0)
    largest = 0.0
    for bias in (True, False):
        whole, x = torch.nn.Linear(48, 96, bias), torch.randn(5, 48, requires_grad=True)
        parts = tiled_linear(whole, technique.tiles)
        results = [layer(x) for layer in (whole, parts)]
        pulls = [torch.autograd.grad(r.square().sum(), x)[0] for r in results]
        pairs = [[r.detach() for r in results], pulls]
        if max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs) > 1e-6:
            return math.nan
        largest = max(largest, *(p.numel() / whole.weight.numel() for p in parts.parameters()))
    return largest


def states_on_disk(technique: ZeroInfinity) -> float:
    """Share of Adam's states that lie in files when the weights are those of Adam in memory."""
    with tempfile.TemporaryDirectory() as folder:
        return same_weights(Path(folder) if technique.outside else None, early=False)
