"""What an op costs in work (an addable vector), and the named causes that its time is split into (see `costmodel`)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from narrows.graph import Graph, Op
from narrows.step import Amount, Step


class Limit(StrEnum):
    """The resource that holds a step back."""

    COMPUTE = "compute"
    BANDWIDTH = "bandwidth"
    CAPACITY = "capacity"
    COMMUNICATION = "communication"
    STORAGE = "storage"
    LAUNCH = "launch"
    SCHEDULING = "scheduling"
    ENERGY = "energy"


# Every cause in a ledger, and the limit that it counts towards. Widening the limit shrinks its causes.
CAUSES: dict[str, Limit] = {
    "arithmetic": Limit.COMPUTE,  # FLOP at the datasheet's peak
    "partial tiles": Limit.COMPUTE,  # rows, columns and units that a tile or a wave leaves idle
    "below peak": Limit.COMPUTE,  # what a good kernel loses against the datasheet
    "weights": Limit.BANDWIDTH,
    "cache": Limit.BANDWIDTH,
    "activations": Limit.BANDWIDTH,
    "optimizer states": Limit.BANDWIDTH,
    "communication": Limit.COMMUNICATION,
    "launch": Limit.LAUNCH,  # the device waits for the host, or for a kernel to start
}


@dataclass(frozen=True)
class Cost:
    """Work, never a time: FLOP, bytes of main memory by what they hold, bytes sent, kernel launches. Addable.

    Each is a number, or an array over the points of a Step.
    """

    flop: Amount = 0.0
    weight_bytes: Amount = 0.0
    cache_bytes: Amount = 0.0
    input_bytes: Amount = 0.0
    state_bytes: Amount = 0.0
    write_bytes: Amount = 0.0
    link_bytes: Amount = 0.0
    launches: Amount = 0.0

    @property
    def read_bytes(self) -> Amount:
        return self.weight_bytes + self.cache_bytes + self.input_bytes + self.state_bytes

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> "Cost":
        return Cost(*(getattr(self, f.name) * times for f in fields(self)))


def cost(op: Op, step: Step, eager: bool = False) -> Cost:
    """The work of one op over all its repeats, at a step.

    `eager` runs every operator of a fused op as its own kernel: each reads and writes what the fused one keeps
    in registers. A backward pass costs the multiples of the forward that its kind states.
    """
    return cost_of(op, op.sized(step), eager, step.serves)


def cost_of(op: Op, dims: Mapping[str, Any], eager: bool = False, serves: bool = False) -> Cost:
    """`cost` for dims given as numbers or arrays, whatever the op's own are; `serves` where keys and values are kept."""
    kind, many = op.spec, op.repeat
    flop, reads, writes = kind.flop(dims), kind.reads(dims), kind.writes(dims)
    weights = op.stored_bytes * kind.touched(dims)
    cache_reads, cache_writes = kind.cache_reads(dims), kind.cache_writes(dims) if serves else 0.0
    cache_dtype = op.cache or op.act
    written, states = cache_writes * cache_dtype.bits / 8, 0.0
    if op.phase == "backward":
        flop, traffic = flop * kind.backward[0], kind.backward[1]
        reads, writes, written = reads * traffic, writes * traffic, weights  # the weights' gradient is written
    if eager and op.kind in ("norm", "elementwise"):
        reads, writes = reads + (op.kernels - 1) * writes, op.kernels * writes
    if op.kind == "optimizer":  # gradient and states are read; states and weight are written (states are fp32)
        states = dims["elements"] * (op.act.bits / 8 + 4 * dims["states"])
        written = dims["elements"] * (op.act.bits / 8 + 4 * dims["states"])
    width = op.act.bits / 8
    return Cost(
        flop=flop * many,
        weight_bytes=weights * many,
        cache_bytes=cache_reads * cache_dtype.bits / 8 * many,
        input_bytes=reads * width * many,
        state_bytes=states * many,
        write_bytes=(writes * width + written) * many,
        link_bytes=kind.link(dims) * width * many,
        launches=float(op.kernels if eager else op.kind != "checkpoint") * many,
    )


def total(graph: Graph, step: Step) -> Cost:
    """The work of a whole graph at a step."""
    return sum((cost(op, step, graph.eager) for op in graph), Cost())
