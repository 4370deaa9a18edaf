"""What POLCA claims, on a simulated row: Azure's conversations of 2023 where that trace lies beside the clone, else synthetic."""

import math
from dataclasses import replace
from functools import cache

from narrows.capture import capture
from narrows.machine import machine
from narrows.simulate.row import Phases
from narrows.techniques.profiling_cost_models.polca import Polca, Row
from narrows.validate import ROOT

_TRACE = ROOT.parent / "shared" / "data" / "traces" / "azure2023_conv.csv"


@cache
def _phases() -> Phases:
    return Polca().phases(capture("bloom-176b"), machine("a100-80gb"))


@cache
def _row(technique: Polca) -> Row:
    return replace(technique, trace=str(_TRACE) if _TRACE.is_file() else "").row(_phases())


def brakes(technique: Polca) -> float:
    """How often the feed's brake fell."""
    return _row(technique).brakes


def _losses(technique: Polca) -> tuple[float, float]:
    found = _row(technique)
    return (math.nan, math.nan) if found.brakes else (found.low_loss, found.high_loss)


def high_priority_loss(technique: Polca) -> float:
    """Median latency lost by high priority; NaN where the brake fell."""
    return _losses(technique)[1]


def low_priority_loss(technique: Polca) -> float:
    """Median latency lost by low priority; NaN where the brake fell."""
    return _losses(technique)[0]


def extra_servers(technique: Polca) -> float:
    """The most servers, in % and steps of 5, that meet all objectives, with each step below them."""
    for percent in range(5, 55, 5):
        low, high = _losses(replace(technique, extra=percent / 100))
        if not (low <= 5.0 and high <= 1.0):
            return percent - 5.0
    return 50.0
