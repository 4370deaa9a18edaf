"""What an op costs in work (an addable vector), and how long a machine needs for it, split into named causes."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from narrows.graph import Graph, Op
from narrows.kinds import COLLECTIVES
from narrows.machine import Machine
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
    kind, dims = op.spec, op.sized(step)
    flop, reads, writes = kind.flop(dims), kind.reads(dims), kind.writes(dims)
    weights = op.stored_bytes * kind.touched(dims)
    cache_reads, cache_writes = kind.cache_reads(dims), kind.cache_writes(dims)
    cache_dtype = op.cache or op.act
    written, states = cache_writes * cache_dtype.bits / 8, 0.0
    if op.phase == "backward":
        flop, traffic = flop * kind.backward[0], kind.backward[1]
        reads, writes, written = reads * traffic, writes * traffic, weights  # the weights' gradient is written
    if eager and kind.flop and op.kind in ("norm", "elementwise"):
        reads, writes = reads + (op.kernels - 1) * writes, op.kernels * writes
    if op.kind == "optimizer":  # gradient and states are read; states and weight are written (states are fp32)
        states = dims["elements"] * (op.act.bits / 8 + 4 * dims["states"])
        written = dims["elements"] * (op.act.bits / 8 + 4 * dims["states"])
    width = op.act.bits / 8
    once = Cost(
        flop=flop,
        weight_bytes=weights,
        cache_bytes=cache_reads * cache_dtype.bits / 8,
        input_bytes=reads * width,
        state_bytes=states,
        write_bytes=writes * width + written,
        link_bytes=kind.link(dims) * width,
        launches=float(op.kernels if eager else op.kind != "checkpoint"),
    )
    return once * op.repeat


def total(graph: Graph, step: Step) -> Cost:
    """The work of a whole graph at a step."""
    return sum((cost(op, step, graph.eager) for op in graph), Cost())


@dataclass(frozen=True)
class Achieved:
    """The fraction of a datasheet's peak that good kernels reach: its median, and the 10 % and 90 % quantile."""

    median: float
    low: float
    high: float


@cache
def _fitted() -> Mapping[str, Any]:
    return tomllib.loads(files("narrows.data").joinpath("efficiency.toml").read_text("utf-8"))


def achieved(machine: Machine, what: str) -> Achieved:
    """The machine's own calibrated fraction of peak for `what`, else the one fitted for its kind of machine.

    `what` is matmul, attention, vector, memory or link, and may name the formats of weights and activations:
    `matmul-int4-bf16` falls back to `matmul-int4` and that to `matmul`.
    """
    parts = what.split("-")
    for source in (machine.efficiency, _fitted().get(machine.kind, {}), _fitted()["any"]):
        for count in range(len(parts), 0, -1):
            found = source.get("-".join(parts[:count]))
            if found:
                return Achieved(found["median"], found["low"], found["high"])
    return Achieved(1.0, 1.0, 1.0)


def tile_use(rows: Any, outputs: Any, matrices: Any, machine: Machine) -> Any:
    """The share of the matrix units' work that is not padding: the best over the tile sizes a library offers.

    A tile computes all its rows and columns even if the matrix ends inside it, and a last wave of tiles keeps all
    units waiting. Smaller tiles waste less and reuse less: each halving of a side below the machine's full tile
    costs a tenth. `rows` x `outputs` per matrix.
    """
    best = np.zeros(())
    tile_rows, tile_outputs = machine.tile
    for halvings_r in range(4):
        for halvings_o in range(3):
            tr, to = max(tile_rows >> halvings_r, 8), max(tile_outputs >> halvings_o, 8)
            tiles = np.maximum(np.ceil(rows / tr) * np.ceil(outputs / to) * matrices, 1.0)
            waves = np.ceil(tiles / machine.units)
            useful = rows * outputs * matrices / (waves * machine.units * tr * to)
            split = np.maximum(1.0, np.floor(machine.units / tiles))  # few tiles: cut the inner dimension as well
            best = np.maximum(best, np.minimum(useful * split, 1.0) * 0.9 ** (halvings_r + halvings_o))
    return np.where(np.asarray(rows) > 0, best, 1.0)[()]


@dataclass(frozen=True)
class OpTime:
    """Seconds of one op over its repeats by cause (their sum is the time), and the sum at both ends of its interval."""

    causes: dict[str, Amount]
    low: Amount
    high: Amount

    @property
    def seconds(self) -> Amount:
        return sum(self.causes.values(), 0.0)


def op_time(op: Op, step: Step, machine: Machine, eager: bool = False) -> OpTime:
    """How long a machine needs for an op: its slowest resource, plus what a launch adds.

    A kernel is bound by its arithmetic, its memory traffic or its link, whichever takes longest, and the two
    others hide behind it. On top comes the fixed time of a kernel; in eager mode the device waits whenever the
    host needs longer to launch than the device to compute. The interval comes from the spread of the achieved
    fractions (`achieved`), taken as fully correlated between ops, which is the cautious reading.
    """
    if op.kind == "checkpoint":
        return OpTime({}, 0.0, 0.0)
    work, dims, n = cost(op, step, eager), op.sized(step), float(op.repeat)
    weight = f"-{(op.weight or op.act).name}-{op.act.name}"
    compute, memory, link = achieved(machine, _unit(op) + weight), achieved(machine, "memory" + weight), achieved(machine, "link")
    peak = machine.peak(op.compute or op.act.name) if op.spec.matmul else machine.peak("fp32")
    ideal = work.flop / peak
    used = _used(op, dims, machine)
    traffic = {
        "weights": work.weight_bytes,
        "cache": work.cache_bytes,
        "activations": work.input_bytes + work.write_bytes * (op.kind != "optimizer"),
        "optimizer states": work.state_bytes + work.write_bytes * (op.kind == "optimizer"),
    }
    moved = sum(traffic.values(), 0.0) / machine.memory.bandwidth_bytes_per_s
    wire = machine.link or machine.host_link
    sent = work.link_bytes / wire.bandwidth_bytes_per_s if op.kind in COLLECTIVES and wire else 0.0 * work.flop
    latency = _latency(op, dims, machine) * n
    if eager and machine.kind == "gpu":
        floor, fixed = work.launches * machine.launch_seconds, work.launches * machine.kernel_seconds
    else:
        floor, fixed = 0.0, work.launches * (machine.launch_seconds if machine.kind == "cpu" else machine.kernel_seconds)

    def at(c: float, m: float, k: float) -> tuple[Any, Any, Any, Any]:
        busy_c, busy_m, busy_l = ideal / (used * c), moved / m, sent / k + latency
        body = np.maximum(np.maximum(busy_c, busy_m), busy_l)
        return busy_c, busy_m, body, np.maximum(body + fixed, floor)

    busy_c, busy_m, body, whole = at(compute.median, memory.median, link.median)
    is_compute = busy_c >= body
    is_memory = ~is_compute & (busy_m >= body) if isinstance(is_compute, np.ndarray) else (not is_compute) and bool(busy_m >= body)
    all_moved = np.maximum(sum(traffic.values(), 0.0), 1e-300)
    causes: dict[str, Amount] = {
        "arithmetic": ideal * is_compute,
        "partial tiles": ideal * (1 / used - 1) * is_compute,
        "below peak": ideal / used * (1 / compute.median - 1) * is_compute,
        **{name: body * (bytes_ / all_moved) * is_memory for name, bytes_ in traffic.items()},
        "communication": body * (1.0 - is_compute - is_memory),
        "launch": whole - body,
    }
    return OpTime(
        {k: v for k, v in causes.items() if np.any(v)},
        at(compute.high, memory.high, link.high)[3],
        at(compute.low, memory.low, link.low)[3],
    )


def _unit(op: Op) -> str:
    if op.kind in ("attention", "latent_attention"):
        return "attention"
    return "matmul" if op.spec.matmul else "vector"


def _used(op: Op, dims: dict[str, Any], machine: Machine) -> Any:
    if op.kind in ("linear", "matmul"):
        return tile_use(dims["rows"] / dims["matrices"], dims["outputs"], dims["matrices"], machine)
    if op.kind == "expert":
        touched = np.maximum(op.spec.touched(dims) * dims["experts"], 1.0)
        return tile_use(dims["rows"] * dims["top_k"] / touched, dims["outputs"], touched, machine)
    if op.kind == "conv":
        if dims["groups"] > 1 and dims["in_channels"] == dims["groups"]:
            return np.minimum(1.0, 1.0 / 8)  # depthwise: one input channel an output, the matrix units hold eight or more
        return tile_use(dims["positions"], dims["out_channels"] / dims["groups"], dims["groups"], machine)
    return 1.0


def _latency(op: Op, dims: dict[str, Any], machine: Machine) -> Any:
    wire = machine.link or machine.host_link
    if op.kind not in COLLECTIVES or wire is None:
        return 0.0
    hops = {"all_reduce": 2 * (dims["ranks"] - 1), "send": 1}.get(op.kind, dims["ranks"] - 1)
    return hops * wire.latency_seconds


