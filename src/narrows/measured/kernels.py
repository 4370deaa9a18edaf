"""Kernels and batch-1 decoding: matrix products, attention, pointwise ops, collectives, tokens per second."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from narrows.cost import cost
from narrows.costmodel import achieved, op_time, wired
from narrows.diagnose import seconds as step_seconds
from narrows.errors import NarrowsError
from narrows.graph import BF16, DTYPES, FP8, FP16, DType, Graph, Op
from narrows.kinds import COLLECTIVES
from narrows.machine import Link, Machine
from narrows.measured.table import (
    UNITS,
    Forecast,
    NotCovered,
    Row,
    count,
    graph_of,
    hardware,
    model,
    network_bytes_per_s,
    rate,
    seconds,
    unit,
)
from narrows.step import Step

COLUMNS = ("model", "hardware", "n_devices", "dtype", "phase", "batch", "prompt", "output", "metric", "value", "unit")
OPTIONAL = ("n_devices", "batch", "prompt", "output", "note")
FORMATS: dict[str, DType] = {
    **DTYPES,
    **dict.fromkeys(("float16", "half", "f16"), FP16),
    **dict.fromkeys(("bfloat16", "default"), BF16),
    **dict.fromkeys(("float32", "float", "f32"), DTYPES["fp32"]),
    **dict.fromkeys(("e4m3", "e5m2", "fp8-block", "fp8-e4m3", "fp8-e5m2", "float8", "w8a8-fp8"), FP8),
    **dict.fromkeys(("int8", "w8a8", "w8a16", "int8-wo"), DType("int8", 8, 0, 16)),
    **dict.fromkeys(("nvfp4", "mxfp4"), DTYPES["fp4"]),
    **dict.fromkeys(("int4-wo", "w4a16", "w4afp8", "awq", "gptq"), DTYPES["int4"]),
}
ONE = Step.forward(1, 1)
_KINDS = {kind.replace("_", ""): kind for kind in COLLECTIVES} | {"sendrecv": "send", "p2p": "send"}
_PREFIXES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
ETHERNET = Link("ethernet", 1.25e9, 30e-6)  # 10 Gbit/s: an assumption where cards without NVLink lie in several nodes
_ATTENTION = (("FlashAttention-2", "attention-flash2"), ("cuDNN", "attention-cudnn"), ("Triton", "attention-triton"))


def format_of(text: str, column: str = "dtype") -> DType:
    """A number format by its published name."""
    low = text.strip().lower().removeprefix("torch.").replace("_", "-")
    group = re.fullmatch(r"(?:int4|w4a16|nf4|awq|gptq)-?g?(\d+)", low.replace("nf4", "nf4-64"))
    if group:
        return DType(f"int4-g{group[1]}", 4, int(group[1]), 16, 16)
    if low not in FORMATS:
        raise NarrowsError(f"{text[:40]!r} is not a format.", where=column, remedy=f"Use {', '.join(FORMATS)}.")
    return FORMATS[low]


def sets(row: Row) -> tuple[str, ...]:
    """The set that a row is counted in."""
    model, phase = row["model"], row["phase"].strip()
    if phase != "operator":
        return ("collectives",) if phase == "collective" else ("decode",)
    return (
        ("gemm",) if re.match(r"gemm|matmul", model, re.I) else ("attention",) if re.search(r"hd\d+", model) else ("pointwise",)
    )


def forecast(row: Row) -> list[Forecast]:
    """The model's forecast of a row of this schema; raises NarrowsError that names the column at fault."""
    phase = row["phase"].strip()
    if phase == "collective":
        return [_collective(row)]
    if phase == "operator":
        found = next((f for pattern, f in _OPERATORS if re.search(pattern, row["model"], re.I)), None)
        if found is None:
            raise NotCovered(f"the operator {row['model'][:40]!r} is not known.", where="model", remedy="See the kinds of op.")
        return [found(row)]
    if phase in ("decode", "prefill", "offline_max"):
        return [_tokens(row)]
    raise NotCovered(
        f"the phase {phase[:40]!r} is not known.", where="phase", remedy="Use operator, collective, decode or prefill."
    )


def in_format(graph: Graph, weight: DType, compute: str = "") -> Graph:
    """A graph with the matrices of its layers stored in another format (embedding and head stay), or all of it in a wider one."""

    def change(op: Op) -> Op:
        if weight.bits > 16:
            return op.but(act=weight, weight=weight if op.weight else None)
        if op.kind not in ("linear", "expert") or op.repeat == 1 or op.weight is None or op.weight.bits < weight.bits:
            return op
        return op.but(weight=weight, compute=compute)

    return graph if weight.bits == 16 else graph.map(change)


def _timed(row: Row, name: str, op: Op, work: float, per: str) -> Forecast:
    """A kernel called from Python: the op's own time and what a call of its class costs around it.

    The row gives its time, or how much of `work` is done in a second, in units of `per`.
    """
    here = hardware(row["hardware"])
    time = op_time(op, ONE, _reaching(here, "memory-pointwise", "memory-softmax") if name == "softmax" else here)
    around, least = (achieved(here, f"{kind}-{name}").median * 1e-6 for kind in ("call", "call_least"))
    predicted, bound = max(float(time.seconds) + around, least), bound_seconds(op, here)
    group = "gemm" if name == "gemm" else "pointwise"
    if unit(row["unit"]) in UNITS:
        return Forecast(group, seconds(row), predicted, group, bound, here.name)
    measured = rate(row, {f"g{per}/s": 1e9, f"t{per}/s": 1e12})
    return Forecast(group, measured, work / predicted, group, work / bound, here.name, best="max")


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


def _shape(row: Row, pattern: str) -> list[int]:
    found = re.search(pattern, row["model"], re.I)
    sizes = [int(s) for s in found.groups()] if found else [0]
    if min(sizes) < 1 or max(sizes) > 10**10:
        raise NarrowsError(f"{row['model'][:60]!r} has no such sizes.", where="model", remedy="Write them as whole numbers.")
    return sizes


def _gemm(row: Row) -> Forecast:
    m, n, k = _shape(row, r"\bM ?= ?(\d+)\W+N ?= ?(\d+)\W+K ?= ?(\d+)")
    form, dims = format_of(row["dtype"]), {"rows": m, "inputs": k, "outputs": n}
    plain = form.bits >= 8 or form.name in hardware(row["hardware"]).peak_flop_per_s  # else a format of weights alone
    op = Op("gemm", "matmul", dims, act=form) if plain else Op("gemm", "linear", dims, act=BF16, weight=form)
    return _timed(row, "gemm", op, 2 * m * n * k, "flop")


def _softmax(row: Row) -> Forecast:
    rows, width = _shape(row, r"shape ?= ?(\d+) ?x ?(\d+)")
    dims = {"elements": rows * width, "reads": rows * width, "flop_per_element": 5}
    return _timed(row, "softmax", Op("softmax", "elementwise", dims, act=format_of(row["dtype"])), rows * width, "elem")


def _layernorm(row: Row) -> Forecast:
    rows, width = _shape(row, r"shape ?= ?(\d+) ?x ?(\d+)")
    op = Op("layernorm", "norm", {"rows": rows, "width": width, "weights": 2}, act=format_of(row["dtype"]))
    return _timed(row, "layernorm", op, rows * width, "elem")


def _gelu(row: Row) -> Forecast:
    (elements,) = _shape(row, r"shape ?= ?(\d+)$")
    dims = {"elements": elements, "reads": elements, "flop_per_element": 11}
    return _timed(row, "gelu", Op("gelu", "elementwise", dims, act=format_of(row["dtype"])), elements, "elem")


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
        "attention", rate(row, {"tflop/s": 1e12}), work / float(time.seconds), "attention", here.peak(op.act.name), here.name
    )


_OPERATORS: tuple[tuple[str, Callable[[Row], Forecast]], ...] = (
    (r"^(gemm|matmul)\b", _gemm),
    (r"^softmax\b", _softmax),
    (r"^layer_?norm\b", _layernorm),
    (r"^gelu\b", _gelu),
    (r"hd\d+", _attention),
)


def _reaching(here: Machine, what: str, like: str) -> Machine:
    """The machine with another kernel's constant in the place of a class's own."""
    found = achieved(here, like)
    return replace(here, efficiency={**here.efficiency, what: {"median": found.median, "low": found.low, "high": found.high}})


def _message_bytes(row: Row) -> float:
    """The size of a message, like `64 KB` (2**10 bytes each) or a plain number of bytes, from the column of prompts."""
    found = re.fullmatch(r"([\d.]+(?:e\+?\d+)?) ?([kmg]?)(?:i?b|bytes)?", row["prompt"].strip().lower())
    try:
        size = float(found[1]) * _PREFIXES[found[2]] if found else 0.0
    except ValueError:
        size = 0.0
    if not 1 <= size < 1e15:
        problem = f"{row['prompt'][:40]!r} is not the size of a message."
        raise NarrowsError(problem, where="prompt", remedy="Write it like 64 KB, or in bytes.")
    return size


def _collective(row: Row) -> Forecast:
    kind = _KINDS.get(re.sub(r"[^a-z]", "", row["model"].lower()))
    if kind is None:
        problem = f"the collective {row['model'][:40]!r} is not known."
        raise NotCovered(problem, where="model", remedy=f"Use {', '.join(COLLECTIVES)}.")
    ranks, act, here, text = count(row, "n_devices"), format_of(row["dtype"]), hardware(row["hardware"]), row["hardware"].lower()
    nodes = re.search(r"nodes=(\d+)", row.get("note") or "")
    many = max(1, int(nodes[1])) if nodes else 1
    if ranks < 2 or ranks % many:
        problem = f"{ranks} devices do not exchange over {many} nodes."
        raise NarrowsError(problem, where="n_devices", remedy="Give 2 or more, as many on each node.")
    elements = _message_bytes(row) * 8 / act.bits
    if many > 1 and ("pcie" in text or here.link is None):  # one card per node, which a ring crosses once
        speed = ETHERNET.bandwidth_bytes_per_s
        if kind == "all_to_all":  # a card serves all devices of its node, over a connection to each other node
            elements *= ranks / many * (ranks - ranks / many) / (ranks - 1)
            speed *= (many - 1) ** achieved(here, "ethernet_flows").median
        here = replace(here, links=(replace(ETHERNET, bandwidth_bytes_per_s=speed),), sources={})
    elif many > 1:
        here = replace(here, links=(Link("network", network_bytes_per_s(here) * ranks / many, 5e-6),), sources={})
    elif "pcie" in text:  # of a card that is sold with NVLink as well
        here = replace(here, links=tuple(way for way in here.links if way.name == "pcie"), sources={})
    if not here.links:
        raise NotCovered(f"{here.name} has no link to others.", where="hardware", remedy="Judge rows of one device.")
    op = Op(kind, kind, {"elements": elements, "ranks": ranks}, act=act)
    time = op_time(op, ONE, here, eager=True)
    return Forecast(
        "collectives",
        seconds(row),
        float(time.seconds),
        wired(here),
        bound_seconds(op, here),
        here.name,
    )


def _tokens(row: Row) -> Forecast:
    """A whole model: tokens per second, or seconds per prompt where it is read and per token where it answers."""
    name, act = model(row["model"]), format_of(row["dtype"])
    here, batch = hardware(row["hardware"]), count(row, "batch", 1)
    if "GCD" in row["hardware"] and here.name == "mi250x":
        here = here.scaled(compute=0.5, bandwidth=0.5)  # the machine has two
    if not re.fullmatch(r"[\d.]*", row["n_devices"].strip()):
        raise NotCovered(f"{row['n_devices'][:40]!r} is not a number of devices.", where="n_devices", remedy="Write a count.")
    devices = count(row, "n_devices", 1)
    prompt = int(row["prompt"]) if row["prompt"].strip().isdigit() else 128
    graph = in_format(graph_of(name), act)
    read = float(step_seconds(graph, here, Step.prefill(batch, prompt), devices)[0])
    bound = model_bound(graph, here, Step.prefill(batch, prompt), devices)
    job, tokens, times = f"{name} {here.name}", batch * prompt, read
    if row["phase"].strip() != "prefill":
        out = count(row, "output")
        later = Step.decode(batch, prompt + out // 2)
        each = float(step_seconds(graph, here, later, devices)[0])
        bound, tokens, times = model_bound(graph, here, later, devices), batch, each
        if row["phase"].strip() == "offline_max":
            times += read / out
    if unit(row["unit"]) in UNITS:
        return Forecast("decode", seconds(row), times, "decode", bound, here.name, job)
    measured = rate(row, {"tok/s": 1.0, "tok/s/device": float(devices)})
    return Forecast("decode", measured, tokens / times, "decode", tokens / bound, here.name, job, "max")
