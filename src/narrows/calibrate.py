"""Measuring the machine that narrows runs on: a few seconds of matrix products and copies, written as a Machine."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from narrows.errors import NarrowsError
from narrows.machine import Machine, Memory

if TYPE_CHECKING:
    import torch

# (rows, inputs, outputs): shapes between a small encoder's and a 7B decoder's, none a power of two alone
SHAPES = ((128, 576, 1536), (128, 1536, 576), (256, 768, 3072), (512, 1024, 1024), (256, 2048, 2048), (64, 4096, 4096))
STREAM_BYTES = 400_000_000  # far beyond any cache that one core may fill


def cpu_seconds(work: Callable[[], object], rounds: int = 5, least: float = 0.02) -> list[float]:
    """CPU seconds of one call, for each of `rounds` timings of at least `least` seconds; the first call is not counted."""
    work()
    start = time.process_time()
    work()
    repeats = max(1, int(least / max(time.process_time() - start, 1e-7)))
    found = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(repeats):
            work()
        found.append((time.process_time() - start) / repeats)
    return found


def calibrate(progress: Callable[[str], None] = lambda _: None) -> Machine:
    """This CPU, one thread, as a Machine: what a noisy shared machine can repeat. About 15 seconds; needs torch.

    Peaks are the best product measured, so that every fraction of them is below one; a format's fraction
    (`matmul-int4`) is the median over the shapes, with the 10 % and 90 % quantile. Bandwidths are those of a
    product with one row, which reads its matrix once: that is what decoding does.
    """
    import torch

    from narrows.modules.packed_linear import PackedLinear

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return _measure(torch, PackedLinear, progress)
    finally:
        torch.set_num_threads(threads)


def _measure(torch, packed, progress: Callable[[str], None]) -> Machine:  # type: ignore[no-untyped-def]
    source = f"measured by narrows calibrate on {_cpu_name()}, one thread, torch {torch.__version__}"
    rates: dict[str, list[float]] = {}  # FLOP/s over the shapes, by format
    streams: dict[str, list[float]] = {}  # bytes/s of a one-row product, by format
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        progress(f"matrix products in {name}")
        rates[name] = [2 * m * k * n / min(cpu_seconds(_product(torch, m, k, n, dtype))) for m, k, n in SHAPES]
        count = STREAM_BYTES // 2 // (4096 * torch.tensor([], dtype=dtype).element_size())
        streams[name] = [count * 4096 * torch.tensor([], dtype=dtype).element_size() / t for t in cpu_seconds(_product(torch, 1, 4096, count, dtype))]
    for name, bits in (("int8", 8), ("int4", 4)):
        progress(f"packed {name} layers")
        rates[name] = [2 * m * k * n / min(cpu_seconds(_packed(torch, packed, m, k, n, bits), rounds=3)) for m, k, n in SHAPES[1:4]]
        streams[name] = [4096 * 11008 * bits / 8 / t for t in cpu_seconds(_packed(torch, packed, 1, 4096, 11008, bits))]
    progress("copies and dispatch")
    source_tensor = torch.ones(STREAM_BYTES // 8)
    target = torch.empty_like(source_tensor)
    copied = [2 * source_tensor.nbytes / t for t in cpu_seconds(lambda: target.copy_(source_tensor))]
    little = torch.ones(8)
    dispatch = min(cpu_seconds(lambda: torch.add(little, little)))
    peaks = {name: max(rates[name]) for name in ("fp32", "bf16")}
    bandwidth = max(max(copied), *(max(s) for s in streams.values()))
    efficiency = {"memory": _quantiles([c / bandwidth for c in copied]), "vector": {"median": 1.0, "low": 1.0, "high": 1.0}}
    for name, found in rates.items():
        peak = peaks.get(name, peaks["bf16"])
        efficiency[f"matmul-{name}"] = _quantiles([r / peak for r in found])
    for name, found in streams.items():
        efficiency[f"memory-{name}"] = _quantiles([s / bandwidth for s in found])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine = Machine(
        name="here", title=f"{_cpu_name()}, one thread", kind="cpu", peak_flop_per_s=peaks,
        memories=(Memory("dram", memory, bandwidth),), links=(), units=1, launch_seconds=dispatch, kernel_seconds=dispatch,
        tile=(16, 16), power_watts=None, idle_watts=None, price_per_hour=None, storage=None, efficiency=efficiency,
        provenance="calibrated", sources={},
    )  # fmt: skip
    return replace(machine, sources=dict.fromkeys(machine.figures(), source))


def _product(torch, rows: int, inputs: int, outputs: int, dtype: "torch.dtype") -> Callable[[], object]:  # type: ignore[no-untyped-def]
    x, w = torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
    return lambda: torch.nn.functional.linear(x, w)


def _packed(torch, packed, rows: int, inputs: int, outputs: int, bits: int) -> Callable[[], object]:  # type: ignore[no-untyped-def]
    layer = packed.from_linear(torch.nn.Linear(inputs, outputs, bias=False), bits=bits)
    x = torch.ones(rows, inputs)
    return lambda: layer(x)


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    low, median, high = (float(q) for q in np.quantile(values, (0.1, 0.5, 0.9)))
    return {"median": median, "low": low, "high": high}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        return names[0] if names else platform.machine()
    return platform.processor() or platform.machine()


def here_file() -> Path:
    """Where the calibrated machine of this computer is kept between runs (`NARROWS_HOME`, by default ~/.cache/narrows)."""
    return Path(os.environ.get("NARROWS_HOME", Path.home() / ".cache" / "narrows")) / "here.toml"


def here(progress: Callable[[str], None] = lambda _: None) -> Machine:
    """This machine, from the file that an earlier calibration left, or calibrated now and kept."""
    from narrows.machine import machine

    file = here_file()
    if file.is_file():
        return machine(file)
    found = calibrate(progress)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NarrowsError(f"it cannot be made ({error.strerror}).", where=str(file.parent), remedy="Set NARROWS_HOME to a folder.") from None
    found.save(file)
    return found
