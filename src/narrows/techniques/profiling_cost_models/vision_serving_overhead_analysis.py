"""Follow an image from its file to the answer, and find whether the network or what comes before it bounds the server.

A request is decoded, resized, normalised and moved to the device before the network sees it, and waits in between.
`profile` times the stages of a real pipeline and the whole around them, so that what it attributes can be checked.
`measure` puts the host's stages before the predicted network, serves a stream of requests through them in a simulation
of queues, and says how many host cores the device needs before it is the bound itself.

## When it helps
Images far larger than what the network reads, fast devices beside few host cores, chains of networks over a broker.

## When it does not
Small images and slow networks: the network is the bound already. The rates of the host's stages are those of one core
that was measured; pass your own, which `profile` gives. A device that decodes by itself is not in the model.

## Reference
AbouElhamayed et al., Beyond Inference: Performance Analysis of DNN Server Overheads for Computer Vision, 2024,
arXiv 2403.12981. The queues are ours: first come first served, and a device that takes what waits, up to a batch.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from statistics import median
from time import perf_counter
from typing import Any, ClassVar

from narrows.cost import Limit
from narrows.diagnose import seconds
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

NETWORK = "inference"  # the name of the stage that is not overhead
_IMAGES = "JPEGs of 60 x 70, 500 x 375 and 3564 x 2880, MobileNetV2 on one core"
_SERVED = "500 x 375 decoded on this core, ViT-B/16 predicted on an RTX 4090"


@dataclass(frozen=True)
class Stage:
    """A place that requests pass: `servers` alike, each of which takes up to `batch` of them for `seconds(how many)`."""

    name: str
    seconds: Callable[[int], float]
    servers: int = 1
    batch: int = 1


@dataclass(frozen=True)
class Served:
    """Requests per second, seconds from entry to answer on average, and by stage: seconds of waiting, share of time busy."""

    throughput: float
    latency: float
    waiting: Mapping[str, float]
    busy: Mapping[str, float]


def serve(stages: Sequence[Stage], clients: int, requests: int = 2000) -> Served:
    """Send `requests` through stages in a row: each of `clients` sends its next one as soon as it has its answer.

    Throughput leaves out the first half, while queues fill. Raises NarrowsError without stages, clients or requests.
    """
    if not stages or clients < 1 or requests < 2:
        raise NarrowsError(f"{len(stages)} stages, {clients} clients, {requests} requests.", where="serve",
                           remedy="Give 1 or more stages and clients, and 2 or more requests.")  # fmt: skip
    queues: list[deque[tuple[float, float]]] = [deque() for _ in stages]  # each request: when it entered, when it queued here
    idle, waited, worked = [s.servers for s in stages], [0.0] * len(stages), [0.0] * len(stages)
    events: list[tuple[float, int, int, list[float]]] = []  # end of a service: time, order, stage, when its requests entered
    order, done, latency = count(), list[float](), 0.0

    def start(i: int, now: float) -> None:
        stage = stages[i]
        while idle[i] and queues[i]:
            taken = [queues[i].popleft() for _ in range(min(stage.batch, len(queues[i])))]
            took = stage.seconds(len(taken))
            idle[i], worked[i] = idle[i] - 1, worked[i] + took
            waited[i] += sum(now - queued for _, queued in taken)
            heapq.heappush(events, (now + took, next(order), i, [entered for entered, _ in taken]))

    queues[0].extend([(0.0, 0.0)] * min(clients, requests))
    start(0, 0.0)
    while len(done) < requests:
        now, _, i, entries = heapq.heappop(events)
        idle[i] += 1
        if i + 1 < len(stages):
            queues[i + 1].extend((entered, now) for entered in entries)
            start(i + 1, now)
        else:
            done += [now] * len(entries)
            latency += sum(now - entered for entered in entries)
            queues[0].extend([(now, now)] * len(entries))
            start(0, now)
        start(i, now)
    half = len(done) // 2
    span = done[-1] - done[half - 1]
    return Served((len(done) - half) / span if span else math.inf, latency / len(done),
                  {s.name: w / len(done) for s, w in zip(stages, waited, strict=True)},
                  {s.name: min(w / (s.servers * done[-1]), 1.0) for s, w in zip(stages, worked, strict=True)})  # fmt: skip


@dataclass(frozen=True)
class VisionServing(Measures):
    """Seconds of each stage of a vision request, and what they leave of the network's throughput."""

    card: ClassVar[Card] = Card(
        "vision-serving-overhead-analysis",
        relieves=(Limit.SCHEDULING, Limit.COMPUTE, Limit.COMMUNICATION),
        phases=("forward",),
        exact=True,
        claims=(
            Claim("attributed", "fraction", None, f"{_IMAGES}: stages over the latency of the same run, the least",
                  "section 3", "run", "the stages must add up to the whole, within 5 %", at_least=0.95, at_most=1.0),
            Claim("share_growth", "fraction", None, f"{_IMAGES}: least growth of the share outside the network",
                  "section 4", "run", "each image has over forty times the pixels of the last: 2 % of the latency at least",
                  at_least=0.02),
            Claim("medium_share", "fraction", 0.56, _SERVED, "abstract", "simulated",
                  "a server's core decodes slower than the paper's desktop: three quarters to one and a half of it",
                  at_least=0.42, at_most=0.84),
            Claim("large_loss", "fraction", 0.80, "the same at 3564 x 2880 with 16 cores: throughput lost to the host",
                  "abstract", "simulated", "about 80 %, on another host: less a fifth", at_least=0.64),
            Claim("parallel_gain", "x", 2.25, f"{_IMAGES}, the largest: 1 to 8 cores before it, queues of measured stages",
                  "abstract", "simulated", "the paper's gain is over another server: twice at least", at_least=2.0),
        ),
    )  # fmt: skip
    overheads: bool = choice(True, help="count what is outside of the network; False counts the network alone")
    pixels: float = choice(500 * 375.0, 60 * 70.0, 3564 * 2880.0, help="of an image as it arrives")
    cores: int = choice(16, 1, 4, 64, help="host cores that decode, resize and normalise")
    clients: int = choice(256, 1, 16, help="requests in flight")
    # as `rates` in the experiments timed one core of a server with Pillow 13 (libjpeg-turbo)
    pixels_per_second: float = choice(8e7, 2e8, help="that a host core decodes and resizes")
    request_seconds: float = choice(1e-3, 1e-4, help="of a host core for an image of any size: file, normalising, copies")
    broker_seconds: float = choice(0.0, 1e-3, help="that a message broker takes between networks of a chain")

    def __post_init__(self) -> None:
        for name in ("pixels", "cores", "clients", "pixels_per_second"):
            if not getattr(self, name) > 0:
                raise NarrowsError(f"{getattr(self, name)!r} is not above 0.", where=f"{self.card.slug}: {name}",
                                   remedy="Give more than 0.")  # fmt: skip

    def baseline(self) -> "VisionServing":
        return VisionServing(False)

    def stages(self, graph: Graph, machine: Machine, batch: int) -> tuple[Stage, ...]:
        """The stages a request passes; the device takes up to `batch` at a time, as long as is predicted for so many."""
        reads = next((op.spec.reads(op.sized(Step.forward())) * op.act.bits / 8 for op in graph), 0.0)
        link = machine.host_link if machine.kind != "cpu" else None  # on a CPU the network reads where the host wrote
        known: dict[int, float] = {}

        def network(images: int) -> float:
            if images not in known:
                known[images] = float(seconds(graph, machine, Step.forward(images))[0])
            return known[images]

        host = self.pixels / self.pixels_per_second + self.request_seconds
        outside = (Stage("preprocessing", lambda _: host, self.cores),
                   Stage("transfer", lambda n: n * reads / link.bandwidth_bytes_per_s + link.latency_seconds if link else 0.0),
                   Stage("broker", lambda _: self.broker_seconds, self.clients))  # fmt: skip
        return (*(s for s in outside if self.overheads and s.seconds(1)), Stage(NETWORK, network, batch=batch))

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """One request alone, and `clients` of them at a time on a device that batches up to the step's sequences.

        latency_seconds and share_outside of one request; throughput (images per second) under load, that of the network
        alone, and the fraction `lost` between; cores_needed until the device is the bound; `overhead_bound`: 1 where it
        is not. Rows: seconds of each stage for one request, mean waiting and share of time busy under load.
        """
        batch = int(step["sequences"])
        stages = self.stages(graph, machine, batch)
        alone = {stage.name: stage.seconds(1) for stage in stages}
        whole = math.fsum(alone.values())
        if not alone[NETWORK]:
            raise NarrowsError("it takes no time.", where=graph.name, remedy="Give a graph with ops.")
        loaded = serve(stages, self.clients)
        network = serve(stages[-1:], self.clients).throughput
        rows = tuple({"stage": name, "seconds": took, "waiting_seconds": loaded.waiting[name], "busy": loaded.busy[name]}
                     for name, took in alone.items())  # fmt: skip
        values = {"latency_seconds": whole, "share_outside": 1 - alone[NETWORK] / whole, "throughput": loaded.throughput,
                  "network_throughput": network, "lost": max(1 - loaded.throughput / network, 0.0),
                  "cores_needed": float(math.ceil(network * alone.get("preprocessing", 0.0))),
                  "loaded_latency_seconds": loaded.latency,
                  "overhead_bound": float(max(loaded.busy, key=lambda name: loaded.busy[name]) != NETWORK)}  # fmt: skip
        units = {"latency_seconds": "s", "loaded_latency_seconds": "s", "throughput": "1/s", "network_throughput": "1/s"}
        return Reading(values, units, rows)

    def profile(
        self,
        stages: Mapping[str, Callable[[Any], Any]],
        request: Any,
        runs: int = 9,
        clock: Callable[[], float] = perf_counter,
    ) -> Reading:
        """Time a real pipeline: each stage makes of what the one before gave what the next one takes.

        Values: seconds (median latency), attributed (the stages' sum over the latency of the same run, the least of the runs),
        share_outside (of the stages before `inference`). A row a stage with its median seconds. Raises NarrowsError where
        no stage is called `inference`, or for no runs.
        """
        if NETWORK not in stages or runs < 1:
            raise NarrowsError(f"{runs} runs of {', '.join(stages)}.", where="profile", remedy=f"Call one stage {NETWORK!r}.")
        counted = [name for name in stages if self.overheads or name == NETWORK]
        found: list[tuple[float, dict[str, float]]] = []
        for _ in range(runs + 1):
            begin, given, spent = clock(), request, dict[str, float]()
            for name, work in stages.items():
                start = clock()
                given = work(given)
                spent[name] = clock() - start
            found.append((clock() - begin, spent))
        del found[0]  # it warms caches and allocators
        each = {name: median(spent[name] for _, spent in found) for name in counted}
        values = {"seconds": median(latency for latency, _ in found),
                  "attributed": min(sum(spent[name] for name in counted) / latency for latency, spent in found),
                  "share_outside": 1 - each[NETWORK] / math.fsum(each.values())}  # fmt: skip
        return Reading(values, {"seconds": "s"}, tuple({"stage": name, "seconds": took} for name, took in each.items()))
