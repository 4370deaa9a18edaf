"""Train on cheap devices that come and go, over slow links: each microbatch takes its own way through peers that do not wait.

Devices (peers) are grouped by stage and not wired into pipelines. A microbatch goes from stage to stage to whichever peer is
expected to be free first, so a fast peer gets more of them and a lost one stops nothing. Every few minutes a peer moves from
the stage that can do most to the one that can do least. What crosses between stages has 8 bits.

## When it helps
Preemptible or borrowed devices, unlike ones, links of some hundred Mb/s. Wide layers: what a stage computes grows with the
square of the width, what it sends with the width, so the wider the model, the less its links matter.

## When it does not
Narrow layers, or few peers a stage: one peer more or less is then much of what a stage can do. A peer that moves or joins
loads the stage's weights and optimizer states first. Where devices are equal and seldom fail, a planned pipeline does as well.

## Reference
Ryabinin et al., SWARM Parallelism: Training Large Models Can Be Surprisingly Communication-Efficient, ICML 2023, arXiv
2301.11913. Preemptions are drawn here (the paper replays logs of its cloud); averaging over the peers of a stage is left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from typing import ClassVar, NamedTuple

import numpy as np

from narrows.backward import training
from narrows.cost import Limit
from narrows.costmodel import op_time
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.parallel import is_layer
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

STATE_BYTES = 14  # of a parameter: its weight in 16 bits, a master copy and two moments of Adam
JOINS, LEAVES, BALANCES, LOADED = range(4)  # what happens first where several things happen at once


class Load(NamedTuple):
    """What a microbatch asks of the average stage: seconds of compute, numbers handed on each way; parameters it holds."""

    busy_seconds: float
    elements: float
    parameters: float


def load_of(graph: Graph, machine: Machine, step: Step, stages: int) -> Load:
    """The layers of a graph over so many stages, forward twice (activations are not kept) and backward.

    Raises NarrowsError for a graph without layers.
    """
    ops = [op for op in training(graph) if is_layer(op) and op.phase != "update"]
    if not ops:
        raise NarrowsError("it has no layers to cut.", where=f"swarm-parallelism: {graph.name}", remedy="Give a stack of layers.")
    times = 2, 1
    busy = sum(times[op.phase != "forward"] * float(op_time(op, step, machine).seconds) for op in ops)
    handed = float(ops[0].spec.reads(ops[0].sized(step)))
    return Load(busy / stages, handed, sum(op.parameters for op in graph if is_layer(op)) / stages)


@dataclass(frozen=True)
class Swarm(Measures):
    """How well a swarm keeps its devices busy: over slow links, unlike each other, and while they come and go."""

    card: ClassVar[Card] = Card(
        "swarm-parallelism",
        relieves=(Limit.COMMUNICATION, Limit.SCHEDULING),
        phases=("train",),
        exact=False,
        price="boundary activations and gradients of 8 bits",
        claims=(
            Claim("of_optimal", "x", 0.958, "400 T4 that live 6 hours on average, 8 stages, 32 hours, a peer moves every 5 "
                  "minutes: throughput over that of the best assignment at every moment, mean of 3 traces",
                  "adaptive rebalancing, every 300 s; never: 0.827", "simulated",
                  "between the paper's two figures: its logs are not public", at_least=0.93),
            Claim("over_no_moves", "x", 0.958 / 0.827, "the same over a swarm whose peers stay in the stage they joined, one at "
                  "random", "adaptive rebalancing: 0.958 over 0.827", "simulated", "two thirds of the gain", at_least=1.1),
            Claim("over_fixed", "x", None, "the same over fixed pipelines of the same peers, of which one stops while it lacks "
                  "a peer, and the next that joins fills the gap", "abstract: temporary randomized pipelines, rebalanced in "
                  "case of failure", "simulated", "the direction: a tenth at least", at_least=1.1),
            Claim("over_even_wiring", "x", None, "8 stages of 8 peers, half of them at half speed, 512 microbatches: "
                  "throughput over that of giving each peer as many", "abstract: heterogeneous devices", "simulated",
                  "the closed form is 1.5 (6 peers' speed over 8 of the slowest), less the filling", at_least=1.35),
            Claim("utilization", "x", 0.6, "a T4 for each layer of GPT-3's width, 512 tokens (assumed), 500 Mb/s, 100 ms there "
                  "and back: share of the time that it computes", "device utilization at 500 Mb/s", "simulated",
                  "a quarter either way: what the paper's microbatch was is not known here", at_least=0.45, at_most=0.75),
        ),
    )  # fmt: skip
    stages: int = choice(8, 4, 16)
    rebalance_seconds: float = choice(300.0, 60.0, 0.0, help="between two moves of a peer; 0: none moves")
    bits: int = choice(8, 16, help="of a number that crosses between stages")
    wired: bool = choice(True, False, help="False: fixed pipelines, which stop while a peer of theirs is missing")
    queued: bool = choice(True, False, help="compute a microbatch while others are on their way; False: one at a time")
    peers: int = 400
    life_seconds: float = 6 * 3600.0
    bandwidth_bytes_per_s: float = 25e6  # of a peer each way: 200 Mb/s, as in the paper
    round_trip_seconds: float = 0.1

    def __post_init__(self) -> None:
        if not 1 <= self.stages <= self.peers or self.rebalance_seconds < 0:
            problem = f"{self.peers} peers in {self.stages} stages, rebalanced every {self.rebalance_seconds:g} s."
            raise NarrowsError(
                problem, where="swarm-parallelism", remedy="Give a peer for each stage at least, and no negative time."
            )
        if min(self.life_seconds, self.bandwidth_bytes_per_s) <= 0 or self.round_trip_seconds < 0:
            problem = f"a life of {self.life_seconds:g} s, {self.bandwidth_bytes_per_s:g} B/s, {self.round_trip_seconds:g} s."
            raise NarrowsError(problem, where="swarm-parallelism", remedy="Give numbers above 0; the round trip may be 0.")

    def baseline(self) -> "Swarm":
        return replace(self, rebalance_seconds=0.0, bits=16, wired=False, queued=False)

    def utilization(self, load: Load) -> float:
        """Share of its time that a peer computes; each way it sends or receives one activation and one gradient."""
        sent = 2 * load.elements * self.bits / 8 / self.bandwidth_bytes_per_s + self.round_trip_seconds
        return min(1.0, load.busy_seconds / sent) if self.queued else load.busy_seconds / (load.busy_seconds + sent)

    def preemptions(self, seconds: float, seed: int) -> Iterator[tuple[float, int, int]]:
        """(when, JOINS or LEAVES, which peer); as many are there on average all the time, and the first from the start."""
        draw = np.random.Generator(np.random.Philox(key=seed))
        for peer in range(self.peers):
            yield float(draw.exponential(self.life_seconds)), LEAVES, peer
        now, peer = 0.0, self.peers
        while (now := now + float(draw.exponential(self.life_seconds / self.peers))) < seconds:
            yield now, JOINS, peer
            yield now + float(draw.exponential(self.life_seconds)), LEAVES, peer
            peer += 1

    def of_best(self, seconds: float, loading_seconds: float = 0.0, seed: int = 0) -> float:
        """Throughput among preemptions, over that of the best assignment at every moment; peers are equal.

        A peer that joins or moves works after `loading_seconds`. A stage does what its peers can do, all what the least can.
        """
        events = [event for event in self.preemptions(seconds, seed) if event[0] < seconds]
        if self.rebalance_seconds:
            events += [(at, BALANCES, -1) for at in np.arange(self.rebalance_seconds, seconds, self.rebalance_seconds)]
        heapify(events)
        crew = _Crew(self, np.random.Generator(np.random.Philox(key=[seed, 1])))
        done = best = now = 0.0
        while events:
            at, kind, peer = heappop(events)
            done, best, now = done + (at - now) * crew.complete, best + (at - now) * (crew.there // self.stages), at
            for late in crew.change(kind, peer):
                heappush(events, (at + loading_seconds, LOADED, late))
        return done / best if best else 0.0

    def microbatches_per_second(self, speeds: Sequence[Sequence[float]], microbatches: int) -> float:
        """Of peers by stage that compute so many microbatches a second each, from the first one's start to the last one's end.

        Wired, a microbatch goes to the peer that would have done its share first; else to each in turn.
        """
        free = [[0.0] * len(row) for row in speeds]
        taken = [[0] * len(row) for row in speeds]
        end = 0.0
        for m in range(microbatches):
            now = self.round_trip_seconds
            for stage, row in enumerate(speeds):
                one = m % len(row)
                if self.wired:
                    one = min(range(len(row)), key=lambda i: ((taken[stage][i] + 1) / row[i], i))
                taken[stage][one] += 1
                now = free[stage][one] = max(now, free[stage][one]) + 1 / row[one]
                now += self.round_trip_seconds / 2
            end = max(end, now)
        return microbatches / end

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """A microbatch of the step over a swarm of this machine; a row for each bandwidth. NarrowsError without layers."""
        load = load_of(graph, machine, step, self.stages)
        loading = load.parameters * STATE_BYTES / self.bandwidth_bytes_per_s
        day = 86400.0
        values = {
            "busy_seconds": load.busy_seconds,
            "sent_bytes": 2 * load.elements * self.bits / 8,
            "utilization": self.utilization(load),
            "loading_seconds": loading,
            "of_best": self.of_best(day, loading),
            "of_best_without_moves": replace(self, rebalance_seconds=0.0).of_best(day, loading),
            "of_best_fixed": replace(self, wired=False, rebalance_seconds=0.0).of_best(day, loading),
        }
        rows = [{"bandwidth_bytes_per_s": rate, "utilization": replace(self, bandwidth_bytes_per_s=rate).utilization(load)}
                for rate in (12.5e6, 25e6, 62.5e6, 125e6, 1.25e9)]  # fmt: skip
        units = {name: "s" for name in values if name.endswith("seconds")} | {"sent_bytes": "B"}
        return Reading(values, units, tuple(rows))


class _Crew:
    """The peers by group, a stage or a fixed pipeline: how many each has, and how many of them have loaded their weights."""

    def __init__(self, swarm: Swarm, draw: np.random.Generator) -> None:
        self.swarm, self.draw = swarm, draw
        size = swarm.peers // swarm.stages
        self.assigned = [0] * (swarm.stages if swarm.wired else size)
        self.place: dict[int, int] = {}
        self.spare: list[int] = []  # peers that no fixed pipeline lacks
        for peer in range(swarm.peers):
            self.join(peer)
        self.working = list(self.assigned)
        self.loading = set[int]()

    @property
    def there(self) -> int:
        """Peers in all."""
        return len(self.place) + len(self.spare)

    @property
    def complete(self) -> int:
        """Microbatches that all stages can do in the time that a peer takes for one."""
        full = self.swarm.stages
        return min(self.working) if self.swarm.wired else sum(count == full for count in self.working)

    def join(self, peer: int) -> list[int]:
        """Give a peer its group, and tell who has to load: it, unless no pipeline lacks one."""
        sizes, full = self.assigned, self.swarm.stages
        if not self.swarm.wired:
            open_ = [group for group, size in enumerate(sizes) if size < full]
            if not open_:
                self.spare.append(peer)
                return []
            group = max(open_, key=sizes.__getitem__)
        elif self.swarm.rebalance_seconds or peer < self.swarm.peers:
            group = sizes.index(min(sizes))
        else:  # nobody watches the load
            group = int(self.draw.integers(len(sizes)))
        self.place[peer] = group
        sizes[group] += 1
        return [peer]

    def change(self, kind: int, peer: int) -> list[int]:
        """What an event does to the groups; gives the peers that begin to load."""
        late: list[int] = []
        if kind == LOADED:
            if peer in self.loading:
                self.loading.remove(peer)
                self.working[self.place[peer]] += 1
        elif kind == JOINS:
            late = self.join(peer)
        elif kind == BALANCES:
            low, high = (self.assigned.index(f(self.assigned)) for f in (min, max))
            if self.assigned[high] - self.assigned[low] > 1:
                mover = next((one for one, group in self.place.items() if group == high and one not in self.loading), None)
                late = [] if mover is None else self.join(self.leave(mover))
        elif peer in self.spare:
            self.spare.remove(peer)
        else:
            self.leave(peer)
            late = self.join(self.spare.pop()) if self.spare else []
        self.loading.update(late)
        return late

    def leave(self, peer: int) -> int:
        """Take a peer out of its group."""
        group = self.place.pop(peer)
        self.assigned[group] -= 1
        if peer in self.loading:
            self.loading.remove(peer)
        else:
            self.working[group] -= 1
        return peer
