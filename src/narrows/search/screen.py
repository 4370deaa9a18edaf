"""Deployments that serve a load, screened in closed form.

A replica that answers r requests a second holds B = r x tokens x tpot sequences (Little's law), of which a step takes
t(B); reading a prompt costs w more, so that r = 1 / (w + tokens x t(B) / B) and tpot = t(B) + w B / tokens. Prompts wait
as in an M/G/1 queue. Bursts, evictions, and shared prefixes that are lost are left to the simulation (search/serve.py).
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from heapq import nlargest
from itertools import product
from typing import Any

from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.search.deployments import SAMPLES, Config, Job, Kind, Side, Space, served
from narrows.simulate.fleet import Group, rules
from narrows.simulate.speculation import Speculation
from narrows.simulate.step_times import PS, StepTimes

USES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)  # shares of its time that a replica reads
ALIKE = 2  # replicas of the same price that are paired with others: the second, should the first fail in the simulation


@dataclass(frozen=True, slots=True)
class Point:
    """A deployment as screening sees it: `rate` requests a second within the limits, `full` with every replica full.

    ttft, tpot   seconds at that rate: to the first token for `share` of the requests, and per further token in the mean
    batch        sequences that decode in a replica then
    """

    config: Config
    rate: float
    full: float
    ttft: float
    tpot: float
    batch: int


@dataclass
class Screened:
    """What screening found: the points that keep the limits, how many were looked at, and why others do not."""

    points: list[Point] = field(default_factory=list)
    evaluated: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


def screen(job: Job, space: Space) -> Screened:
    """Every deployment of the space in closed form, each with as few replicas as carry the load (or all there are)."""
    found = Screened()
    sides = list(_sides(job, space, found))
    if False in space.apart:
        for one in sides:
            found.evaluated += 1
            _put(job, found, one, _together(job, one))
    if True in space.apart:
        _apart(job, sides, found)
    return found


@dataclass(frozen=True, slots=True)
class _Tabled:
    """A side of one replica with the times of its steps and its room."""

    side: Side
    precision: str
    cache: str
    speculation: Speculation | None
    kind: Kind
    times: StepTimes
    most: int = 0  # sequences that a batch holds


def _sides(job: Job, space: Space, found: Screened) -> Iterator[_Tabled]:
    """Every legal replica; what does not fit or is not there is counted with its reason."""
    most = rules(job.engine, max_sequences=max(space.max_sequences), max_tokens=max(space.max_tokens))
    for kind in job.kinds:
        formats = _formats(job, space, kind.machine, found)
        for side, (precision, cache, graph) in product(_cuts(job, space, kind), formats):
            for speculation in (None, *job.speculations):
                group = Group(graph, kind.machine, most, side.tensor, pipeline=side.pipeline, experts=side.experts,
                              speculation=speculation)  # fmt: skip
                try:
                    like = _Tabled(side, precision, cache, speculation, kind, group.times())
                except NarrowsError as refusal:
                    found.reasons[f"{refusal.where}: {refusal.problem}"] += 1
                    continue
                yield from _sized(job, space, group, like, found)


def _cuts(job: Job, space: Space, kind: Kind) -> list[Side]:
    """Every way to lay a replica over the devices of a node."""
    mixture = any(op.split == "experts" for op in job.graph)
    ways = product(space.tensor, space.pipeline, space.experts if mixture else (1,))
    sides = [Side(kind.machine, tensor, 1, 0, 0, pipeline, experts) for tensor, pipeline, experts in ways]
    return [s for s in sides if s.devices <= min(kind.node, kind.count) and 1 in (s.pipeline, s.experts)]


def _formats(job: Job, space: Space, machine: Machine, found: Screened) -> list[tuple[str, str, Graph]]:
    """The model in every format of weights and cache that the machine has; one that it has already is not tried twice."""
    graphs: dict[Graph, tuple[str, str]] = {}
    for precision, cache in product(space.precision, space.cache):
        try:
            graphs.setdefault(served(job.graph, precision, cache, machine), (precision, cache))
        except NarrowsError as refusal:
            found.reasons[f"{refusal.where}: {refusal.problem}"] += 1
    return [(*names, graph) for graph, names in graphs.items()]


def _sized(job: Job, space: Space, group: Group, like: _Tabled, found: Screened) -> Iterator[_Tabled]:
    """A replica with every number of sequences and rows."""
    longest = max(r.prompt + r.output for r in job.requests)
    for tokens in space.max_tokens:
        for sequences in space.max_sequences:
            if sequences >= tokens:
                continue
            side = replace(like.side, max_sequences=sequences, max_tokens=tokens)
            own = rules(job.engine, max_sequences=sequences, max_tokens=tokens)
            try:
                room = replace(group, rules=own).room() * own.block
            except NarrowsError:
                found.evaluated += 1
                found.reasons["memory: weights, activations and logits leave no room for keys and values"] += 1
                continue
            if room < longest:
                found.reasons[f"memory: the longest request ({longest:,} tokens) has no room: it would be rejected"] += 1
            yield replace(like, side=side, most=max(1, min(sequences, room // job.held)))


@dataclass(frozen=True, slots=True)
class _Carries:
    """What one batch does, or a replica: requests a second within the limits (0: none) and at most, and the seconds then."""

    good: float
    full: float
    ttft: float = 0.0
    tpot: float = 0.0
    batch: int = 0

    def of(self, side: Side) -> "_Carries":
        """That of all batches of a replica."""
        return replace(self, good=self.good * side.batches, full=self.full * side.batches)


def _together(job: Job, one: _Tabled) -> _Carries:
    """A replica that reads and answers."""
    mixed, found = rules(job.engine).mixed, _Carries(0.0, 0.0)
    attends = [one.times.prompt(prompt, 0) for prompt in job.prompts]
    for batch in _batches(one.most):
        beside = batch if mixed else 0
        budget = one.side.max_tokens - beside
        step = _step(one.times, batch, job.held)
        reads = [_read(one.times, n, own, budget, beside) for n, own in zip(job.prompts, attends, strict=True)]
        mean = sum(reads) / SAMPLES
        rate, tpot = 1 / (mean + job.output * step / batch), step + mean * batch / job.output
        # every piece of a prompt waits for those that decode beside it
        slow = 1 + step / _read(one.times, budget, one.times.prompt(budget, 0), budget, beside) if mixed else 1.0
        ttft = step / 2 + _waits(job, rate, [r * slow for r in reads]) + max(step, reads[_at(job)] * slow)
        if ttft <= job.ttft and tpot <= job.tpot:
            found = _Carries(rate, rate, ttft, tpot, batch)
        else:
            found = replace(found, ttft=found.ttft or ttft, tpot=found.tpot or tpot)
        found = replace(found, full=rate)
    return found.of(one.side)


def _reading(job: Job, one: _Tabled) -> _Carries:
    """A replica that reads prompts for others: those that wait are read together, in steps as large as there may be."""
    times, budget = one.times, one.side.max_tokens
    alone = [_read(times, prompt, times.prompt(prompt, 0), budget, 0) for prompt in job.prompts]
    together = [(times.rows(budget) * prompt / budget + times.prompt(prompt, 0)) / PS for prompt in job.prompts]
    full, mean = SAMPLES / sum(together), sum(alone) / SAMPLES
    found = _Carries(0.0, full)
    for use in USES:
        rate = use * full
        ttft = min(1.0, rate * mean) * mean / 2 + _waits(job, rate, together) + alone[_at(job)]
        if ttft <= job.ttft:
            found = _Carries(rate, full, ttft)
    return found.of(one.side)


def _writing(job: Job, one: _Tabled) -> _Carries:
    """A replica that answers prompts which others have read."""
    found = _Carries(0.0, 0.0)
    for batch in _batches(one.most):
        step = _step(one.times, batch, job.held)
        rate = batch / (job.output * step)
        found = replace(found, full=rate, tpot=found.tpot or step)
        if step <= job.tpot:
            found = _Carries(rate, rate, 0.0, step, batch)
    return found.of(one.side)


def _apart(job: Job, sides: list[_Tabled], found: Screened) -> None:
    """Replicas that read prompts for others that answer, of every two kinds of machine."""
    readers: dict[tuple[Any, ...], tuple[_Tabled, _Carries]] = {}
    writers: dict[tuple[Any, ...], tuple[_Tabled, _Carries]] = {}
    for one in sides:  # the first of equals has the fewest sequences, or rows: it has the most room
        size = one.side
        cut = one.precision, one.cache, one.speculation, size.machine.name, size.tensor, size.pipeline, size.experts
        if one.speculation is None and (*cut, size.max_tokens) not in readers:
            readers[*cut, size.max_tokens] = one, _reading(job, one)
        if (*cut, size.max_sequences) not in writers:
            writers[*cut, size.max_sequences] = one, _writing(job, one)
    found.evaluated += len(readers) + len(writers)
    for reader, reads in _best(readers.values()):
        if not reader.side.machine.links:
            found.reasons[f"links: {reader.side.machine.name} has none over which keys and values could leave"] += 1
            continue
        for writer, answers in _best(writers.values()):
            if (reader.precision, reader.cache) == (writer.precision, writer.cache):
                found.evaluated += 1
                _put(job, found, writer, answers, reader, reads)


def _best(sides: Iterable[tuple[_Tabled, _Carries]]) -> list[tuple[_Tabled, _Carries]]:
    """Of replicas that cost the same, the ALIKE that carry most: whatever they are paired with, no other does better."""
    alike: dict[tuple[Any, ...], list[tuple[_Tabled, _Carries]]] = {}
    for one, carries in sides:
        key = one.precision, one.cache, one.speculation is None, one.side.machine.name, one.side.devices
        alike.setdefault(key, []).append((one, carries))
    return [pair for those in alike.values() for pair in nlargest(ALIKE, those, key=lambda pair: pair[1].good)]


def _put(job: Job, found: Screened, writer: _Tabled, answers: _Carries, reader: _Tabled | None = None,
         reads: _Carries = _Carries(math.inf, math.inf)) -> None:  # fmt: skip
    """Keep a deployment with as few replicas as carry the load, or with all that there is where nothing does."""
    if not (answers.good and reads.good):
        slow = ("ttft", answers.ttft > job.ttft or not reads.good), ("tpot", answers.tpot > job.tpot)
        found.reasons[f"{' and '.join(name for name, late in slow if late)}: too slow even with few requests inside"] += 1
        return
    ways = _ways(job, writer, answers, reader, reads)
    if not ways:
        found.reasons["devices: too few for replicas that read beside replicas that answer"] += 1
        return
    many, few = max(ways, key=lambda way: min(way[0] * answers.good, way[1] * reads.good))
    side = replace(reader.side, replicas=few) if reader else None
    config = Config(job.engine, writer.precision, writer.cache, replace(writer.side, replicas=many), side, writer.speculation)
    rate = min(many * answers.good, few * reads.good)
    if rate < job.rate:
        found.reasons["devices: all there are carry less than the load within the limits"] += 1
    ttft = reads.ttft if reader else answers.ttft
    found.points.append(Point(config, rate, min(many * answers.full, few * reads.full), ttft, answers.tpot, answers.batch))


def _ways(job: Job, writer: _Tabled, answers: _Carries, reader: _Tabled | None, reads: _Carries) -> list[tuple[int, int]]:
    """(replicas that answer, that read): as many as the load wants, or every way to share all devices between them."""
    most = writer.kind.count // writer.side.devices
    many, few = (math.ceil(min(job.rate, 1e9) / one.good) or 1 for one in (answers, reads))
    if reader is None:
        return [(min(many, most), 1)]
    free = reader.kind.count // reader.side.devices

    def beside(answering: int) -> int:
        used = answering * writer.side.devices if reader.kind is writer.kind else 0
        return min(free, (reader.kind.count - used) // reader.side.devices)

    if many <= most and few <= beside(many):
        return [(many, few)]
    return [(n, beside(n)) for n in range(1, most + 1) if beside(n) > 0]


def _batches(most: int) -> list[int]:
    """Numbers of sequences up to `most`, ever wider apart."""
    found = {1, most}
    at = 1.0
    while at < most:
        found.add(round(at))
        at *= 1.25
    return sorted(found)


def _step(times: StepTimes, batch: int, held: int) -> float:
    """Seconds of a step in which so many sequences decode."""
    piece = times.decoding(batch, batch * held, batch)
    attention = piece.base + piece.slope * (batch * held - piece.start)
    return (times.rows(batch) + times.outputs(batch) + times.host(batch) + attention) / PS


def _read(times: StepTimes, prompt: int, attention: int, budget: int, beside: int) -> float:
    """Seconds that reading a prompt in pieces adds to steps in which `beside` sequences decode (0: none); `attention` in ps."""
    piece = min(prompt, budget)
    rows = times.reading(piece, beside) + (0 if beside else times.outputs(1) + times.host(0, 1))
    return (rows * prompt / piece + attention) / PS


def _at(job: Job) -> int:
    """The typical prompt that `share` of all are no longer than."""
    return min(int(job.share * SAMPLES), SAMPLES - 1)


def _waits(job: Job, rate: float, reads: list[float]) -> float:
    """Seconds that `share` of the prompts wait at most for those before them: M/G/1, its tail taken as exponential."""
    use = rate * sum(reads) / SAMPLES
    if use >= 1:
        return math.inf
    mean = rate * sum(r * r for r in reads) / SAMPLES / 2 / (1 - use)
    return mean / use * max(math.log(use / (1 - job.share)), 0.0) if use else 0.0
