"""Measuring the machine that narrows runs on: a few seconds of matrix products and copies, written as a Machine."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from narrows.errors import NarrowsError, require
from narrows.machine import Machine, Memory

if TYPE_CHECKING:
    import torch

# (rows, inputs, outputs): shapes between a small encoder's and a 7B decoder's, none a power of two alone
SHAPES = ((128, 576, 1536), (32, 1536, 576), (256, 768, 3072), (64, 384, 1536), (256, 2048, 2048), (64, 4096, 4096))
# (channels in, channels out, side of the image, side of the kernel, stride): one of each kind in a ResNet
CONVOLUTIONS = ((64, 64, 56, 3, 1), (256, 512, 56, 1, 2), (256, 256, 14, 3, 1), (1024, 2048, 14, 1, 2), (2048, 512, 7, 1, 1))
STREAMS = ((576, 576), (576, 1536), (1536, 576), (2048, 2048), (4096, 4096), (576, 49152))  # inputs, outputs
STREAM_BYTES = 200_000_000  # so many bytes of matrices are read in turn: far beyond any cache that one core may fill


def cpu_seconds(work: Callable[[], object], rounds: int = 5, least: float = 0.01) -> list[float]:
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
    product with one row, which reads its matrix once: that is what decoding does. Tiles count as one number each,
    since what a shape loses is in those fractions already.
    """
    require("calibrating this machine", "hf", "torch", "transformers")
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return _measure(torch, progress)
    finally:
        torch.set_num_threads(threads)


def _measure(torch, progress: Callable[[str], None]) -> Machine:  # type: ignore[no-untyped-def]
    source = f"measured by narrows calibrate on {_cpu_name()}, one thread, torch {torch.__version__}"
    rates: dict[str, list[float]] = {}  # FLOP/s over the shapes, by format
    streams: dict[str, list[float]] = {}  # bytes/s of a one-row product, by format
    convolutions: dict[str, list[float]] = {}  # FLOP/s over the shapes, by dtype

    def measure(
        name: str, dtype: "torch.dtype", layer: Callable[[int, int], "torch.nn.Module"], shapes: int = len(SHAPES)
    ) -> None:
        progress(f"products in {name}")
        rates[name] = [
            2 * m * k * n / min(cpu_seconds(_call(layer(k, n), torch.ones(m, k, dtype=dtype)))) for m, k, n in SHAPES[:shapes]
        ]
        streams[name] = [_stream(partial(layer, k, n), torch.ones(1, k, dtype=dtype)) for k, n in STREAMS[:shapes]]

    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        measure(name, dtype, partial(_plain, dtype=dtype))
    for bits in (8, 4):
        for act, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            measure(f"int{bits}-{act}", dtype, partial(_packed, bits=bits), shapes=3)
    progress("copies and dispatch")
    source_tensor = torch.ones(STREAM_BYTES // 4)
    target = torch.empty_like(source_tensor)
    copied = [2 * source_tensor.nbytes / t for t in cpu_seconds(lambda: target.copy_(source_tensor))]
    dispatch = _dispatch_seconds(torch)
    peaks = {name: max(rates[name]) for name in ("fp32", "bf16")}
    bandwidth = max(max(copied), *(max(s) for s in streams.values()))
    efficiency = {"memory": _quantiles([c / bandwidth for c in copied]), "vector": {"median": 1.0, "low": 1.0, "high": 1.0}}
    for name, found in rates.items():
        peak = peaks[name.split("-")[-1]]
        efficiency[f"matmul-{name}"] = _quantiles([r / peak for r in found])
    for name, found in convolutions.items():
        efficiency[f"matmul-conv-{name}"] = _quantiles([r / peaks[name] for r in found])
    for name, found in streams.items():
        efficiency[f"memory-{name}"] = _quantiles([s / bandwidth for s in found])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine = Machine(
        name="here", title=f"{_cpu_name()}, one thread", kind="cpu", peak_flop_per_s=peaks,
        memories=(Memory("dram", memory, bandwidth),), links=(), units=1, launch_seconds=dispatch, kernel_seconds=dispatch,
        tile=(1, 1), power_watts=None, idle_watts=None, price_per_hour=None, storage=None, efficiency=efficiency,
        provenance="calibrated", sources={},
    )  # fmt: skip
    return replace(machine, sources=dict.fromkeys(machine.figures(), source))


def _call(layer: "torch.nn.Module", x: "torch.Tensor") -> Callable[[], object]:
    return lambda: layer(x)


def _packed(inputs: int, outputs: int, bits: int) -> "torch.nn.Module":
    import torch

    from narrows.modules.packed_linear import PackedLinear, int4, int8, quantized

    return PackedLinear.of(quantized(torch.ones(outputs, inputs), int4(64) if bits == 4 else int8()))


def _plain(inputs: int, outputs: int, dtype: "torch.dtype") -> "torch.nn.Module":
    import torch

    return torch.nn.Linear(inputs, outputs, bias=False, dtype=dtype)


def _convolution(inputs: int, outputs: int, side: int, kernel: int, stride: int, dtype: "torch.dtype") -> float:
    """FLOP per second of one convolution over one image."""
    import torch

    layer = torch.nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False, dtype=dtype)
    image = torch.ones(1, inputs, side, side, dtype=dtype)
    positions = (side // stride) ** 2
    return 2 * positions * inputs * outputs * kernel**2 / min(cpu_seconds(_call(layer, image)))


def _stream(layer: Callable[[], "torch.nn.Module"], x: "torch.Tensor") -> float:
    """Bytes per second at which one-row products read layers that no cache holds."""
    first = layer()
    size: int = sum(t.numel() * t.element_size() for t in (*first.parameters(), *first.buffers()))
    start = time.process_time()
    first(x)
    affordable = int(0.2 / (time.process_time() - start))  # a slow layer needs no more: the time is not the memory's
    layers = [first, *(layer() for _ in range(min(STREAM_BYTES // size, max(affordable, 4))))]

    def work() -> None:
        for one in layers:
            one(x)

    return len(layers) * size / min(cpu_seconds(work, rounds=2))


def _dispatch_seconds(torch) -> float:  # type: ignore[no-untyped-def]
    """What eager Python costs per kernel: the slope over the depth of a decoder so narrow that nothing else takes time.

    A bare `torch.add` takes a sixth of it: views, module calls and the cache's bookkeeping come with each kernel.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from narrows.capture.torch import from_module
    from narrows.step import Step
    from narrows.verify import generation_steps

    found = []
    for layers in (2, 14):
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 64,
        }
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes)).eval()
        kernels = sum(op.kernels * op.repeat for op in from_module(model, Step.decode(1, 32)))
        found.append((kernels, min(cpu_seconds(generation_steps(model, 32, 32)["decode"], rounds=15, least=0.01))))
    (few, short), (many, long) = found
    return max(long - short, 1e-9) / (many - few)


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
        raise NarrowsError(
            f"it cannot be made ({error.strerror}).", where=str(file.parent), remedy="Set NARROWS_HOME to a folder."
        ) from None
    found.save(file)
    return found
