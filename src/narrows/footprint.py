"""How many bytes a step needs at its peak, by what they hold, and whether they fit a machine."""

from dataclasses import dataclass, fields

import numpy as np

from narrows.backward import training
from narrows.graph import Graph, at
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

    def fits(self, machine: Machine) -> Amount:
        """Whether the whole fits the machine's main memory (an array of bools for an array of points)."""
        return self.total_bytes <= machine.memory.capacity_bytes


def footprint(graph: Graph, step: Step) -> Footprint:
    """The peak of a step.

    weights      as stored, every expert included
    kv           keys, values and states held after the step
    activations  for training, what forward keeps for backward: a segment that is recomputed counts once for all
                 segments, beside its boundaries; otherwise the residual stream and the largest op's input and output
    gradients, optimizer   for training: a gradient in the weight's dtype, fp32 states and master copy
    temporary    for training, the largest op's output and its gradient
    """
    largest, held, kept = 0.0, 0.0, 0.0
    for op in graph:
        dims, width = op.sized(step), op.act.bits / 8
        if op.phase == "forward":
            largest = np.maximum(largest, (op.spec.reads(dims) + op.spec.writes(dims)) * width)
            held = held + op.spec.held(dims) * op.repeat * (op.cache or op.act).bits / 8
            kept = kept + at(op.saved, step) * width * op.repeat / max(op.segments, 1)
    largest = float(largest) if np.ndim(largest) == 0 else largest
    if step.phase != "train":
        return Footprint(graph.weight_bytes, held, activation_bytes=largest)
    update = [op for op in training(graph) if op.kind == "optimizer"]
    elements = [(op, float(op["elements"])) for op in update]  # type: ignore[arg-type]
    return Footprint(
        weights_bytes=graph.weight_bytes,
        kv_bytes=0.0,
        activation_bytes=kept,
        gradient_bytes=sum(n * op.act.bits / 8 for op, n in elements),
        optimizer_bytes=sum(n * 4 * float(op["states"]) for op, n in elements),  # type: ignore[arg-type]
        temporary_bytes=largest,
    )
