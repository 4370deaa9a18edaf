"""Split a convolutional network's latency into operations and efficiency by layer, and say what fusing its blocks would give.

Latency is operations / (peak x computational efficiency). Drawn over cumulative operations, what a layer's efficiency
lacks is the efficiency gap: the area above it is time lost. The waterline is the efficiency that its operational
intensity lets a layer reach at most. Layers far under water move their maps through memory for little arithmetic; a
kernel that does a whole residual block keeps the maps between its layers on the chip and lifts the waterline.

## When it helps
Networks of depthwise, grouped and thin layers, which are slow for their operations; choosing what to fuse first.

## When it does not
Layers at the waterline already and bound by arithmetic: fusion changes nothing. Fused traffic is a bound: it takes
weights and a tile of every map between to fit on the chip, and counts no halo that neighbouring tiles compute twice.

## Reference
Lavin, On the Efficiency of Convolutional Neural Networks, 2024, arXiv 2404.03617.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.cost import Limit, cost
from narrows.costmodel import op_time
from narrows.errors import NarrowsError
from narrows.graph import Graph, Op
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

if TYPE_CHECKING:
    import torch

_BLOCK = re.compile(r"(?:.*\.)?(?:\d+|\*)(?=\.[A-Za-z_])")  # up to the last index that has a named part below it

_EMPTY = 50  # modules that do nothing, timed to know what a timer costs


@dataclass(frozen=True)
class Waterline(Measures):
    """Efficiency gap, waterline and block fusion of a network on a machine; `profile` times a real one."""

    card: ClassVar[Card] = Card(
        "convfirst-waterline-analysis",
        relieves=(Limit.BANDWIDTH, Limit.LAUNCH),
        phases=("forward",),
        exact=True,
        claims=(
            Claim("latency_error", "fraction", None, "ResNet-18 and MobileNetV2 run eagerly on one core, the worse of the two",
                  "section 3", "run", "the layers' times must add up to the latency without timers, within 5 %", at_most=0.05),
            Claim("fusion_traffic", "x less", 4.0, "ConvNeXt-T, batch 128, fp16, residual blocks as one kernel each", "abstract",
                  "checked", "about 4x faster at the same work takes at least 3x less traffic", at_least=3.0),
            Claim("fusion_gain", "x", 4.0, "ConvNeXt-T, batch 128, fp16, A10: layers at their roofline over fused blocks",
                  "abstract", "simulated", "the paper's 4x has a new block design in it as well: half of it", at_least=2.0),
        ),
    )  # fmt: skip
    fuse: bool = choice(True, help="price residual blocks as one kernel; False leaves every layer on its own")
    arithmetic_only: bool = choice(False, help="take layers without multiply-adds for free, as a count of operations does")

    def baseline(self) -> "Waterline":
        return Waterline(fuse=False, arithmetic_only=True)

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Rows of the efficiency-gap and waterline plots, one an op in order, and what fusing each block gives.

        seconds (predicted), efficiency and waterline (fractions of peak), intensity (FLOP per byte); `from_flop` is
        where on the axis of cumulative operations the op begins. `fusion_traffic` and `fusion_gain` are bytes and
        seconds at the roofline, before over after.
        """
        ops = [op for op in graph if op.phase == "forward" and (op.spec.matmul or not self.arithmetic_only)]
        peak = max((machine.peak(op.compute or op.act.name) for op in ops if op.spec.matmul), default=0.0)
        if not peak:
            raise NarrowsError("no op multiplies.", where=graph.name, remedy="Give a graph with convolutions or linear layers.")
        bandwidth = machine.memory.bandwidth_bytes_per_s
        room = machine.memories[1].capacity_bytes if len(machine.memories) > 1 else 0.0
        rows: list[Mapping[str, Any]] = []
        apart, fused = [0.0, 0.0], [0.0, 0.0]  # bytes, and seconds at the roofline
        flop_before = seconds = 0.0
        for block, members in groupby(ops, lambda op: block_of(op.name) if self.fuse else op.name):
            inside = list(members)
            works = [cost(op, step, graph.eager) for op in inside]
            flops, moved = [float(w.flop) for w in works], [float(w.read_bytes + w.write_bytes) for w in works]
            weights = sum(float(w.weight_bytes) for w in works)
            fits = weights / inside[0].repeat <= room
            ends = float(works[0].input_bytes) + _written(inside[-1], step)  # what must cross the chip's edge besides weights
            kept = min(ends + weights, sum(moved)) if fits and len(inside) > 1 else sum(moved)
            at_roofline = [max(f / peak, b / bandwidth) for f, b in zip(flops, moved, strict=True)]
            together = max(sum(flops) / peak, kept / bandwidth)
            apart = [apart[0] + sum(moved), apart[1] + sum(at_roofline)]
            fused = [fused[0] + kept, fused[1] + together]
            for op, flop, traffic in zip(inside, flops, moved, strict=True):
                took = float(op_time(op, step, machine, graph.eager).seconds)
                rows.append({
                    "op": op.name, "block": block, "from_flop": flop_before, "flop": flop, "bytes": traffic, "seconds": took,
                    "efficiency": flop / peak / took if took else 0.0, "intensity": flop / traffic if traffic else 0.0,
                    "waterline": min(1.0, flop / peak / (traffic / bandwidth)) if traffic else 1.0,
                    "fused_waterline": sum(flops) / peak / together if together else 1.0,
                })  # fmt: skip
                flop_before, seconds = flop_before + flop, seconds + took
        values = {"seconds": seconds, "efficiency": flop_before / peak / seconds, "waterline": flop_before / peak / apart[1],
                  "fused_waterline": flop_before / peak / fused[1], "bytes": apart[0], "fused_bytes": fused[0],
                  "fusion_traffic": apart[0] / fused[0], "fusion_gain": apart[1] / fused[1]}  # fmt: skip
        units = {"seconds": "s", "bytes": "B", "fused_bytes": "B", "fusion_traffic": "x", "fusion_gain": "x"}
        return Reading(values, units, tuple(rows))

    def profile(self, model: "torch.nn.Module", data: Mapping[str, "torch.Tensor"], runs: int = 9,
                clock: Callable[[], float] = perf_counter) -> Reading:  # fmt: skip
        """Time every module of a network as it runs, beside runs without timers, turn by turn.

        A row's seconds are a module's own: without what the modules inside it take. `error` is how far the sum over
        the rows is from the latency without timers (the median over the turns of their ratio, less one). What a timer
        costs, measured on modules that do nothing, is taken off. On a machine that others use, run on one thread and
        give `time.thread_time` as clock.
        """
        import torch

        multiplies = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.Linear)
        counted = [name for name, m in model.named_modules() if isinstance(m, multiplies) or not self.arithmetic_only]
        empty = torch.nn.Sequential(*(torch.nn.Identity() for _ in range(_EMPTY)))
        with torch.inference_mode():
            idle = [_turn(empty, {"input": torch.zeros(1)}, turn, clock, 0.0) for turn in range(_EMPTY)]
            timer = max(median((sum(own.values()) - latency) / _EMPTY for own, latency in idle), 0.0)
            model(**data)
            turns = [_turn(model, data, turn, clock, timer) for turn in range(runs)]
        seconds = {name: median(own[name] for own, _ in turns) for name in counted if all(name in own for own, _ in turns)}
        error = abs(median(sum(own.get(name, 0.0) for name in counted) / latency for own, latency in turns) - 1)
        rows = tuple({"layer": name or type(model).__name__, "seconds": took} for name, took in seconds.items())
        return Reading({"seconds": median(latency for _, latency in turns), "error": error}, {"seconds": "s"}, rows)


def block_of(name: str) -> str:
    """The residual block of an op by its module path, the last index with a name below: `layers.2` of `layers.2.dwconv`."""
    found = _BLOCK.match(name)
    return found[0] if found else name


def _written(op: Op, step: Step) -> float:
    return float(op.spec.writes(op.sized(step))) * op.act.bits / 8 * op.repeat


def _turn(
    model: "torch.nn.Module", data: Mapping[str, Any], turn: int, clock: Callable[[], float], timer: float
) -> tuple[dict[str, float], float]:
    """One run with timers and one without, in turns first: each module's own seconds, and the latency."""
    own: dict[str, float] = {}
    if turn % 2:
        own = _timed(model, data, clock, timer)
    start = clock()
    model(**data)
    latency = clock() - start
    return own or _timed(model, data, clock, timer), latency


def _timed(model: "torch.nn.Module", data: Mapping[str, Any], clock: Callable[[], float], timer: float) -> dict[str, float]:
    """Run once with a timer around each module, which costs `timer` seconds: each one's seconds without those inside it."""
    own: dict[str, float] = {}
    running: list[list[float]] = []  # start, and seconds of the modules inside

    def enter(*_: Any) -> None:
        running.append([clock(), 0.0])

    def leave(name: str) -> Callable[..., None]:
        def stop(*_: Any) -> None:
            start, inside = running.pop()
            took = clock() - start
            own[name] = own.get(name, 0.0) + took - inside
            if running:
                running[-1][1] += took + timer

        return stop

    modules = list(model.named_modules())
    hooks = [m.register_forward_pre_hook(enter) for _, m in modules]
    hooks += [m.register_forward_hook(leave(name)) for name, m in modules]
    try:
        model(**data)
    finally:
        for hook in hooks:
            hook.remove()
    return own
