"""How long a machine needs for an op: its work against what that class of kernel reaches on that generation of hardware.

The constants lie in `data/efficiency.toml`; `bench/fit_efficiency.py` fits them on one half of published measurements
and `narrows validate` reports the error on the other. A machine's own calibrated `efficiency` comes before them.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from narrows.cost import CAUSES, Cost, Limit, cost_of
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

    median: Any
    low: Any
    high: Any
    rows: int = 0
    source: str = "nothing known: taken as 1"


UNASKED = Achieved(1.0, 1.0, 1.0)


@cache
def fitted() -> dict[str, Any]:
    """The fitted constants by generation (`hopper`), kind (`gpu`) or `any`, each with its provenance."""
    return tomllib.loads(files("narrows.data").joinpath("efficiency.toml").read_text("utf-8"))


def medians(table: str, framework: str = "") -> dict[str, float]:
    """The fitted constants of a table, those of a framework (`table-framework`) in their place where it has its own."""
    tables = (fitted()[table], fitted().get(f"{table}-{framework}", {}))
    return {name: entry["median"] for one in tables for name, entry in one.items()}


@cache
def generation(name: str) -> str:
    """The hardware generation of a machine by its name (`h100-sxm` is `hopper`), or '' where none is known."""
    named = fitted()["generations"]
    return next((g for g, starts in named.items() if any(name == s or name.startswith(f"{s}-") for s in starts)), "")


_known: dict[tuple[Any, ...], Achieved] = {}
_curves: dict[tuple[Any, ...], Any] = {}


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


def achieved_at(machine: Machine, what: str, size: Amount) -> Achieved:
    """`achieved`, where the machine's own calibration knows it at several sizes: `matmul-bf16-at32` is a product of 32 rows.

    Between those sizes it is read off on logarithmic scales, beyond them it stays as it is at the last.
    """
    key = (machine.efficiency, what)
    if key not in _curves:
        _curves[key] = _points(machine.efficiency, what)
    if _curves[key] is None:
        return achieved(machine, what)
    sizes, curves = _curves[key]
    place = np.log(np.maximum(size, 1.0))
    median, low, high = (np.exp(np.interp(place, sizes, curve)) for curve in curves)
    return Achieved(median, low, high, 1, "given with this machine")


def _points(own: Mapping[str, Any], what: str) -> Any:
    """The logarithms of (sizes, [median, low, high]) known for the first of the fallbacks of `what` that the machine has."""
    parts = what.split("-")
    for count in range(len(parts), 0, -1):
        name = "-".join(parts[:count])
        found = sorted((float(key[len(name) + 3 :]), own[key]) for key in own if re.fullmatch(f"{name}-at[0-9]+", key))
        if found:
            return np.log([size for size, _ in found]), np.log([[e[q] for _, e in found] for q in ("median", "low", "high")])
        if name in own:
            return None
    return None


def tile_use(rows: Any, outputs: Any, matrices: Any, machine: Machine) -> Any:
    """The share of the matrix units' work that is not padding: the best over the tile sizes a library offers.

    A tile computes all its rows and columns even if the matrix ends inside it, and a last wave of tiles keeps all
    units waiting. Smaller tiles waste less and reuse less: each halving of a side below the machine's full tile
    costs a tenth. `rows` x `outputs` per matrix.
    """
    rows, outputs, matrices = (np.asarray(v, dtype=np.float64) for v in (rows, outputs, matrices))
    sides_down, sides_across, kept = _tiles(*machine.tile, max(rows.ndim, outputs.ndim, matrices.ndim))
    tiles = np.maximum(np.ceil(rows / sides_down) * matrices * np.ceil(outputs / sides_across), 1.0)
    area = machine.units * sides_down * sides_across
    useful = rows * outputs * matrices / (np.ceil(tiles / machine.units) * area)
    split = np.maximum(1.0, np.floor(machine.units / tiles))  # few tiles: cut the inner dimension as well
    best = (np.minimum(useful * split, 1.0) * kept).max(axis=(0, 1))
    return np.where(rows > 0, best, 1.0)[()]


@cache
def _tiles(rows: int, outputs: int, axes: int) -> tuple[Any, Any, Any]:
    """The sides of the tiles there are, down and across, and what each keeps of the full one's speed, before other `axes`."""
    down = np.array([max(rows >> h, min(rows, 8)) for h in range(4)], dtype=np.float64)
    across = np.array([max(outputs >> h, min(outputs, 8)) for h in range(3)], dtype=np.float64)
    kept = np.array([[0.9 ** (h + w) for w in range(3)] for h in range(4)])
    after = (1,) * axes
    return down.reshape(4, 1, *after), across.reshape(1, 3, *after), kept.reshape(4, 3, *after)


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
    constants (`achieved`), taken as fully correlated between ops, which is the cautious reading. A calibration that
    timed whole steps as well knows how far its predictions of them were off (`step`): then that is the interval.
    """
    if op.kind == "checkpoint":
        return OpTime({}, 0.0, 0.0)
    dims = op.sized(step)
    work = cost_of(op, dims, eager, step.serves)
    asked, (compute, memory, link) = _asked(op, dims, work, machine, eager), constants(op, machine, dims, work, eager)
    ideal, used = asked.ideal, asked.used
    traffic = {
        "weights": work.weight_bytes,
        "cache": work.cache_bytes,
        "activations": work.input_bytes + work.write_bytes * (op.kind != "optimizer"),
        "optimizer states": work.state_bytes + work.write_bytes * (op.kind == "optimizer"),
    }
    busy_c, busy_m, body, whole = asked.at(compute.median, memory.median, link.median)
    is_compute = busy_c >= body
    is_memory = (
        ~is_compute & (busy_m >= body) if isinstance(is_compute, np.ndarray) else (not is_compute) and bool(busy_m >= body)
    )
    share = body / np.maximum(work.read_bytes + work.write_bytes, 1e-300) * is_memory
    causes: dict[str, Amount] = {
        "arithmetic": ideal * is_compute,
        "partial tiles": ideal * (1 / used - 1) * is_compute,
        "below peak": ideal / used * (1 / compute.median - 1) * is_compute,
        **{name: share * bytes_ for name, bytes_ in traffic.items()},
        "communication": body * (1.0 - is_compute - is_memory),
        "launch": whole - body,
    }
    if "step" in machine.efficiency:
        off = machine.efficiency["step"]
        low, high = whole * min(off["low"], 1.0), whole * max(off["high"], 1.0)
    else:
        low, high = (asked.at(*(getattr(one, end) for one in (compute, memory, link)))[3] for end in ("high", "low"))
    return OpTime(
        {k: v for k, v in causes.items() if np.any(v)},
        low,
        high,
        bool((link if op.kind in COLLECTIVES else compute if np.all(is_compute) else memory).rows),
    )


def op_seconds(op: Op, step: Step, machine: Machine, eager: bool = False) -> Amount:
    """The seconds of `op_time` alone, without causes and interval, in a third of the work."""
    return seconds_of(op, op.sized(step), machine, eager, step.serves)


def seconds_of(op: Op, dims: dict[str, Any], machine: Machine, eager: bool = False, serves: bool = False) -> Amount:
    """`op_seconds` for dims given as numbers or arrays, whatever the op's own are."""
    if op.kind == "checkpoint":
        return 0.0
    work = cost_of(op, dims, eager, serves)
    compute, memory, link = constants(op, machine, dims, work, eager)
    return _asked(op, dims, work, machine, eager).at(compute.median, memory.median, link.median)[3]  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _Asked:
    """Seconds that an op asks of each resource at the datasheet's peak; `fixed` by a kernel, at least `floor` by the host."""

    ideal: Any
    used: Any
    moved: Any
    sent: Any
    latency: Any
    fixed: Any
    floor: Any

    def at(self, compute: Any, memory: Any, link: Any) -> tuple[Any, Any, Any, Any]:
        """Seconds of arithmetic and of memory, of the slowest resource, and of the op, where kernels reach such shares."""
        busy_c, busy_m, busy_l = self.ideal / (self.used * compute), self.moved / memory, self.sent / link + self.latency
        body = np.maximum(np.maximum(busy_c, busy_m), busy_l)
        return busy_c, busy_m, body, np.maximum(body + self.fixed, self.floor)


def _asked(op: Op, dims: dict[str, Any], work: Cost, machine: Machine, eager: bool) -> _Asked:
    sent, latency = _wire(op, dims, work, machine, eager)
    floor, fixed = _launch(op, work, machine, eager)
    moved = (work.read_bytes + work.write_bytes) / machine.memory.bandwidth_bytes_per_s
    return _Asked(work.flop / peak(op, machine), useful(op, dims, machine), moved, sent, latency, fixed, floor)


def peak(op: Op, machine: Machine) -> float:
    """The datasheet's FLOP/s that bound an op: of the matrix units in its dtype, or of plain fp32."""
    return machine.peak(op.compute or op.act.name) if op.spec.matmul else machine.peak("fp32")


def constants(
    op: Op, machine: Machine, dims: Mapping[str, Any], work: Cost, eager: bool = False
) -> tuple[Achieved, Achieved, Achieved]:
    """What an op's class of kernel reaches of the peak in arithmetic, of the memory's bandwidth and of the link's.

    A collective asks for nothing but the link, and nothing else for it: what is not asked for is 1.
    """
    if op.kind in COLLECTIVES:
        return UNASKED, UNASKED, achieved(machine, wired(machine))
    return (
        achieved_at(machine, _class(op) + _formats(op), _rows(op, dims)),
        achieved_at(machine, _stream(op, eager), _stream_size(op, dims, work)),
        UNASKED,
    )


def rests_on(op: Op, cause: str, machine: Machine, eager: bool = False) -> str:
    """The name of the constant by which the cost model comes from an op to the seconds of a cause in its ledger."""
    match CAUSES[cause]:
        case Limit.COMPUTE:
            return _class(op) + _formats(op)
        case Limit.BANDWIDTH:
            return _stream(op, eager)
        case Limit.COMMUNICATION:
            return wired(machine)
        case other:
            return other.value


def wired(machine: Machine) -> str:
    """Whose constants count on the way to the machine's peers: `pcie` (through the host), `ethernet` (TCP), or `link`."""
    wire = machine.link or machine.host_link
    return wire.name if wire and wire.name in ("pcie", "ethernet") and "link" not in machine.efficiency else "link"


def _class(op: Op) -> str:
    if op.kind in ATTENTION:
        return "attention"
    if op.kind == "conv":
        return "matmul-conv-depthwise" if _depthwise(op) else "matmul-conv"  # both fall back to matmul
    return "matmul" if op.spec.matmul else "sparse" if op.kind == "sparse" else "vector"


def _depthwise(op: Op) -> bool:
    """Whether it is a convolution of each channel by itself."""
    return bool(op["groups"] == op["in_channels"] != 1)


def _rows(op: Op, dims: Mapping[str, Any]) -> Any:
    """The size that a class of kernel's speed depends on: the rows of a matrix, or the keys that a query meets."""
    if op.kind in ATTENTION:
        return dims["pairs"] / np.maximum(dims["queries"], 1.0)
    if op.kind == "expert":
        return dims["rows"] * dims["top_k"] / np.maximum(op.spec.touched(dims) * dims["experts"], 1.0)
    return dims["rows"] / dims["matrices"] if op.kind in ("linear", "matmul") else 1.0


def _stream_size(op: Op, dims: Mapping[str, Any], work: Cost) -> Any:
    """The size that a stream's speed depends on: the inputs that a row of weights holds, else the bytes that a kernel writes."""
    if op.weight and op.spec.matmul and "inputs" in dims:
        return dims["inputs"]
    return work.write_bytes / (op.repeat * max(op.kernels, 1))


def _formats(op: Op) -> str:
    """The formats of weights and activations, as they end the name of a class of kernel."""
    return f"-{_name(op.weight or op.act)}-{_name(op.act)}"


def _name(dtype: DType) -> str:
    """The format whose kernels were measured: fp16 has those of bf16, and tiled CSL is unpacked on the way as int4 is."""
    return "bf16" if dtype == FP16 else "int4" if dtype.name == "csl" else dtype.name


def _stream(op: Op, eager: bool) -> str:
    """Which kernel's share of the memory bandwidth counts: weights are streamed, norms and pointwise ops have their own."""
    if op.kind == "conv":
        return f"memory{_formats(op)}-{'depthwise' if _depthwise(op) else 'conv'}"
    if op.spec.matmul or op.kind == "embedding":
        return "memory" + _formats(op) if op.weight else "memory"
    if op.kind != "norm" or (eager and op.kernels > 1):  # then each of its steps is a pointwise kernel
        return "memory-pointwise" + _formats(op)
    width = op["width"]
    wide = "-wide" if not isinstance(width, Size) and width > WIDE else ""
    return f"memory-norm{wide}-{_name(op.act)}"


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
        if _depthwise(op):
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


def _launch(op: Op, work: Cost, machine: Machine, eager: bool) -> tuple[Any, Any]:
    """Seconds that the host needs for the op's launches where it launches each, and the fixed device time of its kernels."""
    start = work.launches * machine.kernel_seconds * achieved(machine, "kernel").median
    if machine.kind == "cpu":
        return 0.0, work.launches * (machine.launch_seconds + dispatch_seconds(op, machine))
    return (
        work.launches * machine.launch_seconds * achieved(machine, "launch").median if eager and machine.kind == "gpu" else 0.0
    ), start + work.launches * dispatch_seconds(op, machine)


def dispatch_seconds(op: Op, machine: Machine) -> float:
    """What a kernel of the op's class costs before its work, beyond what the smallest kernel does: choosing code, copying.

    `dispatch-matmul-bf16` is the share of it that the smallest kernel (`kernel_seconds`) would need.
    """
    if not machine.efficiency:  # only a calibration tells it
        return 0.0
    share = achieved(machine, f"dispatch-{_class(op)}{_formats(op)}").median
    return float(machine.kernel_seconds * max(1 / share - 1, 0.0))


# messages one after another in a ring of `ranks`; small messages of an all-reduce go up and down a tree instead
HOPS = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}


def _wire(op: Op, dims: dict[str, Any], work: Cost, machine: Machine, eager: bool) -> tuple[Any, Any]:
    """Seconds on the wire at the link's peak, and the latency of the collective, over all repeats.

    Latency grows with the messages that follow each other; but serving engines and compilers sum small messages in one
    kernel that reads all peers at once. Below `ramp` bytes a link runs a protocol that trades bandwidth for latency,
    which reads as that many more bytes the larger the message becomes, up to `ramp`.
    """
    if op.kind not in COLLECTIVES:
        return 0.0, 0.0
    wire = machine.link or machine.host_link
    if wire is None:
        return 0.0 * work.flop, 0.0
    base, hop, ramp = (achieved(machine, f"{wired(machine)}_{name}").median for name in ("base", "hop", "ramp"))
    each = work.link_bytes / op.repeat
    extra = each * ramp / (each + ramp)
    follow: Any = base + hop * (HOPS[op.kind] * (dims["ranks"] - 1) if op.kind in HOPS else 1.0)
    if op.kind == "all_reduce" and not eager:
        follow = np.where(each < ONE_SHOT, np.minimum(achieved(machine, "link_one_shot").median, follow), follow)[()]
    return (each + extra) * op.repeat / wire.bandwidth_bytes_per_s, follow * wire.latency_seconds * op.repeat
