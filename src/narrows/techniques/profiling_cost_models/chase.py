"""Lower a GPU's power limit while the grid's electricity is dirty, and run at full speed while it is clean.

Once an hour a controller reads the grid's carbon intensity and takes the power limit at which a unit of work costs least, if
an hour costs a price: (intensity x watts + price) x seconds. Watts and seconds come from the workload's curve along the
clock; the price is set on past days so that training takes `budget` longer. A small linear regression on the intensities of
the last hours and of the same hours of past days foretells the hour that begins; without it the controller acts on the last.

## When it helps
Long training that can neither move nor wait. Nearly all of the gain is that the last watts buy little speed, which a constant
limit has as well; the grid's swings add to it, and the forecast a little to that.

## When it does not
A grid that is even (hydro, nuclear) leaves what a constant limit saves. Work bound by arithmetic alone slows as much as its
clock; work at low power never meets a limit. Idle servers and embodied carbon grow with the time added. What is saved hangs on
how fast power falls with the clock, an exponent that data/power.toml assumes: profile your own GPU before you count on it.

## Reference
Yang, Meng, Chung and Chowdhury, Chasing Low-Carbon Electricity for Practical and Sustainable DNN Training, ICLR 2023
workshop on Tackling Climate Change with Machine Learning, arXiv 2303.02508. The objective is that of Zeus with energy
weighted by intensity, written with a price of time. Grids are synthetic, or a trace of your own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from narrows.cost import Limit
from narrows.diagnose import diagnose
from narrows.energy import LOWEST_CLOCK, Curve, carbon_grams
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

Series = NDArray[np.float64]

POLICIES = ("forecast", "reactive", "constant", "off")
HISTORY = 14 * 24  # hours that the controller has seen when training starts
LAGS = (1, 2, 3, 24, 25, 48)  # hours before the one foretold
CLOCKS = np.linspace(LOWEST_CLOCK, 1.0, 251)
# Synthetic grids: mean g/kWh (California, Great Britain and Germany in 2020: Wiesner et al., Let's Wait Awhile, 2021); the
# rest are assumptions: the sun's and the evening's share in the daily swing, the weather's spread and its hours of memory.
GRIDS = {
    "solar": (279.7, 0.28, 0.12, 0.10, 30.0),
    "wind": (211.9, 0.10, 0.10, 0.28, 30.0),
    "mixed": (311.4, 0.18, 0.10, 0.20, 40.0),
}


def synthetic(grid: str, hours: int, seed: int) -> Series:
    """Hourly g/kWh of a grid of GRIDS: a midday trough, an evening peak, and weather that fades over a day or two."""
    mean, sun, evening, spread, memory = GRIDS[grid]
    draw, at = np.random.default_rng(seed), np.arange(hours) % 24
    keep = math.exp(-1 / memory)
    weather = np.empty(hours)
    weather[0] = draw.normal()
    for hour in range(1, hours):
        weather[hour] = keep * weather[hour - 1] + math.sqrt(1 - keep**2) * draw.normal()
    day = evening * np.exp(-(((at - 20) / 2.5) ** 2)) - sun * np.exp(-(((at - 12.5) / 3.5) ** 2))
    return np.asarray(mean * np.maximum(1 + day - day.mean() + spread * weather, 0.1))


def read_trace(path: str) -> Series:
    """Hourly g/kWh from a text file, one number in the last column of each line after a header; NarrowsError if it is not so."""
    try:
        cells = [line.rsplit(",", 1)[-1] for line in Path(path).read_text("utf-8").split("\n")[1:] if line.strip()]
        found = np.array([float(cell) for cell in cells])
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise NarrowsError(f"not a trace ({error}).", where=path, remedy="Write a header, then one g/kWh a line.") from None
    if len(found) <= HISTORY or not np.all(np.isfinite(found) & (found > 0)):
        problem = f"it has {len(found)} hours, or some that are not above zero."
        raise NarrowsError(problem, where=path, remedy=f"Give more than {HISTORY} hours: the first are the history.")
    return found


def foretold(trace: Series) -> Series:
    """Each hour from HISTORY on as a regression on the hours before it gives it, refitted every day."""
    lagged = np.stack([np.roll(trace, lag) for lag in LAGS] + [np.ones_like(trace)], 1)
    found = trace.copy()
    for day in range(HISTORY, len(trace), 24):
        seen = slice(max(LAGS), day)
        weights = np.linalg.lstsq(lagged[seen], trace[seen], rcond=None)[0]
        found[day : day + 24] = lagged[day : day + 24] @ weights
    return np.maximum(found, 1.0)


@dataclass(frozen=True)
class Run:
    """One training run: grams of CO2-equivalent and hours at full load, and the clock of each hour."""

    grams: float
    hours: float
    clocks: Series


@dataclass(frozen=True)
class Chase(Measures):
    """Carbon and time of a training run whose power limit follows the grid, against running at full power."""

    card: ClassVar[Card] = Card(
        "chase",
        relieves=(Limit.ENERGY,),
        phases=("train",),
        exact=True,
        claims=(
            Claim("carbon_saved", "%", 13.6, "ResNet-50 for 90 epochs of ImageNet on an A40, 24 starts on three synthetic grids, "
                  "at most 3 % longer (else NaN)", "abstract", "simulated",
                  "other grids and a curve whose exponent is assumed: at least 10 %", at_least=10.0),
            Claim("time_per_carbon", "% / %", 2.5 / 13.6, "the same: time added over carbon saved", "abstract", "simulated",
                  "3 % of time for 10 % of carbon at most", at_most=0.3),
            Claim("gain_of_chasing", "% of carbon", None, "the same runs: saved beyond a constant limit that takes as long",
                  "abstract", "simulated", "the swings of the grid alone are worth a few tenths of a percent", at_least=0.3),
            Claim("gain_of_forecast", "% of carbon", None, "the same runs: saved beyond the controller that acts on the "
                  "last hour, in the same time", "abstract", "simulated",
                  "better on the mean of the starts, by more than rounding", at_least=0.02),
        ),
    )  # fmt: skip
    policy: str = choice(*POLICIES, help="constant: one limit that meets the budget; off: full power")
    budget: float = choice(0.025, 0.01, 0.05, help="how much longer training may take")
    grid: str = choice("solar", "wind", "mixed", help="synthetic, where no trace is given")
    trace: str = ""
    hours: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("policy", self.policy, POLICIES), ("grid", self.grid, tuple(GRIDS))):
            if value not in known:
                raise NarrowsError(
                    f"{value!r} is not a {name}.", where=f"{self.card.slug}: {name}", remedy=f"Use {', '.join(known)}."
                )
        for name, figure in (("budget", self.budget), ("hours", self.hours)):
            if not 0 < figure < 1e5:
                raise NarrowsError(
                    f"{figure} is not above zero.", where=f"{self.card.slug}: {name}", remedy="Give a positive one."
                )

    def baseline(self) -> "Chase":
        return Chase("off")

    def intensities(self) -> Series:
        """Hourly g/kWh: HISTORY hours that the controller has seen, then those of the run and a half more."""
        return (
            read_trace(self.trace) if self.trace else synthetic(self.grid, HISTORY + math.ceil(1.5 * self.hours) + 24, self.seed)
        )

    def clocks(self, curve: Curve, seen: Series, price: float) -> Series:
        """The clock for each intensity: that of the least cost of a unit of work at a price of an hour, in grid units."""
        watts, slow = np.array([curve.watts_at(c) for c in CLOCKS]), np.array([curve.slowdown(c) for c in CLOCKS])
        costs: Series = (seen[:, None] * watts + price) * slow
        return np.asarray(CLOCKS[costs.argmin(1)])

    def run(self, curve: Curve, trace: Series) -> Run:
        """Train through a trace, after its HISTORY; NarrowsError where the trace ends before the training."""
        signal = {"forecast": foretold(trace), "reactive": np.roll(trace, 1)}.get(
            self.policy, np.full_like(trace, trace[:HISTORY].mean())
        )
        clocks = np.ones_like(trace) if self.policy == "off" else self.clocks(curve, signal, self._price(curve, signal))
        left, grams, hours = self.hours, 0.0, 0.0
        for hour in range(HISTORY, len(trace)):
            slow = curve.slowdown(clocks[hour])
            part = min(1.0, left * slow)
            grams += carbon_grams(part * 3600 * curve.watts_at(clocks[hour]), trace[hour])
            left, hours = left - part / slow, hours + part
            if left <= 1e-9:
                return Run(grams, hours, clocks[HISTORY : hour + 1])
        raise NarrowsError(
            f"it ends {left:.1f} hours before the training.", where="trace", remedy="Give a longer one, or fewer hours."
        )

    def _price(self, curve: Curve, signal: Series) -> float:
        """The price of an hour at which the past days would have taken `budget` longer (the higher, the faster)."""
        past = signal[1:HISTORY]
        low, high = 0.0, 100 * curve.watts * float(past.max())
        for _ in range(40):
            price = (low + high) / 2
            speed = np.mean([1 / curve.slowdown(c) for c in self.clocks(curve, past, price)])
            low, high = (price, high) if 1 / speed > 1 + self.budget else (low, price)
        return high

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Carbon and time of `hours` of such steps, one device, against full power; the limit in watts for each hour.

        Raises NarrowsError where the machine's power is not known.
        """
        found = diagnose(graph, machine, step).energy
        if found is None:
            raise NarrowsError("its power is not known.", where=machine.name, remedy="Add power_watts to the machine's file.")
        trace = self.intensities()
        ours, full = self.run(found.curve, trace), Chase("off", hours=self.hours).run(found.curve, trace)
        values = {"carbon_saved": 100 * (1 - ours.grams / full.grams), "time_added": 100 * (ours.hours / full.hours - 1),
                  "grams": ours.grams, "grams_at_full_power": full.grams}  # fmt: skip
        rows: list[Mapping[str, Any]] = [
            {"hour": n, "grams_per_kwh": float(trace[HISTORY + n]), "limit_watts": found.curve.watts_at(float(clock))}
            for n, clock in enumerate(ours.clocks)
        ]
        return Reading(values, {"carbon_saved": "%", "time_added": "%", "grams": "g", "grams_at_full_power": "g"}, tuple(rows))
