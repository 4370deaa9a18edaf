"""Whether DI ranks networks by energy efficiency better than plain arithmetic intensity does.

No energy meter is at hand: the energy is modelled from published access energies and a memory hierarchy, layer by layer.
"""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

from narrows.experiments.networks import NETWORKS, network
from narrows.graph import Op
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.profiling_cost_models.di_data_type_aware_arithmetic_intensity import DataTypeAwareIntensity

# pJ in 45 nm: Horowitz, Computing's Energy Problem, ISSCC 2014, figure 1.1.9; an access is one 32-bit number
_MAC, _SRAM_32K, _SRAM_1M, _DRAM = 3.7 + 0.9, 10.0, 50.0, 640.0
_REGISTERS, _BLOCK, _BUFFER = 8, 64, 2**17  # side of a register tile, channels of a block; half of 1 MiB, in numbers
BATCH = 8


def energy_rank_correlation(technique: DataTypeAwareIntensity) -> float:
    """Spearman's correlation between DI and modelled energy efficiency (MAC per joule) over all networks."""
    return correlation(technique, list(NETWORKS))


def gain_over_plain(technique: DataTypeAwareIntensity) -> float:
    """How much better DI correlates than plain intensity over all networks."""
    return correlation(technique, list(NETWORKS)) - correlation(technique.baseline(), list(NETWORKS))


def gain_held_out(technique: DataTypeAwareIntensity) -> float:
    """The same on every second network, those that the default share was not chosen on."""
    held_out = list(NETWORKS)[1::2]
    return correlation(technique, held_out) - correlation(technique.baseline(), held_out)


def correlation(technique: DataTypeAwareIntensity, names: Sequence[str], batch: int = BATCH) -> float:
    """Spearman's rank correlation of DI with modelled energy efficiency at a batch size."""
    somewhere, one = machine("a100-80gb"), Step.forward()
    indicated = [technique.measure(network(name), somewhere, one).values["di"] for name in names]
    ranks = [np.argsort(np.argsort(values)) for values in (indicated, [efficiency(name, batch) for name in names])]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


@cache
def efficiency(name: str, batch: int) -> float:
    """Multiply-adds per picojoule of a network on a batch of images."""
    step = Step.forward(batch)
    layers = [_layer(op, step) for op in network(name)]
    return sum(macs for macs, _ in layers) / sum(energy for _, energy in layers)


def _layer(op: Op, step: Step) -> tuple[float, float]:
    """(multiply-adds, picojoules) of one layer: `groups` products of rows x inner x columns."""
    d = op.sized(step)
    if op.kind == "conv":
        groups, rows, columns = d["groups"], d["positions"], d["out_channels"] / d["groups"]
        inner, read = d["kernel"] * d["in_channels"] / groups, d["in_positions"] * d["in_channels"]
    else:
        groups, rows, columns, inner, read = 1, d["rows"], d["outputs"], d["inputs"], d["rows"] * d["inputs"]
    macs, weights, written = groups * rows * columns * inner, groups * columns * inner, groups * rows * columns
    # a tile of registers uses each number that it loads once per row or column of the tile
    near = macs * (1 / min(columns, _REGISTERS) + 1 / min(rows, _REGISTERS)) + written
    # a block reads its part of the map once for all its output channels, and its weights once for all its positions
    middle = read * math.ceil(columns / _BLOCK) + weights * math.ceil(rows / _BLOCK**2) + written
    # what does not fit the buffer is read again for every part of the other that does; the better order is taken
    far = min(weights + read * math.ceil(weights / _BUFFER), read + weights * math.ceil(read / _BUFFER)) + written
    return macs, _MAC * macs + _SRAM_32K * near + _SRAM_1M * middle + _DRAM * far
