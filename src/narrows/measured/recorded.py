"""Recorded runs of vLLM beside the simulator: the same arrivals and lengths, what clients saw and what they would have seen.

A run is two files, `NAME_requests.jsonl` (a line for each request, with its times) and `NAME_meta.json` (engine, model,
device). Figures are of the later half of the requests: `bench/fit_serving.py` fits a device's efficiency on the first.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrows.errors import NarrowsError
from narrows.free import cast
from narrows.graph import DTYPES
from narrows.machine import Machine
from narrows.measured.kernels import model_bound
from narrows.measured.table import Forecast, NotCovered, graph_of, hardware, model
from narrows.simulate.fleet import UTILIZATION, Group, rules, serve
from narrows.simulate.requests import Answer, Request
from narrows.simulate.step_times import PS
from narrows.simulate.workload import read
from narrows.step import Step

SETS = ("recorded-vllm-tpot", "recorded-vllm-ttft", "recorded-vllm-tpot-own-blocks", "recorded-vllm-ttft-own-blocks")
_REQUESTS, _META = "_requests.jsonl", "_meta.json"
_FIELDS = ("request_id", "queued_ts", "first_token_ts", "last_token_ts", "output_toks")
_FORMATS = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}


def runs(data: Path) -> list[Path]:
    """The `_requests.jsonl` files under a folder (or the one file given) that have a `_meta.json` beside them."""
    found = sorted(data.rglob(f"*{_REQUESTS}")) if data.is_dir() else [data] if data.name.endswith(_REQUESTS) else []
    return [path for path in found if _beside(path).is_file()]


def _beside(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(_REQUESTS) + _META)


@dataclass(frozen=True)
class Times:
    """Seconds to the first token, and per further token (NaN for answers of one), of requests in the order they came."""

    ttft: NDArray[np.float64]
    tpot: NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """A recorded run; raises NarrowsError that names file, line and field for one that is not complete."""

    path: Path

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What is known of engine, model and device."""
        try:
            found = json.loads(_beside(self.path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise NarrowsError(f"cannot be read ({error}).", where=str(_beside(self.path)), remedy="Give JSON.") from error
        if not isinstance(found, dict) or not isinstance(found.get("engine_kwargs"), dict):
            raise NarrowsError("it has no engine_kwargs.", where=str(_beside(self.path)), remedy="Give the engine's arguments.")
        return found

    @cached_property
    def requests(self) -> tuple[Request, ...]:
        """What arrived, and when."""
        return tuple(read(self.path))

    @cached_property
    def measured(self) -> Times:
        """What its clients saw."""
        rows = []
        for line, text in enumerate(self.path.read_text("utf-8").splitlines(), 1):
            if not text.strip():
                continue
            row = json.loads(text)  # it is JSON: `requests` has read it
            missing = [name for name in _FIELDS if not isinstance(row.get(name), str if name == "request_id" else int | float)]
            at = f"{self.path.name}, line {line}"
            if missing:
                raise NarrowsError(f"it lacks {', '.join(missing)}.", where=at, remedy="Write each request with its times.")
            if not row["queued_ts"] < row["first_token_ts"] <= row["last_token_ts"]:
                raise NarrowsError("its times go backwards.", where=at, remedy="Check queued, first and last token.")
            rows.append([row[name] for name in _FIELDS[1:]])
        queued, first, last, tokens = np.array(rows, float).T
        return Times(first - queued, _per_token(last - first, tokens))

    @cached_property
    def blocks(self) -> int:
        """Blocks of keys and values that the engine reported; 0 where it did not."""
        return int((self.meta.get("kv_cache") or {}).get("num_gpu_blocks") or 0)

    @cached_property
    def machine(self) -> Machine:
        """The device it ran on, by its published name or that in the file's name."""
        return hardware((self.meta.get("hardware") or {}).get("device_name") or self.path.name, "device_name")

    def group(self, blocks: int, machine: Machine | None = None) -> Group:
        """The replicas as the run had them, on its own machine or another; 0 blocks: what is left of the memory."""
        given = self.meta["engine_kwargs"]
        dtype = _FORMATS.get(str(given.get("dtype", "bfloat16")))
        lacks = [name for name in ("quantization", "pipeline_parallel_size") if given.get(name) not in (None, 1)]
        if lacks or dtype is None:
            where = lacks[0] if lacks else "dtype"
            raise NotCovered(f"{given.get(where)!r} is not modelled here.", where=where, remedy="Judge plain runs.")
        version = tuple(int(part) for part in str(self.meta.get("vllm_version", "1.0")).split(".")[:2] if part.isdigit())
        cache = self.meta.get("kv_cache") or {}
        own = rules(
            "vllm-v1" if version >= (0, 8) else "vllm-v0",
            max_sequences=given.get("max_num_seqs"),
            max_tokens=given.get("max_num_batched_tokens"),
            block=cache.get("block_size"),
            prefix_cache=cache.get("enable_prefix_caching"),
        )
        graph = cast(graph_of(model(str(self.meta.get("model", "")))), DTYPES[dtype])
        tensor, replicas = (given.get(name) or 1 for name in ("tensor_parallel_size", "data_parallel_size"))
        share = cache.get("gpu_memory_utilization") or UTILIZATION
        return Group(graph, machine or self.machine, own, tensor, replicas, blocks, utilization=share)

    def simulated(self, blocks: int, machine: Machine | None = None) -> Times:
        """What its clients would have seen by the simulator."""
        answers: dict[str, Answer] = {}

        def keep(answer: Answer) -> None:
            answers[answer.request.name] = answer

        named = [replace(request, name=str(at)) for at, request in enumerate(self.requests)]
        outcome = serve(named, self.group(blocks, machine), each=keep)
        if outcome.rejected:
            raise NotCovered(f"{outcome.rejected} requests do not fit.", where="requests", remedy="Check model and device.")
        every = [answers[str(at)] for at in range(len(named))]
        first, last, arrival = (np.array(v, float) / PS for v in zip(*((a.first, a.last, a.request.arrival) for a in every),
                                                                     strict=True))  # fmt: skip
        return Times(first - arrival, _per_token(last - first, np.array([a.request.output for a in every], float)))


def _per_token(seconds: NDArray[np.float64], tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(tokens > 1, seconds / np.maximum(tokens - 1, 1), np.nan)


def figures(seconds: NDArray[np.float64]) -> dict[str, float]:
    """Mean and percentiles; NaN is left out."""
    there = seconds[~np.isnan(seconds)]
    return {"mean": float(there.mean())} | {f"p{q}": float(np.percentile(there, q)) for q in (50, 90, 99)}


def forecasts(path: Path) -> Iterator[tuple[str, Forecast]]:
    """(figure, forecast) of a run's later half: as it was given its blocks, where they are known, and without them."""
    run = Run(path)
    half = len(run.requests) // 2
    graph, place = run.group(run.blocks).graph, f"{run.group(run.blocks).graph.name} {run.machine.name}"
    lengths = [round(float(np.mean([getattr(r, what) for r in run.requests]))) for what in ("prompt", "output")]
    tensor = run.group(run.blocks).devices
    bounds = {
        "ttft": model_bound(graph, run.machine, Step.prefill(1, lengths[0]), tensor),
        "tpot": model_bound(graph, run.machine, Step.decode(1, lengths[0] + lengths[1] // 2), tensor),
    }
    for blocks in dict.fromkeys((run.blocks, 0)):
        times = run.simulated(blocks)
        for what, bound in bounds.items():
            name = f"recorded-vllm-{what}{'' if blocks else '-own-blocks'}"
            measured, predicted = (figures(getattr(t, what)[half:]) for t in (run.measured, times))
            for figure, value in measured.items():
                yield f"{path.name}: {figure}", Forecast(name, value, predicted[figure], f"recorded-{what}", bound, place)
