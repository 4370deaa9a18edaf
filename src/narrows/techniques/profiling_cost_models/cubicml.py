"""Search the settings of a distributed training job with a cheap model of its speed, learnt from the jobs that ran.

A few jobs are launched at random. A regression on their speeds then rates every setting that has not run, the most
promising ones are launched, and their speeds go into the next regression. A second one learns what fails (out of memory).

## When it helps
Many settings that multiply (parallel degrees, microbatch, recomputation, sharding) and a trial that costs minutes on a
cluster, or seconds in a simulator: a twentieth of the trials finds nearly the best. Trials of earlier jobs count.

## When it does not
Where a formula rates all settings in a second, enumerate them. A setting whose effect no tried one has shown (a cliff
at one value alone) is found by luck only.

## Reference
Wen et al., CubicML: Automated ML for Large ML Systems Co-design with ML Prediction of Performance, 2024, arXiv
2409.04585. There the predictor is a network or trees, and REINFORCE samples what it rates; here it is kernel ridge
regression with a closed form, and all candidates are rated, which needs no sampling.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.technique import Card, Claim, Searches, Trial, choice

_JOBS = "3 GPT jobs on 64 to 512 A100, narrows' training simulator, 5 % of the evaluations, 7 seeds each"
_REACHES, _NOISES = (1.0, 2.0, 4.0, 8.0, 16.0), (1e-4, 1e-3, 1e-2, 1e-1)
_HOPE = 2.0  # what is little known is rated so many standard deviations better, or the search stays where it began
_MOST = 0.9  # what is sure to fail counts as ten attempts


@dataclass(frozen=True)
class CubicML(Searches):
    """Launches what a regression on past jobs rates best, and refits."""

    card: ClassVar[Card] = Card(
        "cubicml",
        relieves=(Limit.SCHEDULING,),
        phases=("train",),
        exact=True,
        claims=(
            Claim("gap_to_exhaustive", "fraction", None, _JOBS, "abstract", "simulated",
                  "found over best of all, less one, the mean over jobs and seeds: within 5 %", at_most=0.05),
            Claim("worst_gap", "fraction", None, _JOBS, "abstract", "simulated",
                  "the worst of all jobs and seeds: within 10 %, where chance loses more", at_most=0.10),
            Claim("beats_random", "share of runs", None, _JOBS, "abstract", "simulated",
                  "strictly better than as many random trials in at least 3 of 4 runs", at_least=0.75),
            Claim("rank_correlation", "Spearman", None, "the same jobs: predictor after as many random trials, on all others",
                  "abstract", "simulated", "a predictor that ranks is above 0.8", at_least=0.8),
        ),
    )  # fmt: skip
    rounds: int = choice(12, 6, 24, help="how often the regression is refitted")
    warmup: float = choice(0.2, 0.1, 0.4, help="share of the budget that is tried at random first")
    proxy: bool = choice(True, help="let the regression choose; False tries at random")

    def __post_init__(self) -> None:
        if self.rounds < 1 or not 0 < self.warmup <= 1:
            raise NarrowsError(f"rounds={self.rounds}, warmup={self.warmup}.", where=self.card.slug,
                               remedy="Give at least one round, and a warm-up above 0 and up to 1.")  # fmt: skip

    def baseline(self) -> "CubicML":
        return CubicML(self.rounds, self.warmup, proxy=False)

    def search(self, candidates: Sequence[Mapping[str, Any]], score: Callable[[Mapping[str, Any]], float], budget: int,
               seed: int = 0, known: Sequence[Trial] = ()) -> tuple[Trial, ...]:  # fmt: skip
        """Trials in the order made. Raises NarrowsError for no candidates or budget, and a score that is not a number."""
        if not candidates or budget < 1:
            raise NarrowsError(f"{len(candidates)} candidates, budget {budget}.", where=self.card.slug,
                               remedy="Give candidates, and a budget of at least one.")  # fmt: skip
        done = {tuple(trial.candidate.values()) for trial in known}
        shuffled = np.random.default_rng(seed).permutation(len(candidates))
        order = [int(i) for i in shuffled if tuple(candidates[i].values()) not in done]
        tried: list[Trial] = []

        def launch(picks: Sequence[int]) -> None:
            for i in picks:
                found = float(score(candidates[i]))
                if math.isnan(found) or found <= 0:
                    raise NarrowsError(f"{found} is no score.", where=f"{self.card.slug}: {dict(candidates[i])}",
                                       remedy="Give a number above zero, infinite where it fails.")  # fmt: skip
                tried.append(Trial(candidates[i], found))
                order.remove(i)

        budget = min(budget, len(order))
        first = budget if not self.proxy else 0 if known else min(budget, max(2, round(self.warmup * budget)))
        launch(order[:first])
        batch = math.ceil(max(budget - first, 1) / self.rounds)
        while len(tried) < budget:
            _, rated = self._rate([*known, *tried], [candidates[i] for i in order])
            best = np.argsort(rated, kind="stable")[: min(batch, budget - len(tried))]
            launch([order[i] for i in best])
        return tuple(tried)

    def predict(self, trials: Sequence[Trial], candidates: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        """The score expected of each candidate if it runs; constant where no trial ran."""
        return self._rate(trials, candidates)[0]

    def _rate(self, trials: Sequence[Trial], candidates: Sequence[Mapping[str, Any]]) -> tuple[NDArray[np.float64], Any]:
        """Expected scores, and how promising a launch is (less is better): a hopeful score, with the attempts that fail."""
        ran = np.isfinite([t.score for t in trials])
        if not self.proxy or not ran.any():
            return np.ones(len(candidates)), np.ones(len(candidates))
        seen, asked = _positions([t.candidate for t in trials], candidates)
        logs, unsure = _regress(seen[ran], np.log([t.score for t in trials if math.isfinite(t.score)]), asked)
        failing, _ = _regress(seen, 1.0 - ran, asked)
        return np.exp(logs), np.exp(logs - _HOPE * unsure) / (1 - np.clip(failing, 0, _MOST))


def _regress(seen: Any, values: Any, asked: Any) -> tuple[Any, Any]:
    """Values at the points `asked` and how unsure each is (a standard deviation): kernel ridge regression on those `seen`.

    Width and ridge are those that predict each value best from all others, which has a closed form.
    """
    centred, fits = values - values.mean(), []
    for reach in _REACHES:
        power, axes = np.linalg.eigh(_alike(seen, seen, reach))
        for noise in _NOISES:
            half = axes / np.sqrt(np.maximum(power, 0) + noise)  # half @ half.T inverts the kernel with its ridge
            weights = half @ (half.T @ centred)
            fits.append((float(np.mean((weights / np.square(half).sum(1)) ** 2)), reach, weights, half))
    _, reach, weights, half = min(fits, key=lambda fit: fit[0])
    near = _alike(asked, seen, reach)
    variance = max(float(weights @ centred), 0.0) / len(centred)
    return values.mean() + near @ weights, np.sqrt(variance * np.maximum(1 - np.square(near @ half).sum(1), 0))


def _alike(a: Any, b: Any, reach: float) -> Any:
    return np.exp(-np.square(a[:, None] - b[None]).sum(2) / (2 * reach**2))


def _positions(seen: Sequence[Mapping[str, Any]], asked: Sequence[Mapping[str, Any]]) -> tuple[Any, Any]:
    """Candidates as points, an axis a name: the logarithm of numbers, and of other values a column each.

    Raises NarrowsError where the names differ.
    """
    names = list(seen[0])
    for one in (*seen, *asked):
        if list(one) != names:
            raise NarrowsError(
                f"{list(one)} are not {names}.", where="candidates", remedy="Give each the same names, in one order."
            )
    columns = []
    for name in names:
        values = [one[name] for one in (*seen, *asked)]
        if all(isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in values):
            columns.append(np.log2(values))
        else:
            columns += [np.array([float(v == level) for v in values]) for level in dict.fromkeys(values)]
    points = np.stack(columns, 1)
    return points[: len(seen)], points[len(seen) :]
