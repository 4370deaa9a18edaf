"""Measuring the machine that narrows runs on: under a minute of kernels and small networks, written as a Machine."""

import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np

from narrows import probes
from narrows.cost import Cost, cost
from narrows.costmodel import dispatch_seconds, op_time, peak, useful
from narrows.errors import NarrowsError, require
from narrows.gain import parts
from narrows.graph import BF16, FP32, Op
from narrows.machine import Machine, Memory
from narrows.probes import Probe, graph_of
from narrows.staging import home
from narrows.step import Step

Progress = Callable[[str], None]
Times = list[tuple[Probe, float]]
Efficiency = dict[str, dict[str, float]]
PASS_SECONDS = 0.04  # one pass over the layers of a probe: enough of them to leave the caches, and no more
ACTS = (FP32, BF16)


def cpu_seconds(work: Callable[[], object], rounds: int = 5, least: float = 0.01) -> list[float]:
    """CPU seconds of one call, for each of `rounds` timings of at least `least` seconds; the first call is not counted."""
    return _timed(work, rounds, least, time.process_time, lambda: None)


def cuda_seconds(work: Callable[[], object], rounds: int = 5, least: float = 0.01) -> list[float]:
    """Seconds of one call on the GPU that torch uses, waiting for its end; as `cpu_seconds` otherwise."""
    import torch

    return _timed(work, rounds, least, time.perf_counter, torch.cuda.synchronize)


def _timed(
    work: Callable[[], object], rounds: int, least: float, clock: Callable[[], float], wait: Callable[[], None]
) -> list[float]:
    def timing(repeats: int) -> float:
        wait()
        start = clock()
        for _ in range(repeats):
            work()
        wait()
        return (clock() - start) / repeats

    timing(1)
    once = timing(1)
    repeats = max(1, int(least / max(once, 1e-7)))
    return [once, *(timing(1) for _ in range(rounds - 1))] if repeats == 1 else [timing(repeats) for _ in range(rounds)]


@dataclass(frozen=True)
class Bench:
    """Where probes run and how long they take: a device as torch names it, a timer, and what makes a call bare of the host.

    `seconds` of a probe is the mean over its calls, of the best of a few rounds.
    """

    device: str
    title: str
    kind: str
    memory_bytes: float
    units: int
    timer: Callable[[Callable[[], object], int, float], list[float]]
    recorded: Callable[[Callable[[], object]], Callable[[], object]] = lambda work: work

    def seconds(self, probe: Probe) -> float:
        import torch

        whole = len(probe.ops) > 1 or probe.op.repeat > 1  # a network runs as the user runs it, host and all
        with torch.inference_mode():
            calls = probe.calls()
            first = next(calls)
            each = min(self.timer(first, 1, 0.0))
            cycle = [first, *islice(calls, max(1, int(PASS_SECONDS / each)))]

            def work() -> None:
                for call in cycle:
                    call()

            best = min(self.timer(work, 5, 0.05) if whole else self.timer(self.recorded(work), 3, 0.01))
        return best / len(cycle)


def bench_of(device: str = "auto") -> Bench:
    """The bench of `cpu` (one thread, CPU seconds), `cuda`, or `auto`: cuda where there is one. NarrowsError without it."""
    import torch

    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise NarrowsError(
            "torch finds no CUDA device.", where="--device cuda", remedy="Use --device cpu, or install torch for CUDA."
        )
    if device == "cpu" or not there:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Bench("cpu", f"{_cpu_name()}, one thread", "cpu", memory, 1, cpu_seconds)
    gpu = torch.cuda.get_device_properties()
    return Bench("cuda", gpu.name, "gpu", gpu.total_memory, gpu.multi_processor_count, cuda_seconds, _cuda_graph)


def _cuda_graph(work: Callable[[], object]) -> Callable[[], object]:
    """The kernels of `work` recorded once and launched together, so that their time is the device's and not the host's."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay  # type: ignore[no-any-return]


def calibrate(progress: Progress = lambda _: None, device: str = "auto") -> Machine:
    """This machine, as a Machine that predicts what torch reaches on it: under a minute; needs torch.

    A CPU is measured on one thread in CPU seconds, which is what a noisy shared machine can repeat. Peaks and bandwidth
    are the best of the large products and copies. What each class of kernel reaches of them (`efficiency`) is what makes
    the cost model give the measured time: by row count for products, keys for attention, bytes for what is streamed.
    At last small networks are timed as well: how far off their predictions are is the 80 % interval of every other.
    """
    require("calibrating this machine", "hf", "torch", "transformers")
    import torch

    bench = bench_of(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measured(bench, progress)
    finally:
        torch.set_num_threads(threads)


def measured(bench: Bench, progress: Progress = lambda _: None) -> Machine:
    """The machine behind a bench: `calibrate` for any place that probes can be timed on."""

    def timed(found: Iterable[Probe]) -> Times:
        out = []
        for probe in found:
            progress(probe.name)
            out.append((probe, bench.seconds(probe)))
        return out

    where = bench.device
    formats = {act.name: timed(probes.products(act, where)) for act in ACTS}
    copied = timed([probes.copies(where)])
    machine = _outline(bench, formats, copied, *timed([probes.smallest(where)]))
    if bench.kind == "cpu":  # torch multiplies packed weights on CPUs alone
        formats |= {f"int{bits}-{act.name}": timed(probes.products(act, where, bits)) for bits in (8, 4) for act in ACTS}
    found: Efficiency = {"memory": _spread([_streamed(machine, *copied[0])])}
    found |= {f"dispatch-matmul-{name}": _dispatch(machine, times) for name, times in formats.items()}
    machine = replace(machine, efficiency=found)
    for name, times in formats.items():
        found |= _of_products(machine, name, times)
    for act in ACTS:
        form = act.name
        found |= _by_size(f"memory-norm-{form}", timed(probes.norms(act, where)), machine, _streamed, _written)
        found |= _by_size(f"memory-pointwise-{form}", timed(probes.pointwise(act, where)), machine, _streamed, _written)
        found |= _by_size(f"attention-{form}", timed(probes.attention(act, where)), machine, _computed, lambda op: op["context"])
        found[f"vector-{form}"] = _spread([_computed(machine, *each) for each in timed(probes.transcendentals(act, where))])
        for depthwise in (False, True):
            arithmetic = f"matmul-conv{'-depthwise' * depthwise}-{form}"
            memory = f"memory-{form}-{form}-{'depthwise' if depthwise else 'conv'}"
            smallest, *others = timed(probes.convolutions(act, where, depthwise))
            found[f"dispatch-{arithmetic}"] = dispatch = _share(machine, smallest[1])
            starting = replace(machine, efficiency={**machine.efficiency, f"dispatch-{arithmetic}": dispatch})
            found[arithmetic], found[memory] = _roofline(starting, others)
    machine = _judged(replace(machine, efficiency=found), timed(probes.networks(where)))
    source = f"measured by narrows calibrate on {bench.title}, torch {version('torch')}"
    return replace(machine, sources=dict.fromkeys(machine.figures(), source))


def _judged(machine: Machine, whole: Times) -> Machine:
    """The machine fitted to whole steps, and how far off it is on each when fitted to the others alone: on its time
    (`step`), and on how much faster it is than the same step in another format (`gain`)."""
    off = []
    for i, (probe, seconds) in enumerate(whole):
        off.append(seconds / predicted(probe, _in_networks(machine, whole[:i] + whole[i + 1 :])))
    fitted = _in_networks(machine, whole)
    known = {"step": interval(off), "gain": _gains(fitted, [probe for probe, _ in whole], np.log(off))}
    return replace(fitted, efficiency={**fitted.efficiency, **{name: found for name, found in known.items() if found}})


def _gains(machine: Machine, whole: Sequence[Probe], off: Any) -> dict[str, float]:
    """The interval that every constant would need for four of five gains to lie inside theirs (see `gain`).

    A gain is that of a step over the same one in another format; nothing where there are no two such steps. Pairs of three
    formats share an error, so that steps rather than pairs are what the spread is known from.
    """
    alike = replace(machine, efficiency={**machine.efficiency, "gain": {"median": 1.0, "low": 1 / math.e, "high": math.e}})
    made = [parts(graph_of(probe), alike, probe.step) for probe in whole]
    errors, steps = [], set[int]()
    for i, j in combinations(range(len(whole)), 2):
        if whole[i].network == whole[j].network and whole[i].step == whole[j].step:
            errors.append((off[i] - off[j]) / made[i].distance(made[j]))
            steps |= {i, j}
    if len(errors) < 2:
        return {}
    half = _half_width(len(steps) // 2 + 1) * math.sqrt(float(np.mean(np.square(errors))))
    return {"median": 1.0, "low": math.exp(-half), "high": math.exp(half)}


def _in_networks(machine: Machine, whole: Times) -> Machine:
    """The machine with what whole steps show: launches, and how much less kernels reach among others.

    In a network the kernels in between use the same caches, and so does the code that launches them: a loop over one
    small kernel takes a third of what it costs there. A CPU does both one after the other, so each step is a sum of them;
    a GPU computes while the host launches, so the step with the least to compute shows the host alone.
    """
    seconds = np.array([t for _, t in whole])
    kernels = np.array([sum(op.kernels * op.repeat for op in probe.ops) for probe, _ in whole], dtype=float)
    bare = replace(machine, launch_seconds=1e-12)
    bodies = np.array([predicted(probe, bare) for probe, _ in whole])
    if machine.kind == "cpu":
        slower, launch = relative_fit(np.stack([bodies, kernels], 1), seconds)
    else:
        slower, launch = float(np.median(seconds / bodies)), float(np.min(seconds / kernels))
    reached = {name: {key: value / slower for key, value in each.items()} for name, each in machine.efficiency.items()}
    machine = replace(machine, launch_seconds=launch, efficiency=reached)
    return replace(machine, efficiency={**reached, **_depthwise(machine, whole)})


def _depthwise(machine: Machine, whole: Times) -> Efficiency:
    """What convolutions of each channel by itself reach, by dtype, in the networks that have them, whose caches are not warm."""
    found: Efficiency = {}
    for act in ACTS:
        slower = []
        for probe, seconds in whole:
            own = tuple(op for op in probe.ops if op.kind == "conv" and op["groups"] == op["in_channels"] != 1 and op.act == act)
            if own:
                alone = predicted(replace(probe, ops=own), machine)
                slower.append(max(seconds - predicted(probe, machine) + alone, alone / 2) / alone)
        for name in (f"matmul-conv-depthwise-{act.name}", f"memory-{act.name}-{act.name}-depthwise") if slower else ():
            found[name] = {key: value / float(np.median(slower)) for key, value in machine.efficiency[name].items()}
    return found


def relative_fit(terms: Any, seconds: Any) -> tuple[float, float]:
    """The two factors, not below zero, with which `terms` [n, 2] sum to `seconds` [n]: least squares of the relative error.

    The worst are weighed down, with Huber's weights at one and a half median errors.
    """
    share = terms / seconds[:, None]
    weight, found = np.ones(len(seconds)), np.zeros(2)
    for _ in range(20):
        found = np.linalg.lstsq(share * weight[:, None], weight, rcond=None)[0]
        if found.min() < 0:  # one term alone explains them better
            kept = int(found.argmax())
            a = share[:, kept] * weight
            found = np.eye(2)[kept] * float(a @ weight) / float(a @ a)
        error = np.abs(share @ found - 1)
        weight = np.sqrt(np.minimum(1.0, (1.5 * np.median(error) + 1e-9) / np.maximum(error, 1e-9)))
    return max(float(found[0]), 1e-15), max(float(found[1]), 1e-15)


def predicted(probe: Probe, machine: Machine) -> float:
    """Seconds that the cost model expects of a probe."""
    return math.fsum(float(op_time(op, probe.step, machine, eager=True).seconds) for op in probe.ops)


def _outline(bench: Bench, products: dict[str, Times], copied: Times, smallest: tuple[Probe, float]) -> Machine:
    """The machine with its best rates, as if every kernel reached them and cost no more than one with nothing to do."""
    rates = {name: max(float(_work(probe).flop) / seconds for probe, seconds in times) for name, times in products.items()}
    streams = [_moved(probe) / seconds for times in (*products.values(), copied) for probe, seconds in times
               if probe is copied[0][0] or probe.op["rows"] == 1]  # fmt: skip
    bare = smallest[1] / smallest[0].op.kernels
    gpu = bench.kind == "gpu"
    memory = Memory("hbm" if gpu else "dram", bench.memory_bytes, max(streams))
    return Machine(
        name="here", title=bench.title, kind=bench.kind, peak_flop_per_s=rates, memories=(memory,), links=(),
        units=bench.units, launch_seconds=bare, kernel_seconds=bare, tile=(128, 128) if gpu else (1, 1),
        power_watts=None, idle_watts=None, price_per_hour=None, storage=None, efficiency={}, provenance="calibrated", sources={},
    )  # fmt: skip


def _work(probe: Probe) -> Cost:
    return cost(probe.op, probe.step, eager=True)


def _moved(probe: Probe) -> float:
    return float(_work(probe).read_bytes + _work(probe).write_bytes)


def _written(op: Op) -> float:
    return float(cost(op, Step.forward(), eager=True).write_bytes) / op.kernels


def _busy(machine: Machine, probe: Probe, seconds: float) -> float:
    """Seconds without what a kernel of this class costs that has nothing to do."""
    each = machine.kernel_seconds + dispatch_seconds(probe.op, machine)
    return max(seconds - each * float(_work(probe).launches), seconds / 2)


def _computed(machine: Machine, probe: Probe, seconds: float) -> float:
    """The share of the arithmetic peak with which the cost model gives the measured time."""
    op = probe.op
    ideal = float(_work(probe).flop) / peak(op, machine) / float(useful(op, op.sized(probe.step), machine))
    return ideal / _busy(machine, probe, seconds)


def _streamed(machine: Machine, probe: Probe, seconds: float) -> float:
    """The share of the bandwidth with which the cost model gives the measured time."""
    return _moved(probe) / machine.memory.bandwidth_bytes_per_s / _busy(machine, probe, seconds)


def _dispatch(machine: Machine, times: Times) -> dict[str, float]:
    """The share of a product's fixed time that the smallest kernel needs: what the bytes of a small matrix do not explain,
    at the rate of a large one of as many inputs."""
    (small, fast), (large, slow) = (next(t for t in times if (t[0].op["inputs"], t[0].op["outputs"]) == shape)
                                    for shape in probes.STREAMED[:2])  # fmt: skip
    fixed = fast - _moved(small) * (slow - fast) / (_moved(large) - _moved(small))
    return _share(machine, fixed)


def _share(machine: Machine, fixed: float) -> dict[str, float]:
    """What the smallest kernel takes of the fixed time of another."""
    return _spread([min(machine.kernel_seconds / max(fixed, 1e-12), 1.0)])


def _of_products(machine: Machine, name: str, times: Times) -> Efficiency:
    """Bandwidth by inputs, from one row, and arithmetic by rows, where more rows take longer than one."""
    single = {(p.op["inputs"], p.op["outputs"]): seconds for p, seconds in times if p.op["rows"] == 1}
    bound = [(p, t) for p, t in times if p.op["rows"] == max(probes.ROWS) or t > 1.2 * single[p.op["inputs"], p.op["outputs"]]]
    alone = [(p, t) for p, t in times if p.op["rows"] == 1]
    return {
        **_by_size(f"memory-{name}", alone, machine, _streamed, lambda op: op["inputs"]),
        **_by_size(f"matmul-{name}", bound, machine, _computed, lambda op: op["rows"]),
    }


def _by_size(
    name: str, times: Times, machine: Machine, solve: Callable[[Machine, Probe, float], float], size: Callable[[Op], Any]
) -> Efficiency:
    """What is reached at each size: `name-at32`."""
    groups: dict[int, list[float]] = {}
    for probe, seconds in times:
        groups.setdefault(int(size(probe.op)), []).append(solve(machine, probe, seconds))
    return {f"{name}-at{at}": _spread(values) for at, values in sorted(groups.items())}


def _roofline(machine: Machine, times: Times) -> tuple[dict[str, float], dict[str, float]]:
    """The shares of the arithmetic peak and of the bandwidth that together explain the times best (least absolute log error)."""
    compute = np.array([_computed(machine, *each) for each in times])  # what each would need if nothing else bound it
    memory = np.array([_streamed(machine, *each) for each in times])
    at = [np.log(np.maximum(compute / c, memory / m)) for c in compute for m in memory]
    best = min(range(len(at)), key=lambda i: float(np.abs(at[i]).sum()))
    c, m = compute[best // len(memory)], memory[best % len(memory)]
    low, high = (float(q) for q in np.exp(np.quantile(at[best], (0.1, 0.9))))
    ends = [{"median": float(k), "low": float(k) * min(low, 1.0), "high": float(k) * max(high, 1.0)} for k in (c, m)]
    return ends[0], ends[1]


def interval(off: Sequence[float]) -> dict[str, float]:
    """Where a further step's measured / predicted lies in 80 % of cases, if its logarithm is normal: Student's t of n - 1."""
    logs = np.log(off)
    width = _half_width(len(logs)) * float(logs.std(ddof=1)) * math.sqrt(1 + 1 / len(logs))
    center = float(logs.mean())
    return {"median": math.exp(center), "low": math.exp(center - width), "high": math.exp(center + width)}


def _half_width(n: int) -> float:
    """Standard deviations on either side of the mean that hold 80 % of Student's t of n - 1."""
    z = 1.2816
    return z + (z**3 + z) / (4 * (n - 1))


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, median, high = (float(q) for q in np.quantile(values, (0.1, 0.5, 0.9)))
    return {"median": median, "low": low, "high": high}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        return names[0] if names else platform.machine()
    return platform.processor() or platform.machine()


def here_file() -> Path:
    """Where the calibrated machine of this computer is kept between runs."""
    return home() / "here.toml"


def keep(found: Machine, file: Path) -> None:
    """Write a machine, whole or not at all, in a folder that is made where it is missing; NarrowsError where it cannot."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"it cannot be made ({error.strerror})."
        raise NarrowsError(problem, where=str(file.parent), remedy="Set NARROWS_HOME, or give --out.") from None
    found.save(file)


def here(progress: Progress = lambda _: None) -> Machine:
    """This machine, from the file that an earlier calibration left, or calibrated now and kept.

    A file by a calibration that did not judge gains yet is made anew: its bandwidths are by other sizes.
    """
    from narrows.machine import machine

    file = here_file()
    if file.is_file():
        kept = machine(file)
        if "gain" in kept.efficiency or "step" not in kept.efficiency:
            return kept
    found = calibrate(progress)
    keep(found, file)
    return found
