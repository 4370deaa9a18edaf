"""What GPipe claims: in simulation, on four processes that train a small model together, and against measured speed-ups."""

import math
from collections.abc import Sequence
from functools import cache

from narrows.capture import capture
from narrows.experiments.pipelines import in_processes, largest_difference, whole
from narrows.machine import machine
from narrows.simulate.pipeline import Work
from narrows.simulate.stages import cut
from narrows.step import Step
from narrows.techniques.training_parallelism.gpipe import GPipe

# samples/s of AmoebaNet-D (18, 256) on Tesla P40 by (devices, microbatches): torchgpipe, docs/benchmarks.rst
MEASURED = {
    (2, 1): 26.733, (2, 4): 41.133, (2, 32): 47.386,
    (4, 1): 26.827, (4, 4): 44.543, (4, 32): 72.412,
    (8, 1): 24.918, (8, 4): 70.065, (8, 32): 132.413,
}  # fmt: skip


def bubble(technique: GPipe) -> float:
    """Share of the time that the devices of a simulated pipeline do nothing."""
    return technique.play(Work.of(8, 32)).bubble


def linear_speedup(technique: GPipe) -> float:
    """The least speed-up over one device, over the number of devices."""
    graph, a100 = capture("llama-3.1-405b"), machine("a100-80gb")
    found = []
    for stages in (2, 4, 8):
        work = cut(graph, a100, Step.train(1, 2048), stages, 4 * stages)
        alone = technique.adapt(work)
        single = alone.microbatches * sum(sum(alone.of_kind(kind)) for kind in ("F", "I", "W"))
        found.append(single / technique.play(work).seconds / stages)
    return min(found)


def peak_memory(technique: GPipe) -> float:
    """The most activations that a rank holds, over what one device holds without the pipeline; infinite if gradients differ."""
    stages, layers, microbatches = 4, 24, 8
    kept, handed = 1 / microbatches, 0.25 / microbatches  # of one layer for one microbatch, in what it keeps for a batch
    each = layers / stages
    work = Work.of(stages, microbatches, held_bytes=kept * each, input_bytes=handed)
    peak = max(technique.play(work).peak_bytes.values()) / layers
    return peak if _gradient_difference(technique) < 1e-9 else math.inf


@cache
def _gradient_difference(technique: GPipe) -> float:
    stages, microbatches = 4, 4
    order = technique.order(Work.of(stages, microbatches))
    ours = in_processes(order, stages, microbatches if technique.split else 1, technique.recompute)
    return largest_difference(whole(stages), ours)


def measured_rank(technique: GPipe) -> float:
    """Spearman's correlation of simulated with measured throughput over devices and microbatches."""
    simulated = []
    for devices, microbatches in MEASURED:
        work = Work.of(devices, microbatches, *(1 / devices / microbatches,) * 3)
        simulated.append(1 / technique.play(work).seconds)
    return _spearman(simulated, list(MEASURED.values()))


def _spearman(xs: Sequence[float], ys: Sequence[float]) -> float:
    import numpy as np

    def ranks(values: Sequence[float]) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
        rounded = np.round(values, 9)  # equal predictions are ties
        return np.array([(rounded < v).sum() + (rounded == v).sum() / 2 for v in rounded])

    a, b = ranks(xs), ranks(ys)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() else 0.0
