"""How many bytes a step needs at its peak, by what they hold, and whether they fit a machine."""

import math
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any

import numpy as np

from narrows.backward import training
from narrows.graph import Graph, Op, at
from narrows.machine import Machine
from narrows.step import Amount, Step


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak of a step; numbers, or arrays over the step's points."""

    weights_bytes: Amount = 0.0
    kv_bytes: Amount = 0.0
    activation_bytes: Amount = 0.0
    gradient_bytes: Amount = 0.0
    optimizer_bytes: Amount = 0.0
    temporary_bytes: Amount = 0.0

    @property
    def total_bytes(self) -> Amount:
        return sum((getattr(self, f.name) for f in fields(self)), 0.0)

    def fits(self, machine: Machine) -> Any:
        """Whether the whole fits the machine's main memory: a bool, or an array of them for an array of points."""
        return self.total_bytes <= machine.memory.capacity_bytes


def footprint(graph: Graph, step: Step) -> Footprint:
    """The peak of a step.

    weights      as stored, every expert included
    kv           keys, values and states held after a step that serves; scoring and training keep none
    activations  for training, what forward (with the loss) keeps for backward: a segment that is recomputed counts
                 once for all segments, beside its boundaries; otherwise the most that is alive at once
    gradients, optimizer   for training: a gradient in the weight's dtype, fp32 states and master copy
    temporary    for training, what the largest op reads and writes: as much as its gradients
    """
    if step.phase != "train":
        caching = graph.forward if step.serves else ()
        held: Any = sum((op.spec.held(op.sized(step)) * op.repeat * (op.cache or op.act).bits / 8 for op in caching), 0.0)
        return Footprint(graph.weight_bytes, held, activation_bytes=_alive(graph.forward, step))
    whole = training(graph)
    kept: Any = sum(at(op.saved, step) * op.act.bits / 8 * op.repeat / max(op.segments, 1) for op in whole.forward)
    update = [(op, float(op["elements"])) for op in whole if op.kind == "optimizer"]  # type: ignore[arg-type]
    return Footprint(
        weights_bytes=graph.weight_bytes,
        activation_bytes=kept,
        gradient_bytes=math.fsum(n * op.act.bits / 8 for op, n in update),
        optimizer_bytes=math.fsum(n * 4 * float(op["states"]) for op, n in update),  # type: ignore[arg-type]
        temporary_bytes=_largest(whole.forward, step),
    )


def _largest(ops: tuple[Op, ...], step: Step) -> Any:
    """Bytes that the op with most of them reads and writes."""
    sizes = [(op, op.sized(step)) for op in ops]
    return reduce(np.maximum, ((op.spec.reads(d) + op.spec.writes(d)) * (op.act.bits / 8) for op, d in sizes), 0.0)


def _alive(ops: tuple[Op, ...], step: Step) -> Any:
    """The most bytes of results that are alive at once: an op's own, and each that a later op still reads."""
    ends, readers = [0] * len(ops), dict[str, int]()
    for i, op in reversed(
        list(enumerate(ops))
    ):  # a folded layer has the names of the one before it: readers up to the next writer
        ends[i] = readers.pop(op.name, i)
        for name in op.inputs:
            readers.setdefault(name, i)
    most, alive = _largest(ops, step), dict[int, Any]()
    for i, op in enumerate(ops):
        alive[i] = op.spec.writes(op.sized(step)) * (op.act.bits / 8)
        most = np.maximum(most, sum(alive.values()))
        alive = {j: size for j, size in alive.items() if ends[j] > i}
    return most
