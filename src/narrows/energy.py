"""Power, energy and carbon of a step: what a device draws while it computes, and what a lower clock saves and costs.

A device that runs a kernel draws a floor, plus a share for the part of its peak arithmetic and of its memory bandwidth in
use, up to its rated power:

    watts = rated x min(ceiling, floor + compute x (FLOP/s / peak) + memory x (bytes/s / bandwidth))

A clock below the highest (`clock` in 0 to 1) lengthens what arithmetic bounds by 1 / clock and leaves what memory and links
bound; above idle the power falls with clock ** exponent. The constants are in `data/power.toml`, with their provenance;
`bench/fit_energy.py` fits them on one half of published measurements and states the error on the other.
"""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from narrows.errors import NarrowsError
from narrows.machine import Machine

JOULES_PER_KWH = 3.6e6
LOWEST_CLOCK = 0.5  # of the highest: below, voltage no longer falls with the clock and nothing is saved


@cache
def fitted() -> dict[str, Any]:
    """The constants of the power model for `any` hardware, and what was measured of some (`a100`), by the start of their name."""
    return tomllib.loads(files("narrows.data").joinpath("power.toml").read_text("utf-8"))


@dataclass(frozen=True, slots=True)
class Power:
    """How much a device draws: `rated` watts at full load, `idle` watts with a model loaded and nothing to do.

    floor, compute, memory, ceiling   shares of `rated`, see above
    low, high    an 80 % interval of real over predicted watts
    exponent     of the clock, for the power above idle
    source       where the constants come from
    """

    rated: float
    idle: float
    floor: float
    compute: float
    memory: float
    ceiling: float
    low: float
    high: float
    exponent: float
    source: str

    def watts(self, compute_use: Any, memory_use: Any) -> Any:
        """Watts at shares of the peak arithmetic and of the peak bandwidth in use: numbers, or arrays of them."""
        share = self.floor + self.compute * compute_use + self.memory * memory_use
        return self.rated * np.minimum(self.ceiling, share)


def power(machine: Machine) -> Power | None:
    """The power model of a machine; None where its rated power is not known."""
    if machine.power_watts is None:
        return None
    own: dict[str, Any] = next((table for name, table in fitted().items() if machine.name.startswith(name)), {})
    constants = fitted()["any"] | own
    idle = constants.pop("idle") * machine.power_watts
    return Power(rated=machine.power_watts, idle=machine.idle_watts or idle, **constants)


@dataclass(frozen=True, slots=True)
class Curve:
    """What a device draws, and how fast it is, along its clock: throughput versus power of one workload.

    watts       at the highest clock;  idle  with nothing to do
    sensitive   the share of the time that grows as the clock falls (what arithmetic bounds)
    exponent    of the clock, for the watts above idle
    """

    watts: float
    idle: float
    sensitive: float
    exponent: float

    def slowdown(self, clock: float) -> float:
        """Time over that at the highest clock; NarrowsError for a clock outside of LOWEST_CLOCK to 1."""
        if not LOWEST_CLOCK <= clock <= 1.0:
            raise NarrowsError(f"a clock of {clock:g} of the highest.", where="clock", remedy=f"Give {LOWEST_CLOCK:g} to 1.")
        return 1.0 + self.sensitive * (1.0 / clock - 1.0)

    def watts_at(self, clock: float) -> float:
        """Watts at a share of the highest clock."""
        return float(self.idle + (self.watts - self.idle) * clock**self.exponent)

    def clock_under(self, cap_watts: float) -> float:
        """The highest clock that stays under a power cap, at least LOWEST_CLOCK (a cap below that has no effect)."""
        room = max(cap_watts - self.idle, 0.0) / max(self.watts - self.idle, 1e-9)
        return float(min(1.0, max(LOWEST_CLOCK, room ** (1.0 / self.exponent))))


@dataclass(frozen=True, slots=True)
class Load:
    """One kernel's seconds (predicted, low, high), the seconds its arithmetic and its traffic take at the datasheet's peaks,
    and the seconds that arithmetic bounds."""

    seconds: tuple[float, float, float]
    compute_seconds: float
    memory_seconds: float
    bound_by_compute: float


@dataclass(frozen=True, slots=True)
class Energy:
    """Joules of one step on one device with their 80 % interval, the watts that is on average, and its curve along the clock.

    An interval of the watts covers the power model alone; that of the joules also the time's. Idle seconds are not in it.
    """

    joules: float
    joules_interval: tuple[float, float]
    watts: float
    watts_interval: tuple[float, float]
    curve: Curve
    source: str


def energy(machine: Machine, loads: Iterable[Load]) -> Energy | None:
    """What a sequence of kernels draws on one device; None where the machine's power is unknown or nothing runs."""
    model, loads = power(machine), tuple(loads)
    whole = sum(load.seconds[0] for load in loads)
    if model is None or not whole:
        return None

    def joules(which: int) -> float:
        ran = [(load, seconds) for load in loads if (seconds := load.seconds[which])]
        return sum(t * float(model.watts(load.compute_seconds / t, load.memory_seconds / t)) for load, t in ran)

    spent = joules(0)
    watts, sensitive = spent / whole, sum(load.bound_by_compute for load in loads) / whole
    return Energy(
        joules=spent,
        joules_interval=(joules(1) * model.low, joules(2) * model.high),
        watts=watts,
        watts_interval=(watts * model.low, watts * model.high),
        curve=Curve(watts, min(model.idle, watts), sensitive, model.exponent),
        source=model.source,
    )


def carbon_grams(joules: float, grams_per_kwh: float, overhead: float = 1.0) -> float:
    """Grams of CO2-equivalent for electricity of a grid's intensity; `overhead` is the data centre's PUE."""
    return joules / JOULES_PER_KWH * overhead * grams_per_kwh
