"""How long a step of a layout takes on ranks of this machine, beside what is predicted for it."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from narrows.errors import NarrowsError
from narrows.machine import Machine
from narrows.ranks import linked
from narrows.run.check import rank
from narrows.run.expected import Forecast, Seconds, forecast
from narrows.run.job import Ran, Run, require, small
from narrows.run.launch import launch
from narrows.technique import Reading

WARM_UP, COUNTED = 2, 1  # steps that are left out: the first find memory and routes, in the last what is sent is counted
CROWDED = 0.05  # of a step spent waiting for cores, from which others must have had them
WIDE = 8  # times the width of the smallest model
PARTS: dict[str, Callable[[Seconds], float]] = {
    "step": lambda s: s.step,
    "compute": lambda s: s.busy,
    "wait for a core": lambda s: s.queued,
    "exchange, wait for ranks": lambda s: s.exchange,
}


@dataclass(frozen=True)
class Timed:
    """Steps of a run, measured and predicted.

    measured   medians over the steps, of the slowest rank, and of the busiest what it computed and waited for a core
    host       what the runtime adds to each rank's step, from the smallest model that the layout divides
    """

    run: Run
    cores: int
    steps: int
    measured: Seconds
    predicted: Forecast
    host: float

    @property
    def inside(self) -> dict[str, bool]:
        """Whether the measured step, and what of it was computed, lie in their predicted intervals."""
        low, high = self.predicted.low, self.predicted.high
        return {part: PARTS[part](low) <= PARTS[part](self.measured) <= PARTS[part](high) for part in ("step", "compute")}

    @property
    def verdict(self) -> str:
        """Whether the forecast held, in a sentence; and what spoils the measurement, if something does."""
        held = "; ".join(f"{part} lies {'in' if inside else 'out'}side of its interval" for part, inside in self.inside.items())
        others = (self.measured.queued - self.predicted.high.queued) / self.measured.step
        return held if others < CROWDED else f"{held}; other programs had the cores for {others:.0%} of a step"

    @property
    def reading(self) -> Reading:
        """As a table of parts, which add up to the step."""
        low, median, high = self.predicted.low, self.predicted.median, self.predicted.high
        rows = tuple(
            {"part": name, "measured, s": part(self.measured), "predicted, s": part(median), "from": part(low), "to": part(high)}
            for name, part in PARTS.items()
        )
        return Reading({"steps": float(self.steps), "runtime_of_a_step": self.host}, {"runtime_of_a_step": "s"}, rows)

    def as_json(self) -> dict[str, Any]:
        """As plain data (seconds)."""
        return {"model": self.run.model, "dtype": self.run.dtype, "sequence": self.run.sequence, "cores": self.cores,
                "steps": self.steps, "measured": _plain(self.measured), "predicted": _plain(self.predicted.median),
                "low": _plain(self.predicted.low), "high": _plain(self.predicted.high), "host_seconds": self.host,
                "inside": self.inside}  # fmt: skip


def _plain(seconds: Seconds) -> dict[str, float]:
    return {f"{name}_seconds": float(value) for name, value in {**asdict(seconds), "exchange": seconds.exchange}.items()}


def timed(run: Run, machine: Machine, steps: int = 8, progress: Callable[[str], None] = lambda _: None) -> Timed:
    """Time so many steps of a run in fp32, on a model `WIDE` times the smallest, and predict them.

    Calibrated are: the machine (one thread of this one); its link, by collectives among as many ranks, here and now; and
    what the runtime adds to a step, by running the layout on the smallest model, which has as many layers and calls.
    Raises what `launch` raises, and NarrowsError for a run that is not possible.
    """
    require(run)
    if machine.kind != "cpu":
        raise NarrowsError(f"ranks run on this processor, and {machine.name} is a {machine.kind}.", where="--machine",
                           remedy="Give one that `narrows calibrate --device cpu --out FILE` wrote.")  # fmt: skip
    if run.layout.offload != "none":
        raise NarrowsError("what the disk takes is not calibrated.", where="--timed", remedy="Give --timed 0.")
    layout, cores = run.layout, len(os.sched_getaffinity(0))
    on = linked(machine, layout.devices, progress) if layout.devices > 1 else machine
    asked = replace(run, dtype="fp32", steps=steps + WARM_UP + COUNTED, config=small(layout, WIDE))
    least = replace(asked, config=small(layout))
    progress("the smallest model")
    host = max(0.0, _measured(_ran(least)).busy - forecast(least, on, cores).median.busy)
    progress("the model that is timed")
    return Timed(asked, cores, steps, _measured(_ran(asked)), forecast(asked, on, cores, host), host)


def _ran(run: Run) -> list[Ran]:
    found: list[Ran] = launch(rank, run.layout.devices, run)
    return found


def _measured(ran: list[Ran]) -> Seconds:
    def median(values: Any) -> float:
        return float(np.median(values[WARM_UP:-COUNTED]))

    busiest = max(ran, key=lambda one: median(one.busy_seconds))
    step = median(np.max([one.seconds for one in ran], axis=0))
    return Seconds(step, median(busiest.busy_seconds), median(busiest.queued_seconds))
