"""A training run of weeks that fails and goes on: what its time goes to, played failure by failure and in closed form.

Steps run and checkpoints are written until something fails; what was done since the last checkpoint that was safe is lost,
and after a restart, for which a node may have to be waited for, the steps go on. Failures come at random with a known rate.
Nothing happens between two of them that is not known beforehand, so a month on ten thousand devices is some hundred events.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from narrows.errors import NarrowsError
from narrows.simulate.checkpoints import Checkpoint
from narrows.simulate.timeline import Span, Timeline
from narrows.units import format_seconds

# Dubey et al., The Llama 3 Herd of Models, 2024, section 3.3: 419 unexpected interruptions in 54 days on 16,384 H100.
DEVICE_MTBF_SECONDS = 54 * 86400 * 16384 / 419
CAUSES = ("useful", "checkpoint", "lost", "restart", "waiting", "smaller", "straggler")
MOST_FAILURES = 200_000  # of one run: more are not played
STUCK = 1e-3  # of the time: a run whose steps get no more makes no progress


@dataclass(frozen=True)
class Run:
    """A run that fails and goes on.

    step_seconds      of a step as it runs;  slowdown  over what it would take without a straggler
    restart_seconds   from a failure to the next step: to find it, to start the processes, to read the checkpoint
    failures_per_s    of all its nodes together, each of which takes one away;  crashes_per_s  that take none: a link flaps
    spares            nodes that stand by;  repair_seconds  until a failed one is back (0: another is always at hand)
    parts             equal parts, one of which is left out with each node that is missing; 1: the run waits for a node

    Failures are exponential, as likely in a restart as in a step, and do not happen while the run waits.
    """

    step_seconds: float
    writes: Checkpoint
    restart_seconds: float
    failures_per_s: float
    crashes_per_s: float = 0.0
    spares: int = 0
    repair_seconds: float = 0.0
    parts: int = 1
    slowdown: float = 1.0

    def __post_init__(self) -> None:
        for name in ("step_seconds", "failures_per_s", "crashes_per_s", "restart_seconds", "repair_seconds", "slowdown"):
            _require(getattr(self, name), name, above=name == "step_seconds")
        if self.spares < 0 or self.parts < 1 or self.slowdown < 1:
            problem = f"{self.spares} spares, {self.parts} parts, a slowdown of {self.slowdown:g}."
            raise NarrowsError(problem, where="run", remedy="Give no less than 0 spares, 1 part, and a slowdown of 1.")

    @property
    def mtbf_seconds(self) -> float:
        """Mean time between two failures of the run while nothing is missing."""
        rate = self.failures_per_s + self.crashes_per_s
        return 1 / rate if rate else math.inf

    def speed(self, out: int) -> float:
        """Share of the full speed while so many nodes are being repaired; 0: it waits."""
        return 1 - min(max(out - self.spares, 0), self.parts) / self.parts

    def enough_spares(self, waits: float = 0.01) -> int:
        """Spare nodes with which the run waits for less than this share of its time (Erlang's loss formula)."""
        load, spares, blocked = self.failures_per_s * self.repair_seconds, 0, 1.0
        while (blocked := load * blocked / (spares + 1 + load * blocked)) >= waits:
            spares += 1
        return spares

    @property
    def best_interval(self) -> float:
        """Seconds of steps between two checkpoints with the most goodput; no less than a step, or than it takes to be safe."""
        return max(best_interval(self.writes.stall_seconds, self.mtbf_seconds), self.writes.lag_seconds, self.step_seconds)


def _require(value: float, where: str, above: bool = False) -> float:
    if not 0 <= value < math.inf or (above and not value):
        least = "above 0" if above else "from 0 up"
        raise NarrowsError(f"it is {value:g}.", where=where, remedy=f"Give a finite number {least}.")
    return value


def rate_per_s(count: int, mtbf_seconds: float, where: str = "mtbf") -> float:
    """Failures per second of `count` things that each fail once in `mtbf_seconds`; raises NarrowsError unless that is above 0."""
    if not mtbf_seconds > 0:
        raise NarrowsError(f"it is {mtbf_seconds:g} s.", where=where, remedy="Give a time above 0.")
    return count / mtbf_seconds


def young_interval(stall_seconds: float, mtbf_seconds: float) -> float:
    """Seconds of steps between checkpoints, to first order (Young, 1974)."""
    return math.sqrt(2 * stall_seconds * mtbf_seconds)


def daly_interval(stall_seconds: float, mtbf_seconds: float) -> float:
    """The same to higher order (Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, 2006)."""
    if stall_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    part = stall_seconds / (2 * mtbf_seconds)
    return math.sqrt(2 * stall_seconds * mtbf_seconds) * (1 + math.sqrt(part) / 3 + part / 9) - stall_seconds


def best_interval(stall_seconds: float, mtbf_seconds: float) -> float:
    """The same exactly: the t with (1 - t / M) exp((t + C) / M) = 1, by Newton from above; infinite if nothing fails."""
    if math.isinf(mtbf_seconds):
        return math.inf
    late, share = stall_seconds / mtbf_seconds, 1.0
    while True:
        slope = -math.expm1(-(share + late))
        step = (share - slope) / slope if slope else 0.0
        if step <= 1e-12 * share:
            return share * mtbf_seconds
        share -= step


def expected(run: Run, interval_seconds: float) -> dict[str, float]:
    """Shares of a long run's time by cause (see CAUSES) in closed form; they add up to 1.

    How many nodes are in repair is a loss system of Erlang's, whatever the time of a repair is distributed like; between two
    failures of rate 1/M the steps of t seconds keep t exp(-lag/M) / (exp((t + stall)/M) - 1) of them, and of the time the
    share exp(-restart/M) is not spent on restarts (Daly's complete model, with a lag). Exact where the run waits for nodes
    (parts = 1); near, where it goes on smaller and a repair takes much longer than a restart.
    """
    found = dict.fromkeys(CAUSES, 0.0)
    total, writes = run.failures_per_s + run.crashes_per_s, run.writes
    joining = run.restart_seconds + writes.stall_seconds
    at_once = 1 / run.parts > joining * total
    cycle = interval_seconds + writes.stall_seconds
    for out, share in enumerate(_in_repair(run, 0.0 if at_once else 1 / total)):
        speed = run.speed(out)
        if not speed:
            found["waiting"] += share
            continue
        rate, kept = total * speed, 1 / cycle  # cycles per second of steps
        if rate:
            kept = rate * math.exp(-writes.lag_seconds * rate) / math.expm1(min(cycle * rate, 700.0))
        going = share * math.exp(-run.restart_seconds * rate)
        if speed < 1 and at_once:
            going *= max(0.0, 1 - out / run.repair_seconds * joining)
        steps = going * kept * interval_seconds
        found["useful"] += steps * speed / run.slowdown
        found["straggler"] += steps * speed * (1 - 1 / run.slowdown)
        found["smaller"] += steps * (1 - speed)
        found["checkpoint"] += going * kept * writes.stall_seconds
        found["lost"] += going * (1 - kept * cycle)
        found["restart"] += share - going
    return found


def _in_repair(run: Run, late_seconds: float) -> list[float]:
    """Shares of the time for which 0, 1, ... nodes are in repair, or back so late, up to as many as make the run wait."""
    weights = [0.0]
    while run.failures_per_s * run.repair_seconds and (speed := run.speed(len(weights) - 1)):
        away = run.repair_seconds + late_seconds * (run.parts > 1 and len(weights) > run.spares)
        weights.append(weights[-1] + math.log(run.failures_per_s) + math.log(away) + math.log(speed / len(weights)))
    found = np.exp(np.array(weights) - max(weights))
    return list(map(float, found / found.sum()))


class Phase(NamedTuple):
    """A stretch of a run: `kind` is steps, restart or waiting; `speed` of its steps; whether a failure ended it."""

    kind: str
    start: float
    end: float
    speed: float
    failed: bool


def phases(run: Run, seconds: float, seed: int = 0) -> Iterator[Phase]:
    """The stretches of a run of `seconds`, one after the other; the same seed gives the same failures.

    Events go by (time, priority): a node is back, a restart ends, something fails. A node that is back while the run is
    smaller joins at once if what it brings until the next failure is worth a checkpoint and a restart, else at that failure.
    """
    draw = np.random.Generator(np.random.Philox(key=seed))
    back, now, begun, kind, until, speed = deque[float](), 0.0, 0.0, "steps", math.inf, 1.0
    left = draw.exponential()  # until the next failure, in units of the mean time to it
    total = run.failures_per_s + run.crashes_per_s
    again = run.restart_seconds
    while True:
        size = speed if kind == "steps" else run.speed(len(back))
        rate = total * size
        at, event = min(
            (back[0] if back else math.inf, 0), (until, 1), (now + left / rate if rate else math.inf, 2), (seconds, 3)
        )
        left, now = left - (at - now) * rate if rate else left, at
        if event == 3:
            yield Phase(kind, begun, seconds, speed, False)
            return
        following = ""
        if event == 0:
            back.popleft()
            more = run.speed(len(back)) - size
            joining = again + run.writes.stall_seconds * (kind == "steps")
            if (kind == "waiting" and more) or (kind == "steps" and more > joining * rate):
                following, until = "restart", now + joining
        elif event == 1:
            following, until = "steps", math.inf
        else:
            left = draw.exponential()
            if draw.random() * total < run.failures_per_s and run.repair_seconds:
                back.append(now + run.repair_seconds)
            following, until = "restart", now + again
        if following == "restart" and not run.speed(len(back)):
            following, until = "waiting", math.inf
        if following:
            yield Phase(kind, begun, now, speed, event == 2)
            kind, begun, speed = following, now, run.speed(len(back))


def spent(run: Run, interval_seconds: float, phase: Phase) -> dict[str, float]:
    """Seconds of a phase by cause; steps that a failure ended keep what was safe, others all."""
    whole = phase.end - phase.start
    if phase.kind != "steps":
        return {phase.kind: whole}
    cycle = interval_seconds + run.writes.stall_seconds
    done = max(0.0, (whole - run.writes.lag_seconds * phase.failed) // cycle)
    rest = 0.0 if phase.failed else whole - done * cycle
    steps = done * interval_seconds + min(rest, interval_seconds)
    stall = done * run.writes.stall_seconds + max(rest - interval_seconds, 0.0)
    useful = steps * phase.speed / run.slowdown
    return {"useful": useful, "checkpoint": stall, "lost": whole - steps - stall, "smaller": steps * (1 - phase.speed),
            "straggler": steps * phase.speed - useful}  # fmt: skip


def timeline(run: Run, seconds: float, interval_seconds: float, seed: int = 0) -> Timeline:
    """A run as a picture or a trace shows it, a lane for each of steps, lost, restart and waiting."""
    found = []
    for phase in phases(run, seconds, seed):
        lost = spent(run, interval_seconds, phase).get("lost", 0.0)
        for kind, start, end in ((phase.kind, phase.start, phase.end - lost), ("lost", phase.end - lost, phase.end)):
            if end > start:
                found.append(Span(kind, kind, kind, start, end))
    return Timeline(tuple(found))


@dataclass(frozen=True)
class Goodput:
    """What became of a run: `ledger` in seconds by cause, the mean over the seeds, adds up to `seconds`.

    share, interval     of the time that is useful steps: the mean, and between which 80 % of the seeds lie
    expected            shares by cause of an endless run, in closed form
    every_seconds       of steps between checkpoints;  failures  mean number
    """

    run: Run
    seconds: float
    every_seconds: float
    ledger: Mapping[str, float]
    share: float
    interval: tuple[float, float]
    expected: Mapping[str, float]
    failures: float
    seeds: int

    @property
    def steps(self) -> float:
        """Optimizer steps that remain, mean."""
        return self.share * self.seconds * self.run.slowdown / self.run.step_seconds

    def as_json(self) -> dict[str, Any]:
        """Plain data: the stable contract of `narrows simulate train --json` (SI units)."""
        found = asdict(self)
        mtbf, stall = self.run.mtbf_seconds, self.run.writes.stall_seconds
        more = {"goodput": found.pop("share"), "steps": self.steps, "stuck": self.stuck, "mtbf_seconds": mtbf}
        return {**more, **found, "young_seconds": young_interval(stall, mtbf), "daly_seconds": daly_interval(stall, mtbf)}

    @property
    def stuck(self) -> bool:
        """Whether it fails more often than it gets on."""
        return self.share < STUCK


def simulate(run: Run, seconds: float, interval_seconds: float = 0.0, seeds: int = 20) -> Goodput:
    """Play a run for `seconds`, once for each seed; without an interval between checkpoints, with the best, in whole steps.

    A run that the closed form gives no progress is not played. Raises NarrowsError for one with more than MOST_FAILURES.
    """
    _require(seconds, "seconds", above=True)
    if seeds < 1:
        raise NarrowsError(f"it is {seeds}.", where="seeds", remedy="Give 1 or more.")
    lag, step = run.writes.lag_seconds, run.step_seconds
    if 0 < interval_seconds < lag:
        problem = (
            f"a checkpoint is safe after {format_seconds(lag)}, and the next begins after {format_seconds(interval_seconds)}."
        )
        raise NarrowsError(problem, where="interval", remedy="Give a longer one, or write faster.")
    wanted = min(interval_seconds or run.best_interval, seconds)
    every = max(math.ceil(lag / step), round(wanted / step), 1) * step
    law, failures = expected(run, every), seconds / run.mtbf_seconds
    if law["useful"] < STUCK:
        ledger = {cause: share * seconds for cause, share in law.items()}
        return Goodput(run, seconds, every, ledger, law["useful"], (law["useful"],) * 2, law, failures * (1 - law["waiting"]), 0)
    if failures > MOST_FAILURES:
        problem = f"{failures:,.0f} failures are more than the {MOST_FAILURES:,} that are played."
        raise NarrowsError(problem, where="simulate train", remedy="Give fewer days, or a longer time between failures.")
    ledgers, failed = [], 0
    for seed in range(seeds):
        parts = dict.fromkeys(CAUSES, 0.0)
        for phase in phases(run, seconds, seed):
            failed += phase.failed
            for cause, s in spent(run, every, phase).items():
                parts[cause] += s
        ledgers.append(parts)
    shares = [one["useful"] / seconds for one in ledgers]
    mean = {cause: math.fsum(one[cause] for one in ledgers) / seeds for cause in CAUSES}
    low, high = (float(np.quantile(shares, q)) for q in (0.1, 0.9))
    return Goodput(run, seconds, every, mean, mean["useful"] / seconds, (low, high), law, failed / seeds, seeds)
