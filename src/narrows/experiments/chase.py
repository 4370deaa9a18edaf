"""What Chase claims, on ResNet-50 as diagnosed on an A40 and on seeded grids: carbon, time, and what each part brings."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from statistics import fmean

from narrows.capture import capture
from narrows.diagnose import diagnose
from narrows.energy import Curve
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.profiling_cost_models.chase import GRIDS, Chase, Run

_BATCH = 256
_IMAGES = 90 * 1_281_167  # 90 epochs of ImageNet
_STARTS = 8


@cache
def _job() -> tuple[Curve, float]:
    """The curve of a training step, and the hours of the whole training at full power."""
    found = diagnose(capture("resnet-50"), machine("a40"), Step.train(_BATCH, 1))
    assert found.energy
    return found.energy.curve, found.seconds * _IMAGES / _BATCH / 3600


def _runs(technique: Chase) -> Iterator[tuple[Chase, Run, Run]]:
    """The technique on each start of each grid, its run and the run at full power."""
    curve, hours = _job()
    for grid, seed in product(GRIDS, range(_STARTS)):
        ours = replace(technique, grid=grid, seed=seed, hours=hours)
        trace = ours.intensities()
        yield ours, ours.run(curve, trace), replace(ours, policy="off").run(curve, trace)


@cache
def _means(technique: Chase) -> tuple[float, float]:
    """Mean carbon saved and mean time added, in %."""
    found = [(1 - ours.grams / full.grams, ours.hours / full.hours - 1) for _, ours, full in _runs(technique)]
    return fmean(saved for saved, _ in found) * 100, fmean(added for _, added in found) * 100


def carbon_saved(technique: Chase) -> float:
    """Carbon saved against full power; NaN if training takes over 3 % longer."""
    saved, added = _means(technique)
    return saved if added <= 3.0 else math.nan


def time_per_carbon(technique: Chase) -> float:
    """Time added over carbon saved; NaN where none is saved."""
    saved, added = _means(technique)
    return added / saved if saved else math.nan


def gain_of_chasing(technique: Chase) -> float:
    """Mean carbon saved beyond a constant limit that takes as long in the same run."""
    found = []
    for ours, run, full in _runs(technique):
        added = run.hours / full.hours - 1
        same = replace(ours, policy="constant", budget=added) if added else ours
        found.append((same.run(_job()[0], ours.intensities()).grams - run.grams) / full.grams)
    return 100 * fmean(found)


def gain_of_forecast(technique: Chase) -> float:
    """Carbon saved beyond the controller that acts on the last hour, in the same mean running time."""
    saved, added = _means(technique)
    if not added:
        return 0.0
    other = replace(technique, policy="reactive")
    for _ in range(3):  # history and run differ: meet the other's running time, not its budget
        rival, took = _means(other)
        other = replace(other, budget=other.budget * added / took)
    return saved - rival
