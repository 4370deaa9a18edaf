"""What Fuyou claims: GPT-3 on one consumer GPU, simulated; and Adam with its states in files, run."""

import math
import tempfile
from functools import cache
from pathlib import Path

from narrows.errors import NarrowsError
from narrows.experiments.offloaded import same_weights
from narrows.machine import machine
from narrows.measured.published import Shape, decoder
from narrows.techniques.training_memory_offload.fuyou import Fuyou

_CONTEXT = 1024


@cache
def _tflops(technique: Fuyou, shape: Shape) -> float:
    try:
        return technique.best(decoder(shape, _CONTEXT), machine("rtx-4090"), _CONTEXT).tflop_per_s
    except NarrowsError:  # it does not fit
        return math.nan


def tflops_13b(technique: Fuyou) -> float:
    """TFLOP/s of the fastest way to train 13B."""
    return _tflops(technique, Shape(5120, 40, 40))


def gain_13b(technique: Fuyou) -> float:
    """The same over that of the baseline."""
    return tflops_13b(technique) / tflops_13b(technique.baseline())


def tflops_175b(technique: Fuyou) -> float:
    """TFLOP/s at 175B; not a number where it does not fit."""
    return _tflops(technique, Shape(12288, 96, 96))


def states_on_disk(technique: Fuyou) -> float:
    """Share of Adam's states that lie in files when the weights are those of Adam in memory."""
    with tempfile.TemporaryDirectory() as folder:
        return same_weights(Path(folder) if technique.overlapped else None, early=True)
