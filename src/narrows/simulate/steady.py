"""How sure the means of a simulation are: the warm-up is found and left out, and what is left is cut into batches.

The warm-up ends where the standard error of what follows is least (MSER, White, Simulation 69(6), 1997). Means of long
batches are nearly independent, so Student's t gives an interval for the mean of all (Schmeiser, Operations Research
30(3), 1982); so do the means of runs with other seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, fmean, stdev
from typing import Any

from narrows.simulate.requests import Answer
from narrows.simulate.step_times import PS

KEPT = 64  # batches at least, once there are so many numbers
BATCHES = 20  # that an interval is taken from
LEVEL = 0.95


class Series:
    """A stream of numbers as the means of equal batches; where there are twice KEPT of them, pairs become one."""

    def __init__(self) -> None:
        self.size = 1
        self.means: list[float] = []
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """One more number."""
        self._sum += value
        self._count += 1
        if self._count == self.size:
            self.means.append(self._sum / self.size)
            self._sum, self._count = 0.0, 0
            if len(self.means) == 2 * KEPT:
                self.means = [(a + b) / 2 for a, b in zip(self.means[::2], self.means[1::2], strict=True)]
                self.size *= 2

    def warm_up(self) -> int:
        """Batches to leave out: fewer than half of them, or half where no steady state shows."""
        means, best = self.means, (float("inf"), 0)
        total = squares = 0.0
        for first in range(len(means) - 1, -1, -1):
            total, squares, count = total + means[first], squares + means[first] ** 2, len(means) - first
            if count >= len(means) / 2:
                best = min(best, ((squares - total**2 / count) / count**2, first))
        return best[1]

    def interval(self, dropped: int) -> tuple[float, float] | None:
        """95 % for the mean of what comes after so many batches; None where that is too little to say."""
        left = self.means[dropped:]
        long = len(left) // BATCHES
        return student([fmean(left[i * long : (i + 1) * long]) for i in range(BATCHES)]) if long else None


def student(means: Sequence[float]) -> tuple[float, float]:
    """95 % for the mean of independent numbers, at least 3 of them.

    Student's t by its expansion in the normal quantile (Abramowitz and Stegun 26.7.5), low by 3 % for 3 numbers.
    """
    free, z = len(means) - 1, NormalDist().inv_cdf(0.5 + LEVEL / 2)
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
    off = t * stdev(means) / len(means) ** 0.5
    return fmean(means) - off, fmean(means) + off


@dataclass
class Steady:
    """The latencies of a run in the order in which its answers ended."""

    series: dict[str, Series] = field(default_factory=lambda: {name: Series() for name in ("ttft_s", "tpot_s", "e2e_s")})

    def add(self, answer: Answer) -> None:
        """One more answer."""
        arrival, output = answer.request.arrival, answer.request.longest
        self.series["ttft_s"].add((answer.first - arrival) / PS)
        self.series["e2e_s"].add((answer.last - arrival) / PS)
        if output > 1:
            self.series["tpot_s"].add((answer.last - answer.first) / (output - 1) / PS)

    def as_json(self) -> dict[str, Any]:
        """The answers of the warm-up, and 95 % intervals of the means after it; nothing where no steady state shows.

        That is where the load is too short, or where half of it would have to be left out.
        """
        dropped = {name: one.warm_up() for name, one in self.series.items()}
        spans = {name: one.interval(dropped[name]) for name, one in self.series.items()}
        if None in spans.values() or any(2 * dropped[name] >= len(one.means) - 1 for name, one in self.series.items()):
            return {}
        return {"warm_up_requests": max(dropped[name] * one.size for name, one in self.series.items()), **spans}
