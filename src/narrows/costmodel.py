"""How long a machine needs for an op: its work against what that class of kernel reaches on that generation of hardware.

The constants lie in `data/efficiency.toml`; `bench/fit_efficiency.py` fits them on one half of published measurements
and `narrows validate` reports the error on the other. A machine's own calibrated `efficiency` comes before them.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from narrows.cost import Cost, cost
from narrows.graph import FP16, DType, Op, Size
from narrows.kinds import COLLECTIVES
from narrows.machine import Machine
from narrows.step import Amount, Step

WIDE = 8192  # a longer row does not stay in registers between the statistics of a norm and its use: it is read twice
ONE_SHOT = 8e6  # bytes up to which engines reduce with a kernel of their own instead of NCCL: an assumption
ATTENTION = ("attention", "latent_attention")


@dataclass(frozen=True, slots=True)
class Achieved:
    """A fitted constant, mostly a fraction of the datasheet's peak: its median, and the 10 % and 90 % quantile.

    `rows` measurements of the machine's own generation stand behind it: none where it is an assumption. `source`
    says in words where it was found.
    """

    median: float
    low: float
    high: float
    rows: int = 0
    source: str = "nothing known: taken as 1"


@cache
def fitted() -> dict[str, Any]:
    """The fitted constants by generation (`hopper`), kind (`gpu`) or `any`, each with its provenance."""
    return tomllib.loads(files("narrows.data").joinpath("efficiency.toml").read_text("utf-8"))


@cache
def generation(name: str) -> str:
    """The hardware generation of a machine by its name (`h100-sxm` is `hopper`), or '' where none is known."""
    named = fitted()["generations"]
    return next((g for g, starts in named.items() if any(name == s or name.startswith(f"{s}-") for s in starts)), "")


_known: dict[tuple[Any, ...], Achieved] = {}


def forget() -> None:
    """Drop what is cached of the constants, after `fitted()` was changed (only a fit does that)."""
    _known.clear()


def achieved(machine: Machine, what: str) -> Achieved:
    """The machine's own calibrated constant for `what`, else the one fitted for its generation, its kind, or any machine.

    `what` is a class of kernel, and may name the formats of weights and activations: `matmul-int4-bf16` falls back to
    `matmul-int4` and that to `matmul`, each within one source before the next source is asked.
    """
    key = (machine.name, machine.kind, machine.efficiency, what)
    if key not in _known:
        _known[key] = _find(machine.efficiency, machine.name, machine.kind, what)
    return _known[key]


def _find(own: Mapping[str, Any], name: str, kind: str, what: str) -> Achieved:
    parts = what.split("-")
    tables, family = fitted(), generation(name)
    for place, source in (("own", own), (family, tables.get(family, {})), (kind, tables.get(kind, {})), ("any", tables["any"])):
        for count in range(len(parts), 0, -1):
            found = source.get("-".join(parts[:count]))
            if found:
                rows = 1 if place == "own" else found.get("rows", 0) if place == family else 0
                basis = f"{found['rows']} rows of {found['data']}" if "rows" in found else found.get("data", "assumption")
                said = "given with this machine" if place == "own" else f"{place}: {basis}"
                return Achieved(found["median"], found["low"], found["high"], rows, said)
    return Achieved(1.0, 1.0, 1.0)


def tile_use(rows: Any, outputs: Any, matrices: Any, machine: Machine) -> Any:
    """The share of the matrix units' work that is not padding: the best over the tile sizes a library offers.

    A tile computes all its rows and columns even if the matrix ends inside it, and a last wave of tiles keeps all
    units waiting. Smaller tiles waste less and reuse less: each halving of a side below the machine's full tile
    costs a tenth. `rows` x `outputs` per matrix.
    """
    rows, outputs, matrices = (np.asarray(v, dtype=np.float64) for v in (rows, outputs, matrices))
    best: Any = 0.0
    tile_rows, tile_outputs, units = *machine.tile, machine.units
    work = rows * outputs * matrices
    sides_down = [max(tile_rows >> h, min(tile_rows, 8)) for h in range(4)]
    sides_across = [max(tile_outputs >> h, min(tile_outputs, 8)) for h in range(3)]
    down = [np.ceil(rows / side) * matrices for side in sides_down]
    across = [np.ceil(outputs / side) for side in sides_across]
    for h_rows, tiles_down in enumerate(down):
        for h_outputs, tiles_across in enumerate(across):
            tiles = np.maximum(tiles_down * tiles_across, 1.0)
            area = units * sides_down[h_rows] * sides_across[h_outputs]
            useful = work / (np.ceil(tiles / units) * area)
            split = np.maximum(1.0, np.floor(units / tiles))  # few tiles: cut the inner dimension as well
            best = np.maximum(best, np.minimum(useful * split, 1.0) * 0.9 ** (h_rows + h_outputs))
    return np.where(rows > 0, best, 1.0)[()]


@dataclass(frozen=True)
class OpTime:
    """Seconds of one op over its repeats by cause (their sum is the time), and the sum at both ends of its 80 % interval.

    `inside`: constants of this class were fitted on measurements of this generation (or on the machine itself).
    """

    causes: dict[str, Amount]
    low: Amount
    high: Amount
    inside: bool = True

    @property
    def seconds(self) -> Amount:
        return sum(self.causes.values(), 0.0)


def op_time(op: Op, step: Step, machine: Machine, eager: bool = False) -> OpTime:
    """How long a machine needs for an op: its slowest resource, plus what a launch adds.

    A kernel is bound by its arithmetic, its memory traffic or its link, whichever takes longest, and the two
    others hide behind it. On top comes the fixed time of a kernel; in eager mode the device waits whenever the
    host needs longer to launch than the device to compute. The interval comes from the spread of the fitted
    constants (`achieved`), taken as fully correlated between ops, which is the cautious reading.
    """
    if op.kind == "checkpoint":
        return OpTime({}, 0.0, 0.0)
    work, dims = cost(op, step, eager), op.sized(step)
    compute, memory, link = constants(op, machine)
    ideal = work.flop / peak(op, machine)
    used = useful(op, dims, machine)
    traffic = {
        "weights": work.weight_bytes,
        "cache": work.cache_bytes,
        "activations": work.input_bytes + work.write_bytes * (op.kind != "optimizer"),
        "optimizer states": work.state_bytes + work.write_bytes * (op.kind == "optimizer"),
    }
    all_moved = sum(traffic.values(), 0.0)
    moved = all_moved / machine.memory.bandwidth_bytes_per_s
    sent, latency = _wire(op, dims, work, machine, eager)
    floor, fixed = _launch(work, machine, eager)

    def at(c: float, m: float, k: float) -> tuple[Any, Any, Any, Any]:
        busy_c, busy_m, busy_l = ideal / (used * c), moved / m, sent / k + latency
        body = np.maximum(np.maximum(busy_c, busy_m), busy_l)
        return busy_c, busy_m, body, np.maximum(body + fixed, floor)

    busy_c, busy_m, body, whole = at(compute.median, memory.median, link.median)
    is_compute = busy_c >= body
    is_memory = (
        ~is_compute & (busy_m >= body) if isinstance(is_compute, np.ndarray) else (not is_compute) and bool(busy_m >= body)
    )
    share = body / np.maximum(all_moved, 1e-300) * is_memory
    causes: dict[str, Amount] = {
        "arithmetic": ideal * is_compute,
        "partial tiles": ideal * (1 / used - 1) * is_compute,
        "below peak": ideal / used * (1 / compute.median - 1) * is_compute,
        **{name: share * bytes_ for name, bytes_ in traffic.items()},
        "communication": body * (1.0 - is_compute - is_memory),
        "launch": whole - body,
    }
    return OpTime(
        {k: v for k, v in causes.items() if np.any(v)},
        at(compute.high, memory.high, link.high)[3],
        at(compute.low, memory.low, link.low)[3],
        bool((link if op.kind in COLLECTIVES else compute if np.all(is_compute) else memory).rows),
    )


def peak(op: Op, machine: Machine) -> float:
    """The datasheet's FLOP/s that bound an op: of the matrix units in its dtype, or of plain fp32."""
    return machine.peak(op.compute or op.act.name) if op.spec.matmul else machine.peak("fp32")


def constants(op: Op, machine: Machine) -> tuple[Achieved, Achieved, Achieved]:
    """What an op's class of kernel reaches of the peak in arithmetic, of the memory's bandwidth and of the link's."""
    weight = f"-{_name(op.weight or op.act)}-{_name(op.act)}"
    return achieved(machine, _class(op) + weight), achieved(machine, _stream(op, weight)), achieved(machine, "link")


def _class(op: Op) -> str:
    if op.kind in ATTENTION:
        return "attention"
    if op.kind == "conv":
        return "matmul-conv"  # falls back to matmul where no convolution was measured
    return "matmul" if op.spec.matmul else "vector"


def _name(dtype: DType) -> str:
    return "bf16" if dtype == FP16 else dtype.name  # the same kernels


def _stream(op: Op, weight: str) -> str:
    """Which kernel's share of the memory bandwidth counts: weights are streamed, norms and pointwise ops have their own."""
    if op.spec.matmul or op.kind == "embedding":
        return "memory" + weight if op.weight else "memory"
    if op.kind != "norm":
        return "memory-pointwise"
    width = op["width"]
    return "memory-norm-wide" if not isinstance(width, Size) and width > WIDE else "memory-norm"


def aligned(machine: Machine, *sizes: Any) -> Any:
    """What a matrix product keeps of its speed where a row does not begin on a multiple of 8 elements.

    Matrix units of a GPU load 16 bytes at a time; a head of 108 falls back to kernels that
    load less (in BLOOM's tuning log a head of 108 costs a third of a whole step; `unaligned` is fitted on that log).
    """
    if machine.kind != "gpu":
        return 1.0
    loss = achieved(machine, "unaligned").median
    kept: Any = 1.0
    for size in sizes:
        kept = kept * np.where(np.asarray(size) % 8 == 0, 1.0, loss)
    return kept[()] if isinstance(kept, np.ndarray) else kept


def useful(op: Op, dims: dict[str, Any], machine: Machine) -> Any:
    """The share of the matrix units' work that its shape leaves useful, with `dims` from `Op.sized`."""
    if op.kind in ("linear", "matmul"):
        kept = tile_use(dims["rows"] / dims["matrices"], dims["outputs"], dims["matrices"], machine)
        # fitted on products of heads alone: libraries copy a weight of odd width into an even one, which costs little
        return kept * aligned(machine, dims["inputs"], dims["outputs"]) if op.kind == "matmul" else kept
    if op.kind == "expert":
        touched = np.maximum(op.spec.touched(dims) * dims["experts"], 1.0)
        return tile_use(dims["rows"] * dims["top_k"] / touched, dims["outputs"], touched, machine)
    if op.kind == "conv":
        if dims["groups"] > 1 and dims["in_channels"] == dims["groups"]:
            return np.minimum(1.0, 1.0 / 8)  # depthwise: one input channel an output, the matrix units hold eight or more
        return tile_use(dims["positions"], dims["out_channels"] / dims["groups"], dims["groups"], machine)
    if op.kind == "attention":
        return _attention_use(dims, machine)
    return 1.0


def _attention_use(dims: dict[str, Any], machine: Machine) -> Any:
    """How narrow heads and short rows of keys slow fused attention: exponentials and start-up hide behind longer products.

    d / (d + head0) x L / (L + keys0), with d the head's size and L = pairs / queries the keys that a query meets on
    average (half of T under the causal mask).
    """
    head, keys = achieved(machine, "attention_head").median, achieved(machine, "attention_keys").median
    wide = dims["head_dim"] + dims["value_dim"]
    met = dims["pairs"] / np.maximum(dims["queries"], 1.0)
    return wide / (wide + 2 * head) * met / (met + keys)


def _launch(work: Cost, machine: Machine, eager: bool) -> tuple[Any, Any]:
    """Seconds that the host needs for the op's launches where it launches each, and the fixed device time of its kernels."""
    start = work.launches * machine.kernel_seconds * achieved(machine, "kernel").median
    if machine.kind == "cpu":
        return 0.0, work.launches * machine.launch_seconds
    return (
        work.launches * machine.launch_seconds * achieved(machine, "launch").median if eager and machine.kind == "gpu" else 0.0
    ), start


# messages one after another in a ring of `ranks`; small messages of an all-reduce go up and down a tree instead
_HOPS = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}


def _wire(op: Op, dims: dict[str, Any], work: Cost, machine: Machine, eager: bool) -> tuple[Any, Any]:
    """Seconds on the wire at the link's peak, and the latency of the collective, over all repeats.

    Latency grows with the messages that follow each other; but serving engines and compilers sum small messages in one
    kernel that reads all peers at once. Below `ramp` bytes a link runs a protocol that trades bandwidth for latency,
    which reads as that many more bytes the larger the message becomes, up to `ramp`.
    """
    wire = machine.link or machine.host_link
    if op.kind not in COLLECTIVES or wire is None:
        return 0.0 * work.flop, 0.0
    base, hop, ramp, once = (achieved(machine, f"link_{name}").median for name in ("base", "hop", "ramp", "one_shot"))
    each = work.link_bytes / op.repeat
    extra = each * ramp / (each + ramp)
    follow: Any = base + hop * (_HOPS[op.kind] * (dims["ranks"] - 1) if op.kind in _HOPS else 1.0)
    if op.kind == "all_reduce" and not eager:
        follow = np.where(each < ONE_SHOT, np.minimum(once, follow), follow)[()]
    return (each + extra) * op.repeat / wire.bandwidth_bytes_per_s, follow * wire.latency_seconds * op.repeat
