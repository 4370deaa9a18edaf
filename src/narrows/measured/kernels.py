"""Kernels and batch-1 decoding: matrix products, attention, pointwise ops, collectives, tokens per second."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from narrows.cost import cost
from narrows.costmodel import achieved, op_time
from narrows.diagnose import seconds as step_seconds
from narrows.errors import NarrowsError
from narrows.graph import BF16, DTYPES, FP16, DType, Graph, Op
from narrows.machine import Link, Machine
from narrows.measured.table import Forecast, NotCovered, Row, count, graph_of, hardware, model, rate, seconds
from narrows.step import Step

COLUMNS = ("model", "hardware", "n_devices", "dtype", "phase", "batch", "prompt", "output", "metric", "value", "unit")
FORMATS: dict[str, DType] = {
    **DTYPES,
    "half": FP16,
    "float": DTYPES["fp32"],
    "float16": FP16,
    "float32": DTYPES["fp32"],
    "bfloat16": BF16,
    "int4-g32": DType("int4", 4, 32, 16, 16),
    "int8": DType("int8", 8, 0, 16),
}
ONE = Step.forward(1, 1)
_KINDS = {
    "all_gather": "all_gather",
    "all_reduce": "all_reduce",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "sendrecv": "send",
    "send": "send",
}
_SIZES = {"": 1, "B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30}
_ATTENTION = (("FlashAttention-2", "attention-flash2"), ("cuDNN", "attention-cudnn"), ("Triton", "attention-triton"))


def format_of(text: str, column: str = "dtype") -> DType:
    """A number format by its published name."""
    if text.strip().lower() not in FORMATS:
        raise NarrowsError(f"{text[:40]!r} is not a format.", where=column, remedy=f"Use {', '.join(FORMATS)}.")
    return FORMATS[text.strip().lower()]


def sets(row: Row) -> tuple[str, ...]:
    """The set that a row is counted in."""
    model, phase = row["model"], row["phase"].strip()
    if phase != "operator":
        return ("collectives",) if phase == "collective" else ("decode",)
    return ("gemm",) if model.startswith("GEMM") else ("attention",) if re.search(r"hd\d+", model) else ("pointwise",)


def forecast(row: Row) -> list[Forecast]:
    """The model's forecast of a row of this schema; raises NarrowsError that names the column at fault."""
    phase = row["phase"].strip()
    if phase == "collective":
        return [_collective(row)]
    if phase == "operator":
        found = next((f for pattern, f in _OPERATORS if re.search(pattern, row["model"])), None)
        if found is None:
            raise NotCovered(f"the operator {row['model'][:40]!r} is not known.", where="model", remedy="See the kinds of op.")
        return [found(row)]
    if phase in ("decode", "prefill", "offline_max"):
        return [_tokens(row)]
    raise NotCovered(
        f"the phase {phase[:40]!r} is not known.", where="phase", remedy="Use operator, collective, decode or prefill."
    )


def with_weights(graph: Graph, weight: DType, compute: str = "") -> Graph:
    """A graph with the matrices of its layers stored in another format (embedding and head stay)."""

    def change(op: Op) -> Op:
        if op.kind not in ("linear", "expert") or op.repeat == 1 or op.weight is None or op.weight.bits < weight.bits:
            return op
        return op.but(weight=weight, compute=compute)

    return graph.map(change)


def _timed(row: Row, name: str, op: Op, here: Machine, *, work: float = 0.0) -> Forecast:
    """A kernel called from Python: the op's own time and what a call of its class costs around it."""
    time = op_time(op, ONE, here)
    around, least = (achieved(here, f"{kind}-{name}").median * 1e-6 for kind in ("call", "call_least"))
    predicted = max(float(time.seconds) + around, least)
    bound = bound_seconds(op, here)
    if work:
        measured = rate(row, Gelem_s_as_plotted=1e9, Gelem_s=1e9, TFLOP_s=1e12)
        return Forecast(_set(name), measured, work / predicted, _set(name), work / bound, inside=time.inside)
    return Forecast(_set(name), seconds(row), predicted, _set(name), bound, inside=time.inside)


def bound_seconds(op: Op, here: Machine, step: Step = ONE) -> float:
    """The roofline of one op at the datasheet's peaks."""
    work = cost(op, step)
    wire = here.link or here.host_link
    sent = float(work.link_bytes) / wire.bandwidth_bytes_per_s if wire else 0.0
    moved = float(work.read_bytes + work.write_bytes) / here.memory.bandwidth_bytes_per_s
    return max(float(work.flop) / (here.peak(op.compute or op.act.name) if op.spec.matmul else here.peak("fp32")), moved, sent)


@lru_cache(maxsize=50_000)
def model_bound(graph: Graph, here: Machine, step: Step, devices: int) -> float:
    """The roofline of a step of a whole model that is spread evenly over devices."""
    return sum(bound_seconds(op, here, step) for op in graph) / devices


def _set(name: str) -> str:
    return "pointwise" if name in ("softmax", "layernorm", "gelu") else name


def _shape(row: Row, pattern: str) -> list[int]:
    found = re.search(pattern, row["model"])
    sizes = [int(s) for s in found.groups()] if found else [0]
    if min(sizes) < 1 or max(sizes) > 10**10:
        raise NarrowsError(f"{row['model'][:60]!r} has no such sizes.", where="model", remedy="Write them as whole numbers.")
    return sizes


def _gemm(row: Row) -> Forecast:
    m, n, k = _shape(row, r"M=(\d+) N=(\d+) K=(\d+)")
    act = format_of(row["dtype"])
    return _timed(row, "gemm", Op("gemm", "matmul", {"rows": m, "inputs": k, "outputs": n}, act=act), hardware(row["hardware"]))


def _softmax(row: Row) -> Forecast:
    rows, width = _shape(row, r"shape=(\d+)x(\d+)")
    op = Op(
        "softmax",
        "elementwise",
        {"elements": rows * width, "reads": rows * width, "flop_per_element": 5},
        act=format_of(row["dtype"]),
    )
    here = hardware(row["hardware"])
    return _timed(row, "softmax", op, _reaching(here, "memory-pointwise", "memory-softmax"), work=rows * width)


def _layernorm(row: Row) -> Forecast:
    rows, width = _shape(row, r"shape=(\d+)x(\d+)")
    op = Op("layernorm", "norm", {"rows": rows, "width": width, "weights": 2}, act=format_of(row["dtype"]))
    return _timed(row, "layernorm", op, hardware(row["hardware"]), work=rows * width)


def _gelu(row: Row) -> Forecast:
    (elements,) = _shape(row, r"shape=(\d+)")
    op = Op("gelu", "elementwise", {"elements": elements, "reads": elements, "flop_per_element": 11}, act=format_of(row["dtype"]))
    return _timed(row, "gelu", op, hardware(row["hardware"]), work=elements)


def _attention(row: Row) -> Forecast:
    (head,) = _shape(row, r"hd(\d+)")
    batch, length, here = count(row, "batch"), count(row, "prompt"), hardware(row["hardware"])
    heads = re.search(r"heads (\d+)", row.get("note") or "")
    many = int(heads[1]) if heads else 2048 // head
    causal = "causal" in row["model"] and "non-causal" not in row["model"]
    pairs = batch * (length * (length + 1) / 2 if causal else length * length)
    dims = {
        "heads": many,
        "kv_heads": many,
        "head_dim": head,
        "value_dim": head,
        "queries": batch * length,
        "pairs": pairs,
        "context": batch * length,
    }
    kernel = next((key for word, key in _ATTENTION if word in row["model"]), "attention")
    op = Op("attention", "attention", dims, act=format_of(row["dtype"]))
    time = op_time(op, ONE, _reaching(here, "attention", kernel))
    work = 4 * many * head * pairs
    return Forecast(
        "attention", rate(row, TFLOP_s=1e12), work / float(time.seconds), "attention", here.peak(op.act.name), inside=time.inside
    )


_OPERATORS: tuple[tuple[str, Callable[[Row], Forecast]], ...] = (
    (r"^GEMM ", _gemm),
    (r"^softmax ", _softmax),
    (r"^layernorm ", _layernorm),
    (r"^gelu ", _gelu),
    (r"hd\d+", _attention),
)


def _reaching(here: Machine, what: str, like: str) -> Machine:
    """The machine with another kernel's constant in the place of a class's own."""
    found = achieved(here, like)
    return replace(here, efficiency={**here.efficiency, what: {"median": found.median, "low": found.low, "high": found.high}})


def _collective(row: Row) -> Forecast:
    kind, ranks, act = _KINDS.get(row["model"].strip()), count(row, "n_devices"), format_of(row["dtype"])
    size = re.fullmatch(r"([\d.]+) ?([KMG]?B?)", row["prompt"].strip())
    if kind is None or size is None or ranks < 2:
        where, what = (
            ("model", row["model"])
            if kind is None
            else ("prompt", row["prompt"])
            if size is None
            else ("n_devices", row["n_devices"])
        )
        raise NarrowsError(
            f"{what[:40]!r} is not known here.", where=where, remedy="Give a collective, a size like 64 KB, 2 or more devices."
        )
    nodes = re.search(r"nodes=(\d+)", row.get("note") or "")
    many, here = int(nodes[1]) if nodes else 1, hardware(row["hardware"])
    elements = float(size[1]) * _SIZES[size[2]] * 8 / act.bits
    if many > 1 and kind == "all_to_all":  # all of a node's devices send through its one card; a ring crosses it once
        elements *= ranks / many * (ranks - ranks / many) / (ranks - 1)
    over = "ethernet" if many > 1 else "pcie" if "pcie" in row["hardware"].lower() else ""
    if over:
        link = Link(over, achieved(here, f"wire-{over}").median * 1e9, 5e-6 if over == "pcie" else 30e-6)
        scales = {k: achieved(here, f"link_{k}-{over}").median for k in ("base", "hop", "ramp")}
        own = {f"link_{k}": {"median": v, "low": v, "high": v} for k, v in scales.items()}
        own["link"] = {"median": 1.0, "low": 1.0, "high": 1.0}
        here = replace(
            here,
            links=(link,) if over != "pcie" else (replace(link, name="ring"),),
            efficiency={**here.efficiency, **own},
            sources={},
        )
    op = Op(kind, kind, {"elements": elements, "ranks": ranks}, act=act)
    time = op_time(op, ONE, here, eager=True)
    return Forecast(
        "collectives",
        seconds(row),
        float(time.seconds),
        f"link{'-' + over if over else ''}",
        bound_seconds(op, here),
        inside=time.inside,
    )


def _tokens(row: Row) -> Forecast:
    """Tokens per second, or the time of a prompt, of a whole model."""
    name, act = model(row["model"]), format_of(row["dtype"])
    here, batch = hardware(row["hardware"]), count(row, "batch", 1)
    if "GCD" in row["hardware"] and here.name == "mi250x":
        here = here.scaled(compute=0.5, bandwidth=0.5)  # the machine has two
    if not row["n_devices"].strip().isdigit():
        raise NotCovered(f"{row['n_devices'][:40]!r} is not a number of devices.", where="n_devices", remedy="Write a count.")
    devices = count(row, "n_devices")
    prompt = int(row["prompt"]) if row["prompt"].strip().isdigit() else 128
    graph = with_weights(graph_of(name), act) if act.bits < 16 else graph_of(name)
    if row["metric"] == "ttft":
        whole = Step.prefill(batch, prompt)
        return Forecast(
            "decode",
            seconds(row),
            float(step_seconds(graph, here, whole, devices)[0]),
            "decode",
            model_bound(graph, here, whole, devices),
        )
    out = count(row, "output")
    later = Step.decode(batch, prompt + out // 2)
    step = float(step_seconds(graph, here, later, devices)[0])
    first = float(step_seconds(graph, here, Step.prefill(batch, prompt), devices)[0]) if row["phase"] == "offline_max" else 0.0
    measured = rate(row, tok_s=1.0, tok_s_GPU=float(devices))
    bound = batch / model_bound(graph, here, later, devices)
    return Forecast("decode", measured, batch * out / (first + out * step), "decode", bound, f"{name} {here.name}", "max")
