"""A training step written out as tasks, from the times of its distinct operators.

A decoder is one layer many times over, and every replica and every device of a tensor group does the same. So each distinct
operator is timed once; a pass of a microbatch through a stage takes the sum of its operators; and passes, exchanges of
gradients and updates wait for each other as the pipeline's order says.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from narrows.backward import training
from narrows.costmodel import ATTENTION, op_time
from narrows.errors import NarrowsError
from narrows.graph import FP16, Graph, Op
from narrows.kinds import COLLECTIVES
from narrows.layout import Layout
from narrows.machine import Cluster, Machine
from narrows.parallel import is_layer, layer_count, tensor_parallel
from narrows.simulate.network import constants, wire
from narrows.simulate.orders import gpipe, interleaved
from narrows.simulate.pipeline import Pass, Work
from narrows.simulate.schedule import Need, Task, play
from narrows.simulate.timeline import Timeline
from narrows.simulate.training import STATES
from narrows.step import Step

Key = tuple[str, str]  # an operator ("linear", "linear backward") and its sizes, in the order of its kind: "2048x1024x4096x1x1"


def key(op: Op, step: Step) -> Key:
    """How a profile names an operator: equal keys are timed once."""
    name = op.kind if op.phase == "forward" else f"{op.kind} {op.phase}"
    return name, "x".join(f"{float(value):.12g}" for value in op.sized(step).values())


@dataclass(frozen=True)
class Profile:
    """Measured seconds of one call of each operator, by `key`."""

    seconds: Mapping[Key, float]
    where: str = "profile"

    @classmethod
    def read(cls, path: Path) -> "Profile":
        """From a CSV file with the columns op, shape, seconds, or a JSON list of such objects; NarrowsError names the row."""
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = json.load(file) if path.suffix == ".json" else list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
            raise NarrowsError(f"it cannot be read ({error}).", where=str(path), remedy="Give a CSV or JSON file.") from error
        found: dict[Key, float] = {}
        for number, row in enumerate(rows, 1):
            try:
                name, seconds = (str(row["op"]), str(row["shape"])), float(row["seconds"])
            except (KeyError, TypeError, ValueError):
                name, seconds = ("", ""), -1.0
            if not 0 <= seconds < float("inf"):
                raise NarrowsError("it is not a time of an operator.", where=f"{path}: row {number}",
                                   remedy="Give op, shape and seconds from zero up.")  # fmt: skip
            found[name] = seconds
        return cls(found, str(path))


@dataclass(frozen=True)
class Stages:
    """One microbatch in each stage of a plan: seconds forward and backward, and parameters that a device holds.

    `calls` of operators in a step, on one device of each stage, come from the times of `distinct` ones.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    parameters: Sequence[float]
    distinct: frozenset[Key]
    calls: int


@dataclass
class _Timed:
    """Seconds of operators on one device, each looked up once; collectives come from the cost model."""

    step: Step
    machine: Machine
    across: Machine
    profile: Profile | None
    factor: float
    known: dict[Key, float] = field(default_factory=dict)
    missing: list[Key] = field(default_factory=list)
    calls: int = 0

    def __call__(self, ops: Sequence[Op]) -> float:
        self.calls += sum(op.repeat for op in ops)
        return sum(self._once(op) * op.repeat for op in ops)

    def _once(self, op: Op) -> float:
        name, exchange = key(op, self.step), op.kind in COLLECTIVES
        if name not in self.known:
            if self.profile is None or exchange:
                one = op_time(replace(op, repeat=1), self.step, self.across if exchange else self.machine)
                self.known[name] = self.factor * float(one.seconds)
            else:
                self.known[name] = self.profile.seconds.get(name, 0.0)
                self.missing += [] if name in self.profile.seconds else [name]
        return self.known[name]


def stages(graph: Graph, group: Cluster, layout: Layout, sequence: int, profile: Profile | None = None) -> Stages:
    """The passes of a layout, from the times of its distinct operators: a profile's, or else the cost model's.

    Raises NarrowsError for a layout that does not fit the graph or is not written out, and for times that a profile lacks.
    """
    layout.require(graph, sequence=sequence)
    written = Layout(layout.tensor, layout.sequence, data=layout.data, overlap=layout.overlap, pipeline=layout.pipeline,
                     chunks=layout.chunks, schedule=layout.schedule, microbatch=layout.microbatch, accumulate=layout.accumulate,
                     recompute=layout.recompute)  # fmt: skip
    if layout != written or layout.schedule not in ("1f1b", "gpipe"):
        raise NarrowsError(f"{layout} is not written out.", where="training step",
                           remedy="Use tensor, data and pipeline parallelism with 1f1b or gpipe alone.")  # fmt: skip
    c, step = constants(), Step.train(layout.microbatch, sequence)
    across = wire(group, 1, layout.tensor, c["network"])
    timed = _Timed(step, group.machine, across, profile, 1.0 if profile else c["sustained"])
    ops = [op for op in training(tensor_parallel(graph, layout.tensor, layout.sequence)) if op.phase != "update"]
    first = {op.name for op in takewhile(lambda op: not is_layer(op), ops)}
    parts = [[op for op in ops if _part(op, first) == i] for i in range(3)]  # before the layers, the layers, after them
    spent = [_passes(part, timed, layout.recompute if i == 1 else "none") for i, part in enumerate(parts)]
    if profile and timed.missing:
        shown = ", ".join(f"{name} {shape}" for name, shape in timed.missing[:3])
        raise NarrowsError(f"{len(timed.missing)} operators have no time: {shown}.", where=profile.where,
                           remedy="Time each of `Stages.distinct` but collectives.")  # fmt: skip
    many, hold = layout.pipeline * layout.chunks, _message_seconds(graph, group, layout, step, c)

    def spread(before: float, inside: float, after: float) -> list[float]:
        return [inside / many + before * (s == 0) + after * (s == many - 1) for s in range(many)]

    forward, backward = ([seconds + hold for seconds in spread(*(one[i] for one in spent))] for i in (0, 1))
    owned = spread(*(sum(_parameters(op, layout.pipeline > 1) for op in part) for part in parts))
    return Stages(forward, backward, owned, frozenset(timed.known), timed.calls * layout.accumulate)


def play_step(graph: Graph, group: Cluster, layout: Layout, parts: Stages) -> Timeline:
    """One step of a layout, task by task."""
    many = layout.accumulate
    work = Work.of(len(parts.forward), many, parts.forward, parts.backward, 0.0)
    order = gpipe(layout.pipeline, many) if layout.schedule == "gpipe" else interleaved(layout.pipeline, many, layout.chunks)
    tasks = order.tasks(work)
    _finish(tasks, group, layout, parts.parameters, layer_count(graph) / len(parts.forward))
    return play(tasks)


def _message_seconds(graph: Graph, group: Cluster, layout: Layout, step: Step, c: Mapping[str, float]) -> float:
    """Seconds for which a rank is held up by a message to its neighbour."""
    if layout.pipeline == 1:
        return 0.0
    stream = next(op for op in graph.forward if is_layer(op))
    size = float(stream.spec.reads(stream.sized(step))) / layout.tensor
    on = wire(group, layout.tensor * layout.data, layout.pipeline, c["network"], members=1)
    send = Op("send", "send", {"elements": size, "ranks": 2}, act=stream.act)
    return float(op_time(send, Step.train(1, 1), on).seconds) * c["pipeline"] + c["message_us"] * 1e-6


def _finish(tasks: list[Task], group: Cluster, layout: Layout, parameters: Sequence[float], layers: float) -> None:
    """Add what follows: exchanges of gradients, beside the last backward pass if they overlap, and updates."""
    c, once = constants(), Step.train(1, 1)
    on = wire(group, layout.tensor, layout.data, c["network"])
    place, lanes = {task.name: i for i, task in enumerate(tasks)}, dict[Any, list[int]]()
    for i, task in enumerate(tasks):
        lanes.setdefault(task.resource, []).append(i)
    before = {i: ((j, 0.0),) for lane in lanes.values() for j, i in pairwise(lane)}
    for rank in range(layout.pipeline):
        ready: list[Need] = []
        mine = range(rank, len(parameters), layout.pipeline)
        for stage in reversed(mine) if layout.data > 1 else ():
            last = place[Pass("B", stage, layout.accumulate - 1)]
            parts = max(round(layers), 1) if layout.overlap else 1
            exchange = Op("gradients", "all_reduce", {"elements": parameters[stage] / parts, "ranks": layout.data}, act=FP16)
            seconds = float(op_time(exchange, once, on).seconds)
            for part in range(parts):
                done = last
                if part < parts - 1:  # a layer's gradients are there when its part of the backward pass is over
                    so_far, needs = tasks[last].seconds * (part + 1) / parts, (*tasks[last].needs, *before.get(last, ()))
                    tasks.append(Task(f"layer {stage}.{part}", "layer", None, so_far, needs))
                    done = len(tasks) - 1
                tasks.append(Task(f"gradients {stage}.{part}", "all_reduce", f"network {rank}", seconds, ((done, 0.0),), part))
                ready.append((len(tasks) - 1, 0.0))
        update = Op("update", "optimizer", {"elements": sum(parameters[s] for s in mine), "states": STATES}, act=FP16)
        seconds = float(op_time(update, once, group.machine).seconds) + c["step_ms"] * 1e-3
        tasks.append(Task(f"update {rank}", "update", rank, seconds, tuple(ready)))


def _part(op: Op, first: set[str]) -> int:
    """Whether an op comes before the layers (0), lies in them (1) or comes after (2)."""
    return 1 if is_layer(op) else 0 if op.name.partition(" ")[0] in first else 2


def _passes(ops: Sequence[Op], timed: _Timed, recompute: str) -> tuple[float, float]:
    """Seconds forward, and backward with what is computed again."""
    forward = [op for op in ops if op.phase == "forward" and op.kind != "checkpoint"]
    core = {op.name for op in forward if op.kind in ATTENTION or (op.kind == "matmul" and op.split == "heads")}
    again = [
        op
        for op in forward
        if recompute == "full" or ((op.name.rpartition(".")[0] in core or op.name in core) and recompute != "none")
    ]
    return timed(forward), timed([op for op in ops if op.phase == "backward"]) + timed(again)


def _parameters(op: Op, apart: bool) -> float:
    """Parameters that the device of an op holds: those that it owns, and a copy of the tied ones where the owner is apart."""
    tied = bool(op.tied) and apart and op.phase == "forward"
    return float(op.spec.parameters(dict(op.dims))) * op.repeat if tied else op.parameters
