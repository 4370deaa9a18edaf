"""A row of servers on one power feed: requests in, watts and latencies out, under rules that lower clocks and a brake.

Each server answers one request at a time: it reads the prompt, writes the answer, or waits. Half of the servers form the pool
of low priority, half that of high; each pool has one queue, first come first served. Power is read once a tick as its mean
over it. A threshold passed asks for its first rule at once, and for the next one if power is still there when that has come.
"""

import csv
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from narrows.energy import LOWEST_CLOCK, Curve
from narrows.errors import NarrowsError

Series = NDArray[np.float64]

PROMPTS = (128, 512, 2048, 8192)  # tokens of the prompts that `Phases.read_seconds` belong to


@dataclass(frozen=True, slots=True)
class Rule:
    """From share `at` of the rating on, servers of low and of high priority run at these shares of the highest clock."""

    at: float
    low: float
    high: float = 1.0


@dataclass(frozen=True, slots=True)
class Feed:
    """What supplies a row: rated watts; seconds between readings, and until a command arrives; what lifts a rule again.

    A rule is lifted when power is `margin` of the rating below its threshold. The brake slows all servers when the mean of
    the last `tolerates` readings is at the rating.
    """

    watts: float
    tick: float = 2.0
    delay: float = 40.0
    margin: float = 0.05
    tolerates: int = 3
    brake: Rule = Rule(1.0, LOWEST_CLOCK, LOWEST_CLOCK)


@dataclass(frozen=True, slots=True)
class Phases:
    """One request on one server: seconds to read prompts of PROMPTS tokens, seconds per token written, and both curves.

    The curves are in watts of the whole server.
    """

    read_seconds: tuple[float, ...]
    token_seconds: float
    reading: Curve
    writing: Curve

    def service(self, requests: "Requests") -> Series:
        """Seconds to read and to write at the highest clock, one row a request."""
        read = np.interp(requests.prompt, PROMPTS, self.read_seconds)
        return np.stack([read, requests.written * self.token_seconds], 1)

    def times(self, factor: float) -> "Phases":
        """Requests that each take so many times as long."""
        longer = tuple(seconds * factor for seconds in self.read_seconds)
        return replace(self, read_seconds=longer, token_seconds=self.token_seconds * factor)


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests in order: seconds of arrival, tokens of the prompt, tokens written."""

    at: Series
    prompt: Series
    written: Series

    def where(self, which: NDArray[np.bool_]) -> "Requests":
        """Some of them."""
        return Requests(self.at[which], self.prompt[which], self.written[which])

    def at_rate(self, per_second: float, seed: int) -> "Requests":
        """As many as that on average: a random part of them, or of copies that are shifted against each other."""
        span = float(self.at[-1])
        share = per_second * span / len(self.at)
        copies = math.ceil(share)
        at = np.concatenate([(self.at + span * copy / copies) % span for copy in range(copies)])
        order = np.argsort(at, kind="stable")
        every = Requests(at[order], np.tile(self.prompt, copies)[order], np.tile(self.written, copies)[order])
        return every.where(np.random.default_rng(seed).random(len(order)) < share / copies)


def synthetic(seconds: float, rate: float, seed: int) -> Requests:
    """Requests with the statistics of Azure's conversation trace of 2023: log-normal lengths, and a rate that wanders.

    Median prompt 900 and answer 150 tokens; the rate's spread is a fifth, with a memory of eight minutes.
    """
    draw = np.random.default_rng(seed)
    wave = np.zeros(math.ceil(seconds / 60))
    for minute in range(1, len(wave)):
        wave[minute] = math.exp(-1 / 8) * wave[minute - 1] + math.sqrt(1 - math.exp(-1 / 4)) * draw.normal()
    counts = draw.poisson(np.maximum(1 + 0.2 * wave, 0.1) * rate * 60)
    at = np.sort(np.concatenate([60 * (minute + draw.random(n)) for minute, n in enumerate(counts)]))
    prompt = np.clip(900 * np.exp(0.85 * draw.normal(size=len(at))), 1, 8192).round()
    written = np.clip(150 * np.exp(0.8 * draw.normal(size=len(at))), 1, 1000).round()
    return Requests(at, prompt, written)


def read_requests(path: str) -> Requests:
    """A trace in the form of Azure's: TIMESTAMP, ContextTokens, GeneratedTokens; NarrowsError if it is not so."""
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        at = np.array([datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows])
        prompt, written = (np.array([float(row[k]) for row in rows]) for k in ("ContextTokens", "GeneratedTokens"))
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        remedy = "Give a CSV file with TIMESTAMP, ContextTokens and GeneratedTokens."
        raise NarrowsError(f"not a trace of requests ({error}).", where=path, remedy=remedy) from None
    if len(at) < 2 or at[-1] <= at[0] or np.any(np.diff(at) < 0):
        raise NarrowsError(f"it has {len(at)} requests, or not in order.", where=path, remedy="Sort them by time.")
    return Requests(at - at[0], prompt, written)


@dataclass(slots=True)
class _Server:
    """The request it works on (None: it waits), 0 while it reads and 1 while it writes, and the seconds left of that phase."""

    request: int | None = None
    phase: int = 0
    left: float = 0.0


@dataclass
class _Pool:
    """Servers of one priority, the requests they answer, and how long each one took."""

    requests: Requests
    service: list[list[float]]
    servers: list[_Server]
    next: int = 0
    latencies: list[float] = field(default_factory=list)

    def advance(self, start: float, end: float, curves: Sequence[Curve], clock: float) -> float:
        """Run until `end` at a clock; the joules that all servers drew."""
        speeds = [(curve.slowdown(clock), curve.watts_at(clock)) for curve in curves]
        soonest_first = sorted(self.servers, key=lambda s: (s.request is not None, -s.phase, s.left))
        return sum(self._advance(server, start, end, speeds, curves[0].idle) for server in soonest_first)

    def _advance(self, server: _Server, now: float, end: float, speeds: list[tuple[float, float]], idle: float) -> float:
        joules = 0.0
        while now < end:
            if server.request is None:
                if self.next == len(self.service) or self.requests.at[self.next] >= end:
                    return joules + idle * (end - now)
                begin = max(now, float(self.requests.at[self.next]))
                joules, now = joules + idle * (begin - now), begin
                server.request, server.phase, server.left = self.next, 0, self.service[self.next][0]
                self.next += 1
            slow, watts = speeds[server.phase]
            spent = min(server.left * slow, end - now)
            joules, now, server.left = joules + watts * spent, now + spent, server.left - spent / slow
            if server.left > 1e-9:
                continue
            if server.phase == 0:
                server.phase, server.left = 1, self.service[server.request][1]
            else:
                self.latencies.append(now - float(self.requests.at[server.request]))
                server.request = None
        return joules


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a row did: watts over time, how often the brake fell, median latency in seconds of low and high priority."""

    watts: Series
    brakes: int
    low_seconds: float
    high_seconds: float


def _escalated(asked: int, share: float, rules: Sequence[Rule], feed: Feed, *, settled: bool) -> int:
    """Which rule to ask for next (0: none) at a share of the rating; `settled`: the last one asked for is in force."""
    reached = sum(rule.at <= share for rule in rules)
    if reached > asked and (settled or rules[reached - 1].at > rules[max(asked, 1) - 1].at):
        first = next(n for n, rule in enumerate(rules, 1) if rule.at == rules[reached - 1].at)
        return max(first, asked + 1)  # a threshold passed counts at once; the next rule of the same one waits for the last
    if settled and asked and share < rules[asked - 1].at - feed.margin:
        return asked - 1
    return asked


def run(requests: Requests, phases: Phases, servers: int, feed: Feed, rules: Sequence[Rule], seed: int) -> Outcome:
    """A row of servers answers requests, each at random of low or high priority, until the last has arrived."""
    low = np.random.default_rng(seed).random(len(requests.at)) < 0.5
    pools = [
        _Pool(part, phases.service(part).tolist(), [_Server() for _ in range(count)])
        for part, count in ((requests.where(low), servers // 2), (requests.where(~low), servers - servers // 2))
    ]
    now, watts, brakes, braking = 0.0, list[float](), 0, False
    asked, since, used = 0, -feed.delay, 0  # the rule asked for last, when, and the one in force (0: none)
    under_way = deque[tuple[float, int]]()
    while now < requests.at[-1]:
        while under_way and under_way[0][0] <= now:
            used = under_way.popleft()[1]
        rule = feed.brake if braking else rules[used - 1] if used else Rule(0.0, 1.0)
        end = now + feed.tick
        joules = sum(
            pool.advance(now, end, (phases.reading, phases.writing), clock)
            for pool, clock in zip(pools, (rule.low, rule.high), strict=True)
        )
        now = end
        watts.append(joules / feed.tick)
        share = watts[-1] / feed.watts
        held = math.fsum(watts[-feed.tolerates :]) / feed.tolerates / feed.watts
        brakes += held >= feed.brake.at and not braking
        braking = held >= feed.brake.at or (braking and share >= feed.brake.at - feed.margin)
        wanted = _escalated(asked, share, rules, feed, settled=now - since >= feed.delay)
        if wanted != asked:
            asked, since = wanted, now
            under_way.append((now + feed.delay, asked))
    slow, fast = (median(pool.latencies) if pool.latencies else math.nan for pool in pools)
    return Outcome(np.array(watts), brakes, slow, fast)
