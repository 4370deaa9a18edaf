"""What Harmony claims: OPT-13B on four T4 behind one PCIe way, and gradients of a small model in its order."""

import math
from functools import cache
from itertools import groupby

from narrows.capture import capture
from narrows.experiments.pipelines import in_turn, largest_difference, whole
from narrows.free import cast
from narrows.graph import FP32
from narrows.host import host
from narrows.machine import machine
from narrows.simulate.pipeline import Order
from narrows.techniques.training_memory_offload.harmony import Harmony, Layers, Swapped

_MICROBATCHES, _SEQUENCE = 16, 1024


@cache
def _layers(technique: Harmony) -> Layers:
    return technique.layers(cast(capture("opt-13b"), FP32), machine("t4"), _SEQUENCE)


@cache
def _step(technique: Harmony) -> Swapped:
    return technique.step(_layers(technique), machine("t4"), _MICROBATCHES)


def swap_load(technique: Harmony) -> float:
    """Bytes to and from the host under virtual memory over the technique's."""
    virtual, ours = (sum(_step(one).moved_bytes.values()) for one in (technique.baseline(), technique))
    return virtual / ours


def throughput(technique: Harmony) -> float:
    """A step under virtual memory over the technique's, in time."""
    behind = host(technique.host)
    return _step(technique.baseline()).seconds(behind, False) / _step(technique).seconds(behind, technique.grouped)


def weight_swaps(technique: Harmony) -> float:
    """Bytes of weights that all devices move over three times those of the model."""
    layers = _layers(technique)
    return _step(technique).moved_bytes["weight"] * technique.devices / (3 * layers.count * layers.weight_bytes)


def visits(technique: Harmony) -> float:
    """Times that a layer is turned to, in a run of four stages; not a number unless gradients are those of the whole batch."""
    stages, microbatches = 4, 4
    order = Order((tuple(technique.passes(range(stages), microbatches)),))
    if largest_difference(in_turn(order, stages, microbatches), whole(stages)) > 1e-9:
        return math.nan
    return sum(1 for _ in groupby(order.ranks[0], key=lambda one: one.stage)) / stages
