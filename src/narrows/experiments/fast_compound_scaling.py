"""What fast compound scaling claims: residual networks built at each size, counted as they run, and timed on this CPU."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from time import thread_time
from typing import TYPE_CHECKING, Any

import numpy as np

from narrows.experiments.steady import one_thread
from narrows.techniques.scaling_laws.fast_compound_scaling import STRATEGIES, FastCompoundScaling, growth

if TYPE_CHECKING:
    import torch

FAMILIES = ("dense", "grouped", "depthwise")
_FACTORS = (4.0, 8.0)
_SIDE, _IMAGES, _ROUNDS = 128, 8, 6
_STAGES = ((32, 1), (64, 2), (128, 4), (256, 2))  # channels, blocks


@dataclass(frozen=True)
class Built:
    """A network that was built: FLOP and activations of an image as counted, and seconds of a batch (0: not timed)."""

    flop: float
    activations: float
    seconds: float = 0.0


def activation_exponent(technique: FastCompoundScaling) -> float:
    """The power of FLOP that activations grow with from the base to 8 times, as built: the mean of the families."""
    slopes = []
    for family in FAMILIES:
        nets = [_counted(family, "fast", s, technique.alpha) for s in (1.0, 2.0, *_FACTORS)]
        slopes.append(np.polyfit(np.log([n.flop for n in nets]), np.log([n.activations for n in nets]), 1)[0])
    return float(np.mean(slopes))


def runtime_correlation(technique: FastCompoundScaling) -> float:
    """Correlation of the logarithms of seconds and of the technique's proxy over all networks of all strategies."""
    nets = _timed(technique.alpha).values()
    return float(np.corrcoef(np.log([n.seconds for n in nets]), np.log([getattr(n, technique.proxy) for n in nets]))[0, 1])


def quicker(technique: FastCompoundScaling) -> float:
    """Seconds a FLOP under uniform scaling over those under the technique's, geometric mean of the families and factors."""
    nets, gains = _timed(technique.alpha), list[float]()
    for family, s in itertools.product(FAMILIES, _FACTORS):
        uniform, fast = nets[family, "uniform", s], nets[family, "fast", s]
        gains.append(math.log(uniform.seconds / uniform.flop) - math.log(fast.seconds / fast.flop))
    return math.exp(sum(gains) / len(gains))


def network(family: str, by: Sequence[float]) -> "tuple[torch.nn.Module, int]":
    """A residual network with grown depth and channels, and the side of its image; blocks and channels are rounded."""
    import torch
    from torch import nn

    def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
        layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(outputs))

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        inner = 4 * inputs if family == "depthwise" else outputs
        groups = {"dense": 1, "grouped": inner // 16, "depthwise": inner}[family]
        path = (*conv(inputs, inner), nn.ReLU(), *conv(inner, inner, 3, stride, groups), nn.ReLU(), *conv(inner, outputs))
        straight = stride == 1 and inputs == outputs
        made = nn.Module()
        made.path, made.shortcut = nn.Sequential(*path), nn.Identity() if straight else conv(inputs, outputs, 1, stride)
        made.forward = lambda x: (made.path(x) + made.shortcut(x)).relu()
        return made

    torch.manual_seed(0)
    depth, width, side = by
    stem, *stages = (max(16, round(channels * width / 16) * 16) for channels, _ in ((32, 1), *_STAGES))
    blocks: list[nn.Module] = [conv(3, stem, 3, 2), nn.ReLU()]
    inputs = stem
    for outputs, (_, count) in zip(stages, _STAGES, strict=True):
        for index in range(max(1, round(count * depth))):
            blocks.append(block(inputs, outputs, 1 if index else 2))
            inputs = outputs
    return nn.Sequential(*blocks).eval(), round(_SIDE * side / 8) * 8


@cache
def _counted(family: str, strategy: str, s: float, alpha: float) -> Built:
    """FLOP and written numbers of all convolutions for one image, by hooks on a run without storage."""
    import torch

    with torch.device("meta"):
        net, side = network(family, growth(strategy, s, alpha))
        flop = activations = 0

        def note(layer: "torch.nn.Module", _: object, out: "torch.Tensor") -> None:
            nonlocal flop, activations
            flop += 2 * out.numel() * layer.weight[0].numel()
            activations += out.numel()

        for layer in net.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.register_forward_hook(note)
        net(torch.empty(1, 3, side, side))
    return Built(flop, activations)


@cache
def _timed(alpha: float) -> dict[tuple[str, str, float], Built]:
    """Every family under every strategy at every factor, with the least processor seconds of a few runs, turn by turn."""
    import torch

    found: dict[tuple[str, str, float], Built] = {}
    with one_thread(), torch.inference_mode():
        for family in FAMILIES:
            runs: dict[tuple[float, ...], tuple[Any, torch.Tensor, list[float]]] = {}
            known: dict[tuple[str, float], tuple[float, ...]] = {}
            for strategy, s in [("fast", 1.0), *((one, s) for one in STRATEGIES for s in _FACTORS)]:
                by = known[strategy, s] = tuple(round(part, 9) for part in growth(strategy, s, alpha))
                if by not in runs:  # uniform scaling is fast scaling with a third: one network, timed once
                    net, side = network(family, by)
                    images = torch.randn(_IMAGES, 3, side, side, generator=torch.Generator().manual_seed(0))
                    net, images = (one.to(torch.bfloat16).to(memory_format=torch.channels_last) for one in (net, images))
                    runs[by] = (net, images, [])
            for _ in range(_ROUNDS):
                for net, images, seconds in runs.values():
                    start = thread_time()
                    net(images)
                    seconds.append(thread_time() - start)
            for (strategy, s), by in known.items():
                count = _counted(family, strategy, s, alpha)
                found[family, strategy, s] = Built(count.flop, count.activations, min(runs[by][2]))
    return found
