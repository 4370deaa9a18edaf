"""Serving: first and later tokens at fixed concurrency, and batches on an engine that launches kernel by kernel."""

from functools import cache

from narrows.costmodel import ATTENTION
from narrows.errors import NarrowsError
from narrows.footprint import footprint
from narrows.graph import FP8, Graph
from narrows.machine import Machine
from narrows.measured.kernels import format_of, in_format, model_bound
from narrows.measured.table import Forecast, NotCovered, Row, count, graph_of, hardware, model, number
from narrows.parallel import tensor_parallel
from narrows.simulate.closed_loop import Layout, closed_loop, held, one_batch, preset
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
OPTIONAL = (
    "backend_version",
    "precision",
    "gemm_quant_mode",
    "batch_size",
    "tp_size",
    "attention_dp_size",
    "moe_tp_size",
    "moe_ep_size",
    "concurrency",
)
ONE_BATCH = ("model", "hardware", "prompt_size", "batch_size", "token_size", "prompt_time", "token_time", "tensor_parallel")

FITS = 0.88  # of the device's memory; the rest is the driver's, the allocator's and the communication library's
_ENGINES = {"tensorrt": "trtllm", "trt": "trtllm", "tensorrt-llm": "trtllm", "trt-llm": "trtllm", "trtllm": "trtllm"}


@cache
def served_graph(name: str, precision: str, capability: bool, small_cache: bool = False) -> Graph:
    """A bundled model as an engine serves it in a precision; `capability`: the machine computes in fp8.

    `small_cache`: keys and values are kept in fp8 as well (TensorRT-LLM's default for such checkpoints).
    """
    graph, form = graph_of(name), format_of(precision or "bf16", "gemm_quant_mode")
    if small_cache and form == FP8:
        graph = graph.map(lambda op: op.but(cache=FP8) if op.kind in ATTENTION else op)
    if any(op.kind == "expert" and op.weight and op.weight.bits <= 8 for op in graph):
        return graph  # shipped in few bits: the format of its experts is what is served
    return in_format(graph, form, "fp8" if form == FP8 and capability else "")


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
    version = "disagg" if _apart(row) else (row.get("backend_version") or "").strip().lower().removeprefix("v")
    return preset(f"{_backend(row)}-{version}")


def _backend(row: Row) -> str:
    low = row["backend"].strip().lower().replace("_", "-")
    return _ENGINES.get(low, low)


def _apart(row: Row) -> bool:
    """Whether other workers read prompts than those that decode."""
    mode = row["mode"].strip().lower()
    if mode not in ("agg", "aggregated", "disagg", "disaggregated"):
        raise NarrowsError(f"{row['mode'][:40]!r} is not a mode.", where="mode", remedy="Use agg or disagg.")
    return mode.startswith("dis")


def closed(row: Row) -> list[Forecast]:
    """Forecasts of a closed-loop row: time to first token and per output token."""
    here, name = hardware(row["system"], "system"), model(row["model_path"], "model_path")
    precision = (row.get("gemm_quant_mode") or row.get("precision") or "").strip()
    graph = served_graph(name, precision, "fp8" in here.peak_flop_per_s, _backend(row) == "trtllm")
    prompt, output = count(row, "isl"), count(row, "osl")
    first, each = (number(row, f"silicon_{k}_ms") * 1e-3 for k in ("ttft", "tpot"))
    apart = _apart(row)
    layout = _layout(row, "decode_" if apart else "")
    workers = count(row, "decode_num_workers", 1) if apart else 1
    batch = count(row, "decode_batch_size" if apart else "batch_size", 1) * layout.data * workers
    many = count(row, "concurrency", batch)
    engine = engine_of(row)
    prefill = _layout(row, "prefill_") if apart else None
    if count(row, "pp_size", 1) > 1:
        raise NotCovered("pipeline stages are not modelled here.", where="pp_size", remedy="Judge rows of one stage.")
    _require_fit(graph, here, (layout, prefill or layout), prompt + output)
    found = closed_loop(
        graph, here, layout, max(1, round(many / workers)), prompt, output, engine, prefill, count(row, "prefill_num_workers", 1)
    )
    job = f"{name} {here.name} {_backend(row)} {'apart' if apart else ''} {prompt} {output} {many}"
    read = model_bound(graph, here, Step.prefill(1, prompt), (prefill or layout).devices)
    step = model_bound(graph, here, Step.decode(round(found.running), prompt + output // 2), layout.devices)
    place = f"{name} {here.name}"
    return [
        Forecast("serving-ttft", first, found.first, f"ttft-{engine}", read, place, job),
        Forecast("serving-tpot", each, found.each, f"tpot-{engine}", step, place, job),
    ]


def _require_fit(graph: Graph, here: Machine, layouts: tuple[Layout, Layout], length: int) -> None:
    """Raises NotCovered where the weights and one sequence do not fit a layout's devices."""
    for layout in layouts:
        weights, each = held(graph, here, layout, length)
        if weights + each > here.memory.capacity_bytes:
            problem = f"weights and one sequence need {(weights + each) / 1e9:.0f} GB of {here.name}'s memory on each device."
            raise NotCovered(problem, where="tp_size", remedy="Check the number of devices and the format.")


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
    place, job = f"{name} {here.name}", f"{name} {here.name} {many} {prompt} {output}"
    read, step = (
        model_bound(graph, here, s, devices) for s in (Step.prefill(many, prompt), Step.decode(many, prompt + output // 2))
    )
    return [
        Forecast("splitwise-prompt", first, found.first, "prompt", read, place, job),
        Forecast("splitwise-token", each, found.each, "token", step, place, job),
    ]
