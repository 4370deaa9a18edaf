"""What recomputing segments saves and costs: bytes that a real training step allocates, equal gradients, counted FLOP."""

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from narrows.techniques.training_memory_offload.sublinear_memory_checkpointing import SublinearMemoryCheckpointing, peak

_WIDTH, _ROWS = 16, 4096


class _Block(nn.Module):  # type: ignore[misc]
    """A residual MLP: narrow and for many rows, so that activations outweigh weights and gradients by far."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))  # type: ignore[no-any-return]


def _net(depth: int, width: int = _WIDTH) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(_Block(width) for _ in range(depth)))


def _step(net: nn.Module, x: Tensor) -> list[Tensor]:
    """One forward and backward pass; the gradients."""
    net.zero_grad()
    net(x).square().mean().backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


def _peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that are allocated at a time while something runs, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events: Any = seen.profiler
    moves = sorted((e.start_ns(), e.nbytes()) for e in events.kineto_results.events() if e.name() == "[memory]")
    return int(max(accumulate(size for _, size in moves)))


def _input() -> Tensor:
    return torch.randn(_ROWS, _WIDTH, generator=torch.Generator().manual_seed(1))


def equal_gradients_in_less_memory(technique: SublinearMemoryCheckpointing) -> float:
    """Peak bytes of a training step of 64 blocks, over those with segments; NaN if any gradient differs in one bit."""
    plain, cut, x = _net(64), technique.apply(_net(64)), _input()
    same = all(torch.equal(a, b) for a, b in zip(_step(plain, x), _step(cut, x), strict=True))
    return _peak_bytes(lambda: _step(plain, x)) / _peak_bytes(lambda: _step(cut, x)) if same else math.nan


def depth_exponent(technique: SublinearMemoryCheckpointing) -> float:
    """The power of the depth with which the peak of a real training step grows: a fit through 16 to 256 blocks."""
    x, depths = _input(), (16, 36, 64, 144, 256)
    peaks = []
    for depth in depths:
        net = technique.apply(_net(depth))
        _step(net, x)  # gradients are there from now on, so that what is measured are activations
        peaks.append(_peak_bytes(lambda: net(x).square().mean().backward()))  # noqa: B023  (called at once)
    return float(np.polyfit(np.log(depths), np.log(peaks), 1)[0])


def flop_overhead(technique: SublinearMemoryCheckpointing) -> float:
    """FLOP of a real training step with segments, over those without, less one."""
    counts = []
    for net in (_net(36), technique.apply(_net(36))):
        with FlopCounterMode(display=False) as counter:
            _step(net, _input())
        counts.append(counter.get_total_flops())
    return float(counts[1] / counts[0] - 1)


def resnet_1000(technique: SublinearMemoryCheckpointing) -> float:
    """Feature maps of a ResNet of 1,001 layers at batch 32 and 224 px, all kept, over those kept with segments.

    Bottleneck units as in the authors' example, [3, 24, 36, 3] of them stretched to 333: each of its convolutions keeps its
    own output and that of norm and activation (in place), the sum of the unit is its border. fp32.
    """
    units, batch, width = (15, 121, 182, 15), 32, 4
    kept, borders, before = [], [], 64 * 56**2
    for stage, count in enumerate(units):
        area, filters = (56 >> stage) ** 2, 64 << stage
        for unit in range(count):
            maps = (filters + filters + 4 * filters) + (4 * filters if unit == 0 else 0)  # the first has a shortcut of its own
            kept.append((2 * maps + 4 * filters) * area * batch * width)
            borders.append(before * batch * width)
            before = 4 * filters * area
    return peak(kept, borders, (len(kept),)) / peak(kept, borders, technique.ends(len(kept)))
