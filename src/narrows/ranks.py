"""Collectives among several ranks of this machine: timed by size, and fitted as the latency and bandwidth of a link."""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from narrows.calibrate import relative_fit
from narrows.cost import cost
from narrows.costmodel import HOPS
from narrows.errors import NarrowsError
from narrows.graph import FP32, Op
from narrows.machine import Link, Machine
from narrows.step import Step

SIZES = tuple(4**n for n in range(4, 12))  # fp32 elements, 1 KB to 16 MB
ROUNDS = 5
PATIENCE_SECONDS = 60

Timing = tuple[str, int, float]  # collective, fp32 elements, seconds


def linked(machine: Machine, ranks: int, progress: Callable[[str], None] = lambda _: None) -> Machine:
    """The machine with the link that `ranks` processes on it see, over gloo (NCCL on GPUs): measured here in seconds.

    Raises NarrowsError for fewer than two ranks, for more than there are GPUs, and where the ranks cannot meet.
    """
    if ranks < 2:
        raise NarrowsError(f"{ranks} ranks exchange nothing.", where="--ranks", remedy="Give 2 or more.")
    backend = "nccl" if machine.kind == "gpu" else "gloo"
    progress(f"collectives of {ranks} ranks over {backend}")
    wire, reached = fit(backend, ranks, timings(ranks, backend))
    found = replace(machine, links=(wire,), efficiency={**machine.efficiency, **reached})
    source = f"measured by narrows calibrate: {ranks} ranks over {backend} on {machine.title}, torch {version('torch')}"
    return replace(found, sources=dict.fromkeys(found.figures(), source) | dict(machine.sources))


def fit(name: str, ranks: int, found: Sequence[Timing]) -> tuple[Link, dict[str, dict[str, float]]]:
    """The link, and what its collectives reach of it, from seconds = bytes sent / bandwidth + messages in a row x latency."""
    seconds = np.array([t for _, _, t in found])
    terms = np.array([_terms(kind, elements, ranks) for kind, elements, _ in found])
    per_byte, latency = relative_fit(terms, seconds)
    low, high = (float(q) for q in np.quantile(terms @ (per_byte, latency) / seconds, (0.1, 0.9)))  # predicted / measured
    exactly = {"link_base": 1e-9, "link_hop": 1.0, "link_ramp": 1e-9, "link_one_shot": 1e9}
    reached = {key: dict.fromkeys(("median", "low", "high"), value) for key, value in exactly.items()}
    reached["link"] = {"median": 1.0, "low": min(low, 1.0), "high": max(high, 1.0)}
    return Link(name, 1 / per_byte, latency), reached


def _terms(kind: str, elements: int, ranks: int) -> tuple[float, float]:
    """Bytes that each rank sends, and messages that follow one another, in the cost model's own count."""
    op = Op(kind, kind, {"elements": elements, "ranks": ranks}, act=FP32)
    return float(cost(op, Step.forward()).link_bytes), HOPS[kind] * (ranks - 1)


def timings(ranks: int, backend: str) -> list[Timing]:
    """Seconds of every collective and size, from `ranks` processes started for it, which end with it."""
    with tempfile.TemporaryDirectory(prefix="narrows-") as folder:
        meet = Path(folder) / "meet"
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "narrows.ranks", str(meet), str(rank), str(ranks), backend],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        end = time.monotonic() + PATIENCE_SECONDS
        try:  # one that failed lets the others wait for it: so they are asked in turn, and not waited for
            while any(process.poll() is None for process in started) and not any(process.returncode for process in started):
                if time.monotonic() > end:
                    raise NarrowsError(f"they took over {PATIENCE_SECONDS} s.", where="--ranks", remedy="Use fewer ranks.")
                time.sleep(0.05)
            failed = next((rank for rank, process in enumerate(started) if process.returncode), None)
        finally:
            for process in started:
                process.kill()
            said = [process.communicate() for process in started]
    if failed is not None:
        last = next((line for line in reversed(said[failed][1].splitlines()) if line.strip()), "no word")
        raise NarrowsError(f"rank {failed} stopped: {last[:200]}", where="--ranks", remedy=f"Does torch offer {backend} here?")
    return [(str(kind), int(elements), float(seconds)) for kind, elements, seconds in json.loads(said[0][0])]


def _run(meet: str, rank: int, ranks: int, backend: str) -> list[Timing]:
    """What one rank does: the same collectives in the same order as all others. Seconds are the slowest rank's, best round."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{meet}", rank=rank, world_size=ranks, timeout=timedelta(seconds=PATIENCE_SECONDS)
    )
    calls: dict[str, Callable[[Any, Any], object]] = {
        "all_reduce": lambda whole, part: dist.all_reduce(whole),
        "all_gather": lambda whole, part: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter": lambda whole, part: dist.reduce_scatter_tensor(part, whole),
        "all_to_all": lambda whole, part: dist.all_to_all_single(torch.empty_like(whole), whole),
    }
    found = []
    for elements in SIZES:
        size = math.ceil(elements / ranks) * ranks
        whole, part = torch.zeros(size, device=device), torch.zeros(size // ranks, device=device)
        for kind, call in calls.items():
            each = []
            for _ in range(ROUNDS + 2):  # the first two find routes and buffers
                dist.barrier()
                start = time.perf_counter()
                call(whole, part)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                each.append(time.perf_counter() - start)
            slowest = torch.tensor(each[2:], dtype=torch.float64, device=device)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            found.append((kind, size, float(slowest.min())))
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    answer = _run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    if sys.argv[2] == "0":
        print(json.dumps(answer))
