"""Serving: first and later tokens at fixed concurrency, and batches on an engine that launches kernel by kernel."""

from functools import cache

from narrows.costmodel import ATTENTION, generation
from narrows.errors import NarrowsError
from narrows.footprint import footprint
from narrows.graph import BF16, DTYPES, FP8, FP16, Graph
from narrows.measured.kernels import model_bound, with_weights
from narrows.measured.table import Forecast, NotCovered, Row, count, graph_of, hardware, model, number
from narrows.parallel import tensor_parallel
from narrows.simulate.closed_loop import Layout, closed_loop, one_batch, preset
from narrows.step import Step

CLOSED_LOOP = (
    "backend",
    "model_path",
    "system",
    "precision",
    "mode",
    "isl",
    "osl",
    "gemm_quant_mode",
    "batch_size",
    "tp_size",
    "attention_dp_size",
    "moe_tp_size",
    "moe_ep_size",
    "silicon_ttft_ms",
    "silicon_tpot_ms",
    "concurrency",
)
ONE_BATCH = ("model", "hardware", "prompt_size", "batch_size", "token_size", "prompt_time", "token_time", "tensor_parallel")

FITS = 0.88  # of the device's memory; the rest is the driver's, the allocator's and the communication library's
_SEEN = ("qwen3-32b", "llama-3.1-8b", "gpt-oss-120b", "deepseek-v3")  # what the engines' constants were fitted on


@cache
def served_graph(name: str, precision: str, capability: bool, small_cache: bool = False) -> Graph:
    """A bundled model as an engine serves it in a precision; `capability`: the machine computes in fp8.

    `small_cache`: keys and values are kept in fp8 as well (TensorRT-LLM's default for such checkpoints).
    """
    graph, wanted = graph_of(name), precision.strip().lower()
    known = {
        "": BF16,
        "bf16": BF16,
        "fp16": FP16,
        "bfloat16": BF16,
        "fp8": FP8,
        "fp8_block": FP8,
        "fp4": DTYPES["fp4"],
        "nvfp4": DTYPES["fp4"],
        "int8": DTYPES["int8"],
        "int4": DTYPES["int4"],
        "w4afp8": DTYPES["int4"],
        "mxfp4": DTYPES["fp4"],
    }
    if wanted not in known:
        raise NarrowsError(f"{precision[:40]!r} is not a format.", where="gemm_quant_mode", remedy=f"Use {', '.join(known)}.")
    if small_cache and wanted.startswith("fp8"):
        graph = graph.map(lambda op: op.but(cache=FP8) if op.kind in ATTENTION else op)
    if any(op.kind == "expert" and op.weight and op.weight.bits <= 8 for op in graph):
        return graph  # shipped in few bits: the format of its experts is what is served
    return (
        with_weights(graph, known[wanted], "fp8" if wanted.startswith("fp8") and capability else "")
        if known[wanted].bits < 16
        else graph
    )


def _layout(row: Row, prefix: str) -> Layout:
    """The devices of a replica. Where the expert columns name the same number twice, the source counts it twice."""
    tensor, data = (
        count(row, f"{prefix}tp_size", 1),
        count(row, f"{prefix}attention_dp_size", 1) if row.get(f"{prefix}attention_dp_size", "") != "0" else 1,
    )
    experts = [int(v) if (v := (row.get(f"{prefix}moe_{k}_size") or "").strip()).isdigit() else 0 for k in ("tp", "ep")]
    if min(experts) > 1 and experts[0] == experts[1]:
        return Layout(1, experts[0]) if data > 1 else Layout(experts[0], 1)
    if min(experts) >= 1 and data > 1 and experts[0] * experts[1] == data:
        tensor = 1
    return Layout(tensor, data)


def engine_of(row: Row) -> str:
    """The set of constants that serves a closed-loop row: of its engine and version, or of workers apart."""
    version = "disagg" if row["mode"].strip() == "disagg" else (row.get("backend_version") or "").strip()
    return preset(f"{row['backend'].strip().lower()}-{version}")


def closed(row: Row) -> list[Forecast]:
    """Forecasts of a closed-loop row: time to first token and per output token."""
    here, name = hardware(row["system"], "system"), model(row["model_path"], "model_path")
    graph = served_graph(
        name,
        row["gemm_quant_mode"] or row["precision"],
        "fp8" in here.peak_flop_per_s,
        row["backend"].strip().lower() == "trtllm",
    )
    prompt, output = count(row, "isl"), count(row, "osl")
    first, each = (number(row, f"silicon_{k}_ms") * 1e-3 for k in ("ttft", "tpot"))
    apart, mode = row["mode"].strip() == "disagg", row["mode"].strip()
    if mode not in ("agg", "disagg"):
        raise NarrowsError(f"{mode[:40]!r} is not a mode.", where="mode", remedy="Use agg or disagg.")
    layout = _layout(row, "decode_" if apart else "")
    workers = count(row, "decode_num_workers", 1) if apart else 1
    batch = count(row, "decode_batch_size" if apart else "batch_size", 1) * layout.data * workers
    many = count(row, "concurrency", batch)
    backend, engine = row["backend"].strip().lower(), engine_of(row)
    prefill = _layout(row, "prefill_") if apart else None
    found = closed_loop(
        graph, here, layout, max(1, round(many / workers)), prompt, output, engine, prefill, count(row, "prefill_num_workers", 1)
    )
    job = f"{name} {here.name} {backend} {mode} {prompt} {output}"
    read = model_bound(graph, here, Step.prefill(1, prompt), (prefill or layout).devices)
    step = model_bound(graph, here, Step.decode(max(1, many // workers), prompt + output // 2), layout.devices)
    seen = name in _SEEN and here.name in ("h100-sxm", "h200")
    return [
        Forecast("serving-ttft", first, found.first, f"ttft-{engine}", read, f"{job} {many}", inside=seen),
        Forecast("serving-tpot", each, found.each, f"tpot-{engine}", step, f"{job} {many}", inside=seen),
    ]


@cache
def _held(graph: Graph, devices: int, many: int, prompt: int) -> float:
    return float(footprint(tensor_parallel(graph, devices), Step.prefill(many, prompt)).total_bytes)


def batch(row: Row) -> list[Forecast]:
    """Forecasts of a row of one batch: time of its prompt and of each token."""
    here, name = hardware(row["hardware"]), model(row["model"])
    devices, many, prompt, output = (count(row, k) for k in ("tensor_parallel", "batch_size", "prompt_size", "token_size"))
    first, each = number(row, "prompt_time") * 1e-3, number(row, "token_time") * 1e-3
    capped = "pcap" in row["hardware"].lower()
    if capped:
        raise NotCovered("power caps are not modelled.", where="hardware", remedy="Judge rows at full power.")
    graph = graph_of(name)
    if _held(graph, devices, many, prompt) > FITS * here.memory.capacity_bytes:
        raise NotCovered(
            f"{many} sequences do not fit: they are read and answered in turns.",
            where="batch_size",
            remedy="Judge batches that fit.",
        )
    found = one_batch(graph, here, Layout(devices), many, prompt, output, "splitwise")
    job = f"{name} {here.name} {many} {prompt} {output}"
    read, step = (
        model_bound(graph, here, s, devices) for s in (Step.prefill(many, prompt), Step.decode(many, prompt + output // 2))
    )
    seen = generation(here.name) == "ampere"
    return [
        Forecast("splitwise-prompt", first, found.first, "prompt", read, job, inside=seen),
        Forecast("splitwise-token", each, found.each, "token", step, job, inside=seen),
    ]
