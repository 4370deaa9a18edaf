"""Cutting a network into pipeline stages of equal time, and what each of them takes on a machine."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, groupby
from typing import NamedTuple

from narrows.backward import training
from narrows.costmodel import op_time
from narrows.errors import NarrowsError
from narrows.graph import Graph, Op, at
from narrows.machine import Machine
from narrows.simulate.pipeline import Work
from narrows.step import Step


class _Unit(NamedTuple):
    """What is not cut any further: a layer, or an op outside the layers. Seconds of F, I and W; bytes kept and handed on."""

    forward: float
    inputs: float
    weights: float
    held_bytes: float
    elements: float

    @property
    def seconds(self) -> float:
        return self.forward + self.inputs + self.weights


def cut(graph: Graph, machine: Machine, step: Step, stages: int, microbatches: int) -> Work:
    """The work of a training step of `microbatches` times `step` over `stages` devices, each a machine of its own.

    Stages are runs of whole layers whose slowest takes the least time. Half of the backward pass of a product with
    weights is W, and all of an embedding's. Raises NarrowsError for more stages than layers.
    """
    units = _units(graph, machine, step)
    if not 1 <= stages <= len(units):
        raise NarrowsError(f"{stages} stages of {len(units)} layers.", where=f"stages: {graph.name}",
                           remedy="Give one at least, and no more stages than layers.")  # fmt: skip
    parts = _balanced(units, stages)
    act, message = graph.ops[-1].act, 0.0
    handed = [0.0, *(part[-1].elements for part in parts[:-1])]
    if machine.link is not None and stages > 1:
        send = Op("send", "send", {"elements": max(handed), "ranks": 2}, act=act)
        message = float(op_time(send, step, machine).seconds)
    forward, inputs, weights, held = (
        [sum(getattr(unit, name) for unit in part) for part in parts] for name in ("forward", "inputs", "weights", "held_bytes")
    )
    return Work.of(
        stages,
        microbatches,
        forward,
        inputs,
        weights,
        message,
        held,
        input_bytes=[count * act.bits / 8 for count in handed],
    )


def _units(graph: Graph, machine: Machine, step: Step) -> list[_Unit]:
    found: list[_Unit] = []
    ops = [op for op in training(graph).forward if op.kind != "checkpoint"]
    for repeat, group in groupby(ops, key=lambda op: op.repeat):
        each = [_unit(op, machine, step) for op in group]
        if repeat == 1:
            found += each
        else:
            forward, inputs, weights, held = (sum(unit[i] for unit in each) for i in range(4))
            found += [_Unit(forward, inputs, weights, held, each[-1].elements)] * repeat
    return found


def _unit(op: Op, machine: Machine, step: Step) -> _Unit:
    single = replace(op, repeat=1)
    ahead, back = (float(op_time(replace(single, phase=phase), step, machine).seconds) for phase in ("forward", "backward"))
    share = 1.0 if op.kind == "embedding" else 0.5 if op.spec.matmul and op.parameters else 0.0
    held = float(at(op.saved, step)) * op.act.bits / 8
    return _Unit(ahead, back * (1 - share), back * share, held, float(op.spec.writes(op.sized(step))))


def _balanced(units: Sequence[_Unit], stages: int) -> list[list[_Unit]]:
    """The units in `stages` runs of which the slowest takes the least."""
    ends = [0.0, *accumulate(unit.seconds for unit in units)]
    best = [[0.0 if i == 0 else float("inf") for i in range(len(units) + 1)]]
    came: list[list[int]] = []
    for _ in range(stages):
        row, steps = [float("inf")] * (len(units) + 1), [0] * (len(units) + 1)
        for i in range(1, len(units) + 1):
            for j in range(i - 1, -1, -1):  # the last run grows to the left: no use once it is the slowest
                own = ends[i] - ends[j]
                slowest = max(best[-1][j], own)
                if slowest < row[i]:
                    row[i], steps[i] = slowest, j
                if own >= row[i]:
                    break
        best.append(row)
        came.append(steps)
    parts, i = list[list[_Unit]](), len(units)
    for steps in reversed(came):
        parts.append(list(units[steps[i] : i]))
        i = steps[i]
    return parts[::-1]
