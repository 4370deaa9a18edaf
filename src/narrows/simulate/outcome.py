"""What the clients of a serving engine saw: percentiles, goodput, and where the time of the slow ones went."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from operator import attrgetter
from typing import Any

from narrows.simulate.requests import PARTS, Answer, Request
from narrows.simulate.serving import Engine
from narrows.simulate.step_times import PS

_FINE = 256  # bins for every doubling: a percentile is right to 0.14 %
_COARSE = 8
_NONE = math.floor(math.log2(1e-12) * _FINE)  # the bin of what is below a picosecond
_REASONS = 20
_spent = attrgetter(*PARTS)


class Spread:
    """A stream of positive numbers: mean exact, percentiles to 0.14 %, in memory that does not grow."""

    def __init__(self) -> None:
        self.count: float = 0  # tokens that come several at once count in parts
        self.total = 0.0
        self._bins: dict[int, float] = {}

    def add(self, value: float) -> None:
        """One more number; a percentile below a picosecond is 0."""
        self.count += 1
        self.total += value
        bin_ = math.floor(math.log2(max(value, 1e-12)) * _FINE)
        self._bins[bin_] = self._bins.get(bin_, 0) + 1

    def add_run(self, first: float, slope: float, n: int, weight: float) -> None:
        """The numbers first, first + slope, ... n of them, each `weight` times: as many operations as bins they reach."""
        self.count += n * weight
        self.total += (n * first + slope * (n * (n - 1) // 2)) * weight
        if n == 1 or not slope:
            bin_ = math.floor(math.log2(max(first, 1e-12)) * _FINE)
            self._bins[bin_] = self._bins.get(bin_, 0) + n * weight
            return
        while n:
            bin_ = math.floor(math.log2(max(first, 1e-12)) * _FINE)
            room = 2.0 ** ((bin_ + 1) / _FINE) - first
            inside = n if n * slope <= room else max(1, math.ceil(room / slope))
            self._bins[bin_] = self._bins.get(bin_, 0) + inside * weight
            first, n = first + slope * inside, n - inside

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """The number below which a share of them lies."""
        wanted, seen = share * self.count, 0.0
        for bin_ in sorted(self._bins):
            seen += self._bins[bin_]
            if seen >= wanted:
                return float(2.0 ** ((bin_ + 0.5) / _FINE)) if bin_ > _NONE else 0.0
        return math.nan

    def curve(self) -> list[tuple[float, float]]:
        """(number, share of all that are no larger), a point for each bin."""
        seen, found = 0.0, []
        for bin_ in sorted(self._bins):
            seen += self._bins[bin_]
            found.append((2.0 ** ((bin_ + 1) / _FINE), seen / self.count))
        return found

    def as_json(self) -> dict[str, float]:
        """Mean and percentiles."""
        return {"mean": self.mean, "p50": self.quantile(0.5), "p90": self.quantile(0.9), "p99": self.quantile(0.99)}


@dataclass
class Outcome:
    """A load served: seconds to the first token, per token after it (a request's mean) and in all; `good` kept both limits.

    tbt     seconds between tokens, each token for itself: a stall shows here;  queue  seconds before being let in
    parts   seconds of all requests by where they went; they add up to the sum of all latencies
    hits    tokens of prompts that were found, on the device and in each tier below it
    starts  of replicas that come with the load;  replica_seconds  that replicas were there, starting or serving
    groups  what each did, where replicas are unlike
    """

    ttft_limit: float = math.inf
    tpot_limit: float = math.inf
    ttft: Spread = field(default_factory=Spread)
    tpot: Spread = field(default_factory=Spread)
    e2e: Spread = field(default_factory=Spread)
    tbt: Spread = field(default_factory=Spread)
    queue: Spread = field(default_factory=Spread)
    requests: int = 0
    good: int = 0
    tokens: int = 0
    cached: int = 0
    prompts: int = 0
    preemptions: int = 0
    steps: int = 0
    starts: int = 0
    hits: list[int] = field(default_factory=list)
    replica_seconds: float = 0.0
    first_arrival: int | None = None
    last_arrival: int = 0
    end: int = 0
    groups: list["GroupOutcome"] = field(default_factory=list)
    rejected: int = 0
    reasons: list[str] = field(default_factory=list)
    _parts: dict[int, list[int]] = field(default_factory=dict)

    def add(self, answer: Answer) -> None:
        """One request more."""
        r = answer.request
        first = r.arrival if r.read else answer.first  # it came with its first token
        ttft, whole = (first - r.arrival) / PS, (answer.last - r.arrival) / PS
        tokens, follow = (r.tokens, r.longest - 1) if r.also else (r.output, r.output - 1)
        tpot = (answer.last - first) / PS / follow if follow else 0.0
        self.ttft.add(ttft)
        self.e2e.add(whole)
        self.queue.add(answer.queue / PS)
        if follow:
            self.tpot.add(tpot)
        self.requests += 1
        self.good += ttft <= self.ttft_limit and tpot <= self.tpot_limit
        self.tokens += tokens
        self.prompts += r.prompt
        self.cached += answer.cached
        self.preemptions += answer.preemptions
        self.first_arrival = r.arrival if self.first_arrival is None else min(self.first_arrival, r.arrival)
        self.last_arrival = max(self.last_arrival, r.arrival)
        self.end = max(self.end, answer.last)
        sums = self._parts.setdefault(math.floor(math.log2(max(whole, 1e-12)) * _COARSE), [0] * (len(PARTS) + 1))
        sums[-1] += 1
        for i, spent in enumerate(_spent(answer)):
            if spent:
                sums[i] += spent

    def pace(self, first: int, slope: int, n: int, sequences: float) -> None:
        """Tokens followed those before them after `first`, `first + slope`, ... picoseconds, n times, in so many sequences."""
        self.tbt.add_run(first / PS, slope / PS, n, sequences)

    def reject(self, request: Request, why: str) -> None:
        """A request that could never be served is counted, the first of them with their reason."""
        self.rejected += 1
        if len(self.reasons) < _REASONS:
            self.reasons.append(f"{request.prompt} + {request.tokens} tokens: {why}")

    def count(self, engine: Engine) -> None:
        """An engine is done."""
        self.steps += engine.steps
        self.hits = [a + b for a, b in zip_longest(self.hits, engine.hits, fillvalue=0)]

    def close(self, engines: Iterable[Engine], replica_seconds: float, starts: int = 0) -> None:
        """The load is over: its last engines, how long replicas were there, and how many were started for it."""
        for engine in engines:
            self.count(engine)
        self.replica_seconds, self.starts = replica_seconds, starts
        for group in self.groups:
            group.seconds = self.seconds

    @property
    def seconds(self) -> float:
        """From the first arrival to the last token."""
        return (self.end - (self.first_arrival or 0)) / PS

    def ledger(self, slowest: float = 1.0) -> dict[str, float]:
        """Mean seconds of a request by where they went; of about the `slowest` share alone, or of all."""
        wanted, count = slowest * self.requests, 0
        sums = [0] * len(PARTS)
        for bin_ in sorted(self._parts, reverse=True):
            if count >= wanted:
                break
            *more, held = self._parts[bin_]
            count += held
            sums = [a + b for a, b in zip(sums, more, strict=True)]
        found = {part: total / PS / max(count, 1) for part, total in zip(PARTS, sums, strict=True)}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def notes(self) -> tuple[str, ...]:
        """What else to know: evictions, requests that no replica could hold, a load that does not keep up."""
        found = [f"{self.preemptions:,} evictions for want of blocks."] if self.preemptions else []
        if self.rejected:
            found.append(f"{self.rejected:,} requests rejected: {'; '.join(self.reasons[:3])}.")
        arriving = (self.last_arrival - (self.first_arrival or 0)) / PS
        if self.requests and self.seconds > 1.1 * arriving + 2 * self.e2e.quantile(0.01):
            found.append(f"Past saturation: requests arrived for {arriving:,.0f} s and took {self.seconds:,.0f} s to serve.")
        found += [group.sentence(self.requests) for group in self.groups]
        return tuple(found)

    def as_json(self) -> dict[str, Any]:
        """As plain data (SI units): what `narrows simulate serve --json` prints beside its own cost."""
        seconds = max(self.seconds, 1e-12)
        return {
            "requests": self.requests,
            "rejected": self.rejected,
            "notes": list(self.notes()),
            "simulated_seconds": self.seconds,
            "ttft_s": self.ttft.as_json(),
            "tpot_s": self.tpot.as_json(),
            "tbt_s": self.tbt.as_json(),
            "e2e_s": self.e2e.as_json(),
            "throughput_tokens_per_s": self.tokens / seconds,
            "requests_per_s": self.requests / seconds,
            "goodput_requests_per_s": self.good / seconds,
            "preemptions": self.preemptions,
            "prefix_hits": self.cached / max(self.prompts, 1),
            "prefix_hits_by_tier": [found / max(self.prompts, 1) for found in self.hits],
            "steps": self.steps,
            "starts": self.starts,
            "replica_seconds": self.replica_seconds,
            "ledger": self.ledger(),
            "ledger_slowest_1_percent": self.ledger(0.01),
            **({"groups": [group.as_json(self.requests) for group in self.groups]} if self.groups else {}),
        }


@dataclass
class GroupOutcome:
    """What a group of equal replicas did beside others: `seen` is of the requests that it answered or whose prompts it read.

    role   all, or of two: prompts, answers;  price_per_hour  dollars of all its devices;  seconds  for which it was there
    """

    name: str
    role: str
    price_per_hour: float | None
    seen: Outcome
    engines: Sequence[Engine]
    seconds: float = 0.0

    @property
    def utilization(self) -> float:
        """The share of its time in which its engines had something inside."""
        busy = sum(engine.now - engine.idle for engine in self.engines) / PS
        return busy / max(self.seconds * len(self.engines), 1e-12)

    @property
    def dollars(self) -> float | None:
        """The price of its devices for the load."""
        return None if self.price_per_hour is None else self.price_per_hour * self.seconds / 3600

    def sentence(self, requests: int) -> str:
        """What it did, of so many requests."""
        o, what = self.seen, {"prompts": "read the prompts of", "answers": "answered"}.get(self.role, "served")
        cost = "" if self.dollars is None else f"; its devices cost ${self.dollars:,.2f}"
        done = f"{self.name} {what} {o.requests / max(requests, 1):.0%} of the requests, busy {self.utilization:.0%} of the time"
        last, spread = ("had their first token", o.ttft) if self.role == "prompts" else ("were answered", o.e2e)
        return f"{done}; 99 % of them {last} within {spread.quantile(0.99):.3g} s{cost}."

    def as_json(self, requests: int) -> dict[str, Any]:
        """As plain data, with its share of all requests."""
        o = self.seen
        return {"group": self.name, "role": self.role, "requests": o.requests, "share": o.requests / max(requests, 1),
                "utilization": self.utilization, "dollars": self.dollars, "tokens": o.tokens, "ttft_s": o.ttft.as_json(),
                "tpot_s": o.tpot.as_json(), "e2e_s": o.e2e.as_json()}  # fmt: skip
