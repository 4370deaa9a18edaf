"""Replicas of an engine behind a router, prompts read beside decoding or apart from it, and what their clients see."""

import math
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache
from heapq import heappop, heappush
from importlib.resources import files
from typing import Any

from narrows.diagnose import prepared
from narrows.errors import NarrowsError, closest
from narrows.footprint import footprint
from narrows.graph import Graph
from narrows.machine import Link, Machine
from narrows.parallel import expert_parallel, pipelined
from narrows.simulate.blocks import PIECE
from narrows.simulate.closed_loop import constants
from narrows.simulate.outcome import Outcome
from narrows.simulate.requests import Answer, Request
from narrows.simulate.rules import Rules
from narrows.simulate.scaling import Replicas, Scaling, source_bytes_per_s
from narrows.simulate.serving import Engine
from narrows.simulate.sharing import Sharing, Streams
from narrows.simulate.speculation import Speculation, Speculative
from narrows.simulate.step_times import PS, Overlap, Shelf, StepTimes
from narrows.simulate.tiers import Tier, Tiers
from narrows.step import Step

VISIBLE = 0.98  # of the datasheet's memory that the driver shows: an RTX 4090 reports 25.25 of 25.77 GB
UTILIZATION = 0.9  # of the device's memory that an engine may fill: vLLM's default
CONTEXT_BYTES = 0.55e9  # of driver, libraries and captured graphs: from what vLLM 0.19 reports on an RTX 4090
SAMPLER = 4  # copies of the last logits in fp32 that sampling makes at its peak: an assumption


@cache
def _presets() -> dict[str, dict[str, Any]]:
    return tomllib.loads(files("narrows.data").joinpath("engines.toml").read_text("utf-8"))


def engines() -> list[str]:
    """The engines whose rules are known."""
    return sorted(_presets())


def rules(engine: str, **changes: Any) -> Rules:
    """The rules of an engine, with changes; raises NarrowsError for an unknown engine."""
    if engine not in _presets():
        raise NarrowsError(f"there is no engine {engine!r}.", where="--engine", remedy=closest(engine, engines()))
    known = {f.name for f in fields(Rules)}
    given = {k: v for k, v in _presets()[engine].items() if k in known}
    return Rules(**{"name": engine, **given, **{k: v for k, v in changes.items() if v is not None}})


@dataclass(frozen=True)
class Group:
    """Equal replicas: a model cut over `devices` of a machine each, under an engine's rules.

    blocks   of keys and values per replica, as the engine reports them; 0: what is left of the memory
    scale    factor on the time of every step (of a slower or capped device)
    utilization   share of the device's memory that the engine may fill
    context  tokens that a request may have, prompt and answer together; longer ones are rejected (0: any)
    overlap  of products, memory and network within a step (None: one after another)
    wire     over which keys and values leave where prompts are read apart (None: the machine's own link)
    streams  they leave layer by layer while a prompt is read, not after it
    sharing  prompts are read on a share of the device beside decoding on the rest (None: in the same steps, or in turn)
    pipeline stages that share the layers evenly: as many batches are under way, each with its share of the room
    experts  devices that share the experts of a mixture, each with sequences of its own; they are taken to be in step
    speculation   a draft proposes tokens which the model checks together (None: one token a step)
    scaling  replicas come and go with the load, `replicas` at the most (None: they are always there)
    shelf    drives of a replica that hold its keys and values (None: they lie in the device's memory)
    cap_watts   of a device, under which its clock falls as far as its steps need (0: no cap)
    host_bytes, disk_bytes   of a replica's host and disk, for keys and values of prompts that its devices have no room for
    """

    graph: Graph
    machine: Machine
    rules: Rules
    devices: int = 1
    replicas: int = 1
    blocks: int = 0
    scale: float = 1.0
    utilization: float = UTILIZATION
    context: int = 0
    overlap: Overlap | None = None
    wire: Link | None = None
    streams: bool = False
    sharing: Sharing | None = None
    pipeline: int = 1
    experts: int = 1
    speculation: Speculation | None = None
    scaling: Scaling | None = None
    shelf: Shelf | None = None
    cap_watts: float = 0.0
    host_bytes: float = 0.0
    disk_bytes: float = 0.0

    def __post_init__(self) -> None:
        given = [name for name in ("overlap", "sharing", "speculation", "shelf", "cap_watts") if getattr(self, name)]
        if len(given) > 1:
            raise NarrowsError(f"{' and '.join(given)}: each changes how long a step takes, and not together.", where="group",
                               remedy="Give one of them.")  # fmt: skip
        if self.scaling and self.pipeline * self.experts > 1:
            raise NarrowsError("replicas of several batches do not come and go.", where="autoscaling",
                               remedy="Leave pipeline and experts out, or keep all replicas.")  # fmt: skip

    @property
    def engines(self) -> int:
        """Batches that are under way at a time, in all replicas."""
        return self.replicas * self.pipeline * self.experts

    @property
    def share(self) -> Graph:
        """What the devices that read one batch execute: with what it costs to share layers and experts with others."""
        return _share(self.graph, self.experts, self.pipeline)

    def times(self) -> StepTimes:
        """The times of its steps, with what the engine adds."""
        return _times(replace(self._timed(), sharing=None))

    def cuts(self) -> Streams | None:
        """What a share of the device makes of its steps, where it is shared."""
        return _streams(self._timed()) if self.sharing else None

    def _timed(self) -> "Group":
        """What the times of its steps depend on."""
        return replace(self, graph=self.share, replicas=1, blocks=0, utilization=1.0, context=0, wire=None, streams=False,
                       pipeline=1, experts=1, scaling=None, host_bytes=0.0, disk_bytes=0.0)  # fmt: skip

    def room(self) -> int:
        """Blocks of keys and values that a replica holds.

        What an engine finds when it starts: its share of the memory, less weights, the peak of a step's activations,
        the sampler's logits and what driver and captured graphs take. Raises NarrowsError where nothing is left.
        """
        if self.blocks:
            return self.blocks
        draft, tokens = self._draft(), min(self.rules.max_tokens, 32768)
        weights, activations, logits = _taken(self.share, self.machine, self.devices, tokens)
        used = weights / self.pipeline + activations
        used += _taken(draft, self.machine, self.devices, tokens)[0] if draft else 0.0
        used += SAMPLER * 4 * min(self.rules.max_sequences, 1024) * logits + CONTEXT_BYTES
        left = self.machine.memory.capacity_bytes * VISIBLE * self.utilization - used
        if self.shelf and left > 0:
            left = self.shelf.room_bytes / self.devices
        blocks = int(left / (self.token_bytes() * self.rules.block))
        if blocks < 1:
            raise NarrowsError(
                f"{self.graph.name} on {self.devices} x {self.machine.name} leaves {left / 1e9:.1f} GB for keys and values.",
                where="memory",
                remedy="Use more devices a replica, larger ones, or fewer bits.",
            )
        return blocks

    def token_bytes(self) -> float:
        """Bytes of keys and values of one token, per device."""
        return sum(_token_bytes(graph, self.machine, self.devices) for graph in (self.graph, self._draft()) if graph)

    def tiers(self) -> tuple[Tier, ...]:
        """What lies below its memory; raises NarrowsError for the host's where no link leads there."""
        piece, found = PIECE * self.token_bytes(), []
        for name, room in (("host", self.host_bytes), ("disk", self.disk_bytes)):
            if room:
                pieces = int(room / (piece * self.devices))
                found.append(Tier(name, pieces, round(piece / source_bytes_per_s(self.machine, self.devices, name) * PS)))
        return tuple(found)

    def _draft(self) -> Graph | None:
        return self.speculation.draft if self.speculation else None


@lru_cache(maxsize=256)
def _share(graph: Graph, experts: int, pipeline: int) -> Graph:
    return pipelined(expert_parallel(graph, experts), pipeline)


@lru_cache(maxsize=1024)  # a plan asks for the room of the same replica with every number of sequences
def _taken(graph: Graph, machine: Machine, devices: int, tokens: int) -> tuple[float, float, float]:
    """Bytes of weights and of activations per device in a step that reads so many tokens, and the width of its logits."""
    step = Step.prefill(1, tokens)
    own = prepared(graph, step, machine, devices)
    logits = max((float(op["outputs"]) for op in own if op.split == "vocabulary" and op.kind == "linear"), default=0.0)  # type: ignore[arg-type]
    return float(own.weight_bytes), float(footprint(own, step).activation_bytes), logits


@lru_cache(maxsize=256)
def _token_bytes(graph: Graph, machine: Machine, devices: int) -> float:
    own = prepared(graph, Step.decode(1, 4096), machine, devices)
    one, two = (float(footprint(own, Step.decode(1, n)).kv_bytes) for n in (4095, 8191))
    return (two - one) / 4096 or one / 4096


@lru_cache(maxsize=64)
def _times(group: Group) -> StepTimes:
    engine = _presets().get(group.rules.name, {}).get("times", "vllm")
    c = constants(engine)
    sizes = group.devices, group.rules.max_tokens, group.rules.max_sequences
    added = c["decode"] * group.scale, c["step_ms"] * 1e-3, c["sequence_us"] * 1e-6
    if group.speculation:
        return Speculative(group.speculation, group.graph, group.machine, *sizes, *added)
    return StepTimes(group.graph, group.machine, *sizes, *added, group.overlap, group.shelf, group.cap_watts)


@lru_cache(maxsize=64)
def _streams(group: Group) -> Streams:
    ready = prepared(group.graph, Step.decode(1, 1), group.machine, group.devices)
    return Streams(group.sharing or Sharing(), ready, group.machine, group.rules.max_tokens,
                   lambda part: _times(replace(group, machine=part, sharing=None)))  # fmt: skip


Route = Callable[[Request, list[Engine]], int]


def fewest(request: Request, replicas: list[Engine]) -> int:
    """The replica with the fewest requests inside."""
    return min(range(len(replicas)), key=lambda i: replicas[i].load)


def in_turn(request: Request, replicas: list[Engine]) -> int:
    """One replica after another."""
    return min(range(len(replicas)), key=lambda i: replicas[i].pushed)


def serve(
    requests: Iterable[Request],
    group: Group,
    prefill: Group | None = None,
    route: Route = fewest,
    ttft: float = math.inf,
    tpot: float = math.inf,
    each: Callable[[Answer], None] | None = None,
) -> Outcome:
    """What clients see of a load on replicas: `prefill`, where it is given, reads the prompts and sends their keys and values on.

    `ttft` and `tpot` (seconds) are what a request must keep to count as good. `each` is called with every answer.
    Memory does not grow with the load; the same load gives the same bits.
    """
    outcome = Outcome(ttft, tpot)

    def done(answer: Answer) -> None:
        outcome.add(answer)
        if each is not None:
            each(answer)

    requests = _within(requests, group.context, outcome) if group.context else requests
    if prefill is None and group.scaling:
        one = replace(group, replicas=1)
        changing = Replicas(group.scaling, group.replicas, lambda ready: _started(one, done, outcome, ready)[0], outcome.count)
        for request in requests:
            there = changing.at(request.arrival)
            there[route(request, there)].push(request)
        changing.close()
        outcome.close((), changing.paid / PS, changing.starts)
        return outcome
    if prefill is None:
        replicas = _started(group, done, outcome)
        for request in requests:
            for engine in replicas:
                engine.advance(request.arrival)
            replicas[route(request, replicas)].push(request)
        for engine in replicas:
            engine.advance()
        outcome.close(replicas, group.replicas * outcome.seconds)
        return outcome
    return _apart(requests, prefill, group, route, done, outcome)


def _within(requests: Iterable[Request], context: int, outcome: Outcome) -> Iterator[Request]:
    for request in requests:
        if request.prompt + request.output > context:
            outcome.reject(request, f"the model reads and writes {context} tokens at most")
        else:
            yield request


def clients(requests: Iterable[Request], group: Group, count: int, ttft: float = math.inf, tpot: float = math.inf,
            each: Callable[[Answer], None] | None = None) -> Outcome:  # fmt: skip
    """What so many clients see who each send their next request to one replica when the last is answered; else as `serve`.

    Arrivals of the requests do not count.
    """
    outcome = Outcome(ttft, tpot)
    queue = iter(_within(requests, group.context, outcome) if group.context else requests)

    def send(now: int) -> None:
        following = next(queue, None)
        if following is not None:
            engine.push(replace(following, arrival=now))

    def done(answer: Answer) -> None:
        outcome.add(answer)
        if each is not None:
            each(answer)
        send(answer.last)

    def reject(request: Request, why: str) -> None:
        outcome.reject(request, why)
        send(request.arrival)

    engine = Engine(group.times(), group.rules, group.room(), done, reject, outcome.pace, group.cuts(),
                    tiers=Tiers(group.tiers()))  # fmt: skip
    for _ in range(count):
        send(0)
    engine.advance()
    outcome.close([engine], outcome.seconds)
    return outcome


def _started(group: Group, emit: Callable[[Answer], None], outcome: Outcome, ready: int = 0) -> list[Engine]:
    times, blocks, cuts, tiers = group.times(), group.room(), group.cuts(), group.tiers()
    return [
        Engine(times, group.rules, blocks, emit, outcome.reject, outcome.pace, cuts, ready, Tiers(tiers))
        for _ in range(group.engines)
    ]


def _apart(requests: Iterable[Request], prefill: Group, decode: Group, route: Route, done: Callable[[Answer], None],
           outcome: Outcome) -> Outcome:  # fmt: skip
    """Prompts are read by one group; then their keys and values travel to another, which decodes."""
    if prefill.scaling or decode.scaling:
        raise NarrowsError("replicas that come and go read prompts and decode.", where="disaggregated",
                           remedy="Leave autoscaling out, or read prompts together.")  # fmt: skip
    wire = prefill.wire or prefill.machine.link or prefill.machine.host_link
    if wire is None:
        raise NarrowsError(f"{prefill.machine.name} has no link.", where="disaggregated", remedy="Give one, or serve together.")
    bytes_per_token = prefill.token_bytes() * prefill.devices
    wires = wire.bandwidth_bytes_per_s * min(prefill.devices, decode.devices)
    latency = round(wire.latency_seconds * PS)
    read: dict[int, tuple[Request, Answer]] = {}
    sent: list[tuple[int, int]] = []
    asked: dict[str, Request] = {}

    def arrived(answer: Answer) -> None:
        number = int(answer.request.name)
        whole = asked.pop(answer.request.name)
        if whole.output == 1:
            done(replace(answer, request=whole))
            return
        read[number] = whole, answer
        travel = round(whole.prompt * bytes_per_token / wires * PS)
        if prefill.streams:  # what was made before the last layer has left meanwhile
            travel = max(travel // layers, travel - answer.prompt * (layers - 1) // layers)
        heappush(sent, (answer.last + latency + travel, number))

    def finished(answer: Answer) -> None:
        whole, before = read.pop(int(answer.request.name))
        done(before.then(whole, answer))

    readers, writers = _started(prefill, arrived, outcome), _started(decode, finished, outcome)
    layers = readers[0].times.layers

    def deliver(until: int | None) -> None:
        while sent and (until is None or sent[0][0] <= until):
            moment, number = heappop(sent)
            whole, _ = read[number]
            for engine in writers:
                engine.advance(moment)
            request = Request(moment, whole.prompt, whole.output, (), str(number), True)
            writers[route(request, writers)].push(request)

    for number, request in enumerate(requests):
        for engine in readers:
            engine.advance(request.arrival)
        deliver(request.arrival)
        asked[str(number)] = request
        readers[route(request, readers)].push(replace(request, output=1, name=str(number)))
    for engine in readers:
        engine.advance()
    deliver(None)
    for engine in writers:
        engine.advance()
    outcome.close([*readers, *writers], (prefill.replicas + decode.replicas) * outcome.seconds)
    return outcome
