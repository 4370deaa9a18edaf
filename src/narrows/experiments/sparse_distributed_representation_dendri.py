"""What the theory of sparse representations claims, against random patterns that are drawn and counted."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from narrows.techniques.sparsity_pruning.sparse_distributed_representation_dendri import SparseRepresentation

TRIALS = 20_000
# inputs, active, wires, threshold, mixed patterns: chances of a few percent down to one in a thousand, which can be counted
_ALARMS = (
    (300, 15, 12, 3, 1),
    (800, 60, 30, 6, 1),
    (500, 40, 20, 5, 1),
    (400, 20, 8, 2, 1),
    (600, 24, 10, 5, 4),
    (800, 16, 10, 4, 5),
)
_MISSES = ((50, 8, 6, 0.1), (80, 20, 13, 0.2), (30, 10, 8, 0.1), (60, 12, 6, 0.25))  # active, wires, threshold, noise


def _drawn(rng: np.random.Generator, trials: int, population: int, size: int) -> NDArray[np.int64]:
    """Sets of `size` of a population, one a row, all equally likely."""
    return rng.random((trials, population), np.float32).argpartition(size, axis=1)[:, :size]


def _alarms(inputs: int, active: int, synapses: int, threshold: int, patterns: int) -> float:
    """Share of trials in which a random pattern has at least `threshold` active inputs on a randomly wired unit."""
    rng, found = np.random.default_rng(inputs + active), 0
    for _ in range(20):
        wired = np.zeros((TRIALS // 20, inputs), bool)
        for _ in range(patterns):
            np.put_along_axis(wired, _drawn(rng, len(wired), inputs, synapses), True, axis=1)
        seen = np.take_along_axis(wired, _drawn(rng, len(wired), inputs, active), axis=1)
        found += int((seen.sum(1) >= threshold).sum())
    return found / TRIALS


def _misses(active: int, synapses: int, threshold: int, noise: float) -> float:
    """Share of trials in which noise leaves fewer than `threshold` active inputs on the wires of a pattern."""
    rng = np.random.default_rng(active)
    on = np.ones((TRIALS, active), bool)
    np.put_along_axis(on, _drawn(rng, TRIALS, active, round(noise * active)), False, axis=1)
    left = np.take_along_axis(on, _drawn(rng, TRIALS, active, synapses), axis=1).sum(1)
    return float((left < threshold).mean())


def _standard_errors(said: float, counted: float) -> float:
    """How far a count of TRIALS is from the chance that was said, in standard errors of such a count."""
    return abs(counted - said) / math.sqrt(max(said * (1 - said), 1 / TRIALS) / TRIALS)


def false_positives(technique: SparseRepresentation) -> float:
    """The largest distance between counted and computed false alarms, on units of one pattern and of several."""
    far = []
    for inputs, active, synapses, threshold, patterns in _ALARMS:
        said = replace(technique, patterns=patterns).false_positives(inputs, active, synapses)[threshold]
        far.append(_standard_errors(float(said), _alarms(inputs, active, synapses, threshold, patterns)))
    return max(far)


def false_negatives(technique: SparseRepresentation) -> float:
    """The largest distance between counted and computed misses of patterns that noise has changed."""
    far = []
    for active, synapses, threshold, noise in _MISSES:
        said = replace(technique, noise=noise).false_negatives(active, synapses)[threshold]
        far.append(_standard_errors(float(said), _misses(active, synapses, threshold, noise)))
    return max(far)


def mixed_patterns(technique: SparseRepresentation) -> float:
    """Patterns that it says a unit can hold; NaN if the counted false alarms are more than it allows."""
    allowed = 0.002
    held = replace(technique, error=allowed).mixable(800, 16, 10, 6)
    counted = _alarms(800, 16, 10, 6, held)
    return float(held) if counted <= allowed + 3.5 * math.sqrt(allowed / TRIALS) else math.nan


def wires_for_a_billionth(technique: SparseRepresentation) -> float:
    """Wires over active inputs of the sparsest unit; NaN if whole-number arithmetic finds an error above a billionth."""
    inputs, active, allowed = 20_000, 400, Fraction(1, 10**9)
    wires, threshold = replace(technique, error=1e-9, noise=0.25, patterns=1).fewest(inputs, active)

    def chance(population: int, marked: int, drawn: int, counts: range) -> Fraction:
        ways = sum(math.comb(marked, k) * math.comb(population - marked, drawn - k) for k in counts)
        return Fraction(ways, math.comb(population, drawn))

    alarm = chance(inputs, active, wires, range(threshold, wires + 1))
    miss = chance(active, active - active // 4, wires, range(threshold))
    return wires / active if wires and alarm <= allowed and miss <= allowed else math.nan
