"""Put more servers on a row's power feed than it could carry at their peaks, and cap clocks where they do meet.

A server that answers requests draws much while it reads a prompt, less while it writes, little while it waits; servers of a
row seldom peak together. A controller watches the row. At a first threshold it lowers the clock of low-priority servers, at
a second further, and where that does not suffice it lowers that of high-priority ones. A command takes `delay` to arrive.
Above the rated power the feed's brake slows every server at once: an event that capping must prevent.

## When it helps
Inference fleets whose row stays well below its rating: writing is bound by memory, so that a lower clock costs it little.

## When it does not
Training, where all servers peak together. Rows that rise faster than commands arrive. Long prompts with short answers (code
completion): reading is bound by arithmetic, slows as the clock does, and the brake falls all the same. A row that is
busier than `load` has less room.

## Reference
Patel et al., Characterizing Power Management Opportunities for LLMs in the Cloud (POLCA), ASPLOS 2024, arXiv 2308.12908:
thresholds, clocks, delays and the row's peak of 79 % of its rating are the paper's; phases, watts and slowdowns come from the
diagnosis and the power model of energy.py, fitted on measured prompt and token phases.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from narrows.cost import Limit
from narrows.diagnose import Diagnosis, diagnose
from narrows.energy import Curve
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.simulate.row import PROMPTS, Feed, Outcome, Phases, Rule, read_requests, run, synthetic
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

BASE_PEAK = 0.79  # of its rating that a row reaches which is not oversubscribed (production, as the paper reports)
HIGHEST_MHZ = 1410.0  # of an A100, which the clocks below refer to
HOST_SHARE = 0.4  # of a busy server's power that its devices do not draw (about)
SHORTEST = 5.0  # mean seconds of a request: shorter ones are taken several at a time, power is read every two seconds

POLICIES: dict[str, tuple[Rule, ...]] = {
    "dual": (Rule(0.80, 1275 / HIGHEST_MHZ), Rule(0.89, 1110 / HIGHEST_MHZ), Rule(0.89, 1110 / HIGHEST_MHZ, 1305 / HIGHEST_MHZ)),
    "single": (Rule(0.89, 1110 / HIGHEST_MHZ, 1110 / HIGHEST_MHZ),),
    "none": (),
}


@dataclass(frozen=True)
class Row:
    """What a row did: power over its rating for each tick, brake events, and in % how much longer the median request took."""

    share: NDArray[np.float64]
    brakes: int
    low_loss: float
    high_loss: float


@dataclass(frozen=True)
class Polca(Measures):
    """Brake events and latency of an oversubscribed row of servers, one request at a time each."""

    card: ClassVar[Card] = Card(
        "polca",
        relieves=(Limit.ENERGY,),
        phases=("prefill", "decode"),
        exact=True,
        claims=(
            Claim("brakes", "events", 0.0, "40 + 30 % servers of 8 A100 with BLOOM-176B, four draws from an hour of Azure's "
                  "conversations, or four synthetic hours", "evaluation", "simulated", "none at all", at_most=0.0),
            Claim("extra_servers", "%", 30.0, "the same: the most servers, in steps of 5 %, without a brake event and with "
                  "medians at most 1 % (high) and 5 % (low priority) longer", "abstract", "simulated",
                  "30 % as claimed", at_least=30.0),
            Claim("high_priority_loss", "%", 1.0, "median latency against a feed without limit; NaN where the brake fell",
                  "evaluation", "simulated", "the paper's objective", at_most=1.0),
            Claim("low_priority_loss", "%", 5.0, "median latency against a feed without limit; NaN where the brake fell",
                  "evaluation", "simulated", "the paper's objective", at_most=5.0),
        ),
    )  # fmt: skip
    policy: str = choice(*POLICIES, help="single: one threshold, all servers alike; none: the brake alone")
    extra: float = choice(0.30, 0.20, 0.40, help="servers beyond what the row was rated for, as a share")
    servers: int = 40
    devices: int = 8
    load: float = 0.6
    trace: str = ""
    draws: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise NarrowsError(
                f"{self.policy!r} is not a policy.", where=f"{self.card.slug}: policy", remedy=f"Use {', '.join(POLICIES)}."
            )
        limits = {"extra": (0, 10), "servers": (2, 1e4), "devices": (1, 1e4), "load": (0.01, 0.95), "draws": (1, 1e3)}
        for name, (least, most) in limits.items():
            if not least <= (figure := getattr(self, name)) <= most:
                where, remedy = f"{self.card.slug}: {name}", f"Give {least:g} to {most:g}."
                raise NarrowsError(f"{figure} is out of range.", where=where, remedy=remedy)

    def baseline(self) -> "Polca":
        return Polca("none")

    def phases(self, graph: Graph, machine: Machine) -> Phases:
        """Seconds and watts of a server that reads and writes, from diagnoses of both; one launches kernel by kernel.

        A network without attention keeps no cache and writes nothing: a request is one forward pass on one device. Raises
        NarrowsError where the machine's power is not known.
        """
        cut = self.devices if graph.find("attention") else 1
        eager = replace(graph, eager=True)
        read = [diagnose(eager, machine, Step.prefill(1, prompt), cut) for prompt in PROMPTS]
        write = diagnose(eager, machine, Step.decode(1, 1024), cut)
        token = write.seconds if cut > 1 else 0.0
        host = HOST_SHARE / (1 - HOST_SHARE) * self._curve(read[2]).watts
        reading, writing = (self._of_server(self._curve(d), host) for d in (read[2], write))
        return Phases(tuple(d.seconds for d in read), token, reading, writing)

    def _curve(self, found: Diagnosis) -> Curve:
        if found.energy is None:
            where, remedy = found.machine.name, "Add power_watts to the machine's file."
            raise NarrowsError("its power is not known.", where=where, remedy=remedy)
        return found.energy.curve

    def _of_server(self, device: Curve, host_watts: float) -> Curve:
        """All devices of a server and its host, which the clock does not change."""
        n = self.devices
        return replace(device, watts=n * (device.watts + host_watts), idle=n * (device.idle + host_watts))

    def row(self, phases: Phases) -> Row:
        """Run the row for `draws` hours: rated so that without `extra` servers it peaks at BASE_PEAK, each as busy."""
        samples = [read_requests(self.trace) if self.trace else synthetic(3600, 10.0, self.seed + n) for n in range(self.draws)]
        mean = float(np.mean([phases.service(sample).sum(1).mean() for sample in samples]))
        phases = phases.times(max(1.0, SHORTEST / mean))

        def ran(servers: int, feed: Feed, rules: tuple[Rule, ...] = ()) -> list[Outcome]:
            rate = self.load * servers / max(mean, SHORTEST)
            return [run(s.at_rate(rate, self.seed + n), phases, servers, feed, rules, n) for n, s in enumerate(samples)]

        grown, free = round(self.servers * (1 + self.extra)), Feed(math.inf)
        rating = max(float(one.watts.max()) for one in ran(self.servers, free)) / BASE_PEAK
        found, unlimited = ran(grown, Feed(rating), POLICIES[self.policy]), ran(grown, free)
        low, high = (
            fmean(getattr(one, key) / getattr(other, key) for one, other in zip(found, unlimited, strict=True))
            for key in ("low_seconds", "high_seconds")
        )
        share = np.concatenate([one.watts for one in found]) / rating
        return Row(share, sum(one.brakes for one in found), 100 * (low - 1), 100 * (high - 1))

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Brake events, the peak against the rating, and latency lost, for servers that run this network; watts by minute."""
        found = self.row(self.phases(graph, machine))
        values = {"brakes": float(found.brakes), "peak_share": 100 * float(found.share.max()),
                  "mean_share": 100 * float(found.share.mean()), "low_priority_loss": found.low_loss,
                  "high_priority_loss": found.high_loss}  # fmt: skip
        units = {"brakes": "events"} | {k: "%" for k in values if k != "brakes"}
        rows: list[Mapping[str, Any]] = [
            {"minute": minute, "share": float(found.share[30 * minute : 30 * minute + 30].max())}
            for minute in range(len(found.share) // 30)
        ]
        return Reading(values, units, tuple(rows))
