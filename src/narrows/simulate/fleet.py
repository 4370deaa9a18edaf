"""Replicas of an engine behind a router, prompts read beside decoding or apart from it, and what their clients see."""

import math
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache, partial
from importlib.resources import files
from itertools import count, islice
from typing import Any

from narrows.diagnose import prepared
from narrows.errors import NarrowsError, closest
from narrows.footprint import footprint
from narrows.graph import Graph
from narrows.machine import Link, Machine
from narrows.parallel import expert_parallel, pipelined
from narrows.simulate.closed_loop import constants
from narrows.simulate.outcome import GroupOutcome, Outcome
from narrows.simulate.pace import Tell
from narrows.simulate.requests import Answer, Request
from narrows.simulate.rules import Rules
from narrows.simulate.scaling import Replicas, Scaling, source_bytes_per_s
from narrows.simulate.serving import Engine
from narrows.simulate.sharing import Sharing, Streams
from narrows.simulate.speculation import Speculation, Speculative
from narrows.simulate.step_times import PS, Overlap, Shelf, StepTimes
from narrows.simulate.tiers import PIECE, Tier, Tiers
from narrows.simulate.traffic import Follow, Route, Standing, Traffic, fewest, turns
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
        if self.overlap and self.sharing:
            raise NarrowsError("overlap and sharing both give out the device's units at the same time.", where="group",
                               remedy="Give one of them.")  # fmt: skip
        if self.scaling and self.pipeline * self.experts > 1:
            raise NarrowsError("replicas of several batches do not come and go.", where="autoscaling",
                               remedy="Leave pipeline and experts out, or keep all replicas.")  # fmt: skip

    @property
    def engines(self) -> int:
        """Batches that are under way at a time, in all replicas."""
        return self.replicas * self.pipeline * self.experts

    @property
    def name(self) -> str:
        """How many replicas of how many devices it has."""
        return f"{self.replicas} x {self.devices * self.engines // max(self.replicas, 1)} {self.machine.name}"

    @property
    def price_per_hour(self) -> float | None:
        """Dollars of all its devices; None where the machine's file names none."""
        price = self.machine.price_per_hour
        return None if price is None else price * self.devices * self.engines

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
        """What lies below the memory of one of its batches; raises NarrowsError for the host's where no link leads there."""
        piece, found = PIECE * self.token_bytes(), []
        for name, room in (("host", self.host_bytes), ("disk", self.disk_bytes)):
            if room:
                pieces = int(room / (piece * self.devices * self.pipeline * self.experts))
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
    how = group.overlap, group.shelf, group.cap_watts
    if group.speculation:
        return Speculative(group.speculation, group.graph, group.machine, *sizes, *added, *how)
    return StepTimes(group.graph, group.machine, *sizes, *added, *how)


@lru_cache(maxsize=64)
def _streams(group: Group) -> Streams:
    ready = prepared(group.graph, Step.decode(1, 1), group.machine, group.devices)
    return Streams(group.sharing or Sharing(), ready, group.machine, group.rules.max_tokens,
                   lambda part: _times(replace(group, machine=part, sharing=None, cap_watts=group.cap_watts * part.units
                                               / group.machine.units)))  # fmt: skip


Groups = Group | Sequence[Group]  # of one role; several where replicas are unlike


def several(groups: Groups) -> tuple[Group, ...]:
    """The groups of a role."""
    return (groups,) if isinstance(groups, Group) else tuple(groups)


def serve(
    requests: Iterable[Request],
    group: Groups,
    prefill: Groups | None = None,
    route: Route = fewest,
    ttft: float = math.inf,
    tpot: float = math.inf,
    each: Callable[[Answer], None] | None = None,
    follow: Follow = turns,
) -> Outcome:
    """What clients see of a load on replicas: `prefill`, where it is given, reads the prompts and sends their keys and values on.

    `ttft` and `tpot` (seconds) are what a request must keep to count as good. `each` is called with every answer. `follow`
    tells what an answer brings; arrivals count from its last token. With several groups the outcome has a part for each.
    Memory does not grow with the load; the same load gives the same bits.
    """
    service = _Service(several(group), several(prefill) if prefill else (), route, Outcome(ttft, tpot), each, follow)
    return service.play(requests)


def clients(
    requests: Iterable[Request],
    group: Groups,
    many: int,
    ttft: float = math.inf,
    tpot: float = math.inf,
    each: Callable[[Answer], None] | None = None,
    prefill: Groups | None = None,
    route: Route = fewest,
) -> Outcome:
    """What so many clients see who each send their next request, or turn, when the last is answered; else as `serve`.

    Arrivals of the requests do not count.
    """
    queue = (replace(request, arrival=0) for request in requests)

    def follow(request: Request, answered: bool) -> Iterable[Request]:
        return request.then if answered and request.then else islice(queue, 1)

    return serve(list(islice(queue, many)), group, prefill, route, ttft, tpot, each, follow)


@dataclass(frozen=True, slots=True)
class _Wire:
    """How keys and values of a prompt travel to where it is answered: after `latency` picoseconds, at so many bytes a second.

    layers   that leave one by one while it is read (0: all, once it is)
    """

    latency: int
    token_bytes: float
    bytes_per_s: float
    layers: int

    @classmethod
    def between(cls, reader: Group, devices: int) -> "_Wire":
        """From a replica to one of so many devices; raises NarrowsError where no link leads anywhere."""
        wire = reader.wire or reader.machine.link or reader.machine.host_link
        if wire is None:
            raise NarrowsError(f"{reader.machine.name} has no link.", where="disaggregated",
                               remedy="Give one, or serve together.")  # fmt: skip
        rate = wire.bandwidth_bytes_per_s * min(reader.devices, devices)
        return cls(round(wire.latency_seconds * PS), reader.token_bytes() * reader.devices, rate,
                   reader.times().layers if reader.streams else 0)  # fmt: skip

    def arrival(self, whole: Request, read: Answer) -> int:
        """When all of a prompt's are there."""
        travel = round(whole.prompt * self.token_bytes / self.bytes_per_s * PS)
        if self.layers:  # what was made before the last layer has left meanwhile
            travel = max(travel // self.layers, travel - read.prompt * (self.layers - 1) // self.layers)
        return read.last + self.latency + travel


Done = Callable[[int, Answer], None]  # of the engine of that number
Reject = Callable[[Request, str], None]


class _Service:
    """A load while it is served: its replicas, and its requests between those that read prompts and those that answer."""

    def __init__(self, groups: tuple[Group, ...], prefill: tuple[Group, ...], route: Route, outcome: Outcome,
                 each: Callable[[Answer], None] | None, follow: Follow) -> None:  # fmt: skip
        self._outcome, self._each, self._follow, self._context = outcome, each, follow, groups[0].context
        self._apart, self._unlike = bool(prefill), max(len(groups), len(prefill)) > 1
        self._engines, self._names, self._replicas = count(), count(), sum(one.replicas for one in (*groups, *prefill))
        self._groups: dict[int, GroupOutcome] = {}  # by engine, where replicas are unlike
        self._asked: dict[str, Request] = {}  # whose prompts are read
        self._read: dict[str, tuple[Request, Answer, int]] = {}  # and those that are answered, with who read them
        self._roles: list[Standing | Replicas] = []
        if any(one.scaling for one in (*groups, *prefill)):
            self._roles.append(self._changing((*groups, *prefill)))
        elif prefill:
            devices = min(group.devices for group in groups)  # who answers is chosen when all is there: the narrowest counts
            readers = [partial(self._hand_over, _Wire.between(group, devices)) for group in prefill]
            self._add("prompts", prefill, readers, lambda r, why: self._refuse(self._asked.pop(r.name), why))
            self._add("answers", groups, [self._join] * len(groups), lambda r, why: self._refuse(self._read.pop(r.name)[0], why))
        else:
            self._add("all", groups, [self._done] * len(groups), self._refuse)
        self._traffic = Traffic(self._roles, route, follow is not turns)

    def _changing(self, groups: tuple[Group, ...]) -> Replicas:
        """Replicas that come and go."""
        first = groups[0]
        if len(groups) > 1 or not first.scaling:
            raise NarrowsError("replicas that come and go read prompts and decode, and are all alike.", where="autoscaling",
                               remedy="Leave autoscaling out, or give one group, without prefill.")  # fmt: skip
        one = replace(first, replicas=1)
        return Replicas(first.scaling, first.replicas, lambda ready: self._start(one, self._done, self._refuse, ready)[0],
                        self._outcome.count)  # fmt: skip

    def _add(self, role: str, groups: tuple[Group, ...], done: Sequence[Done], reject: Reject) -> None:
        """The replicas of one more role."""
        found: list[Engine] = []
        for group, answered in zip(groups, done, strict=True):
            seen = Outcome(self._outcome.ttft_limit, self._outcome.tpot_limit) if self._unlike else None
            engines = self._start(group, answered, reject, tell=seen.pace if seen else None)
            if seen:
                one = GroupOutcome(group.name, role, group.price_per_hour, seen, engines)
                self._outcome.groups.append(one)
                self._groups |= {len(self._groups) + i: one for i in range(len(engines))}
            found += engines
        self._roles.append(Standing(found))

    def _start(self, group: Group, done: Done, reject: Reject, ready: int = 0, tell: Tell | None = None) -> list[Engine]:
        times, blocks, cuts, tiers, every = group.times(), group.room(), group.cuts(), group.tiers(), self._outcome.pace

        def both(first: int, slope: int, n: int, sequences: float) -> None:
            every(first, slope, n, sequences)
            if tell:
                tell(first, slope, n, sequences)

        return [Engine(times, group.rules, blocks, partial(done, next(self._engines)), reject, both if tell else every, cuts,
                       ready, Tiers(tiers)) for _ in range(group.engines)]  # fmt: skip

    def play(self, requests: Iterable[Request]) -> Outcome:
        """The whole load, from its first request to its last answer."""
        outcome = self._outcome
        plain = not (self._apart or self._context)
        self._traffic.play(requests if plain else (inside for request in requests if (inside := self._enter(request))))
        role = self._roles[0]
        if isinstance(role, Replicas):
            role.close()
            outcome.close((), role.paid / PS, role.starts)
        else:
            outcome.close([engine for role in self._roles for engine in role.engines], self._replicas * outcome.seconds)
        return outcome

    def _enter(self, request: Request) -> Request | None:
        """A request as the first role gets it; None for one that is too long."""
        if self._context and request.prompt + request.longest > self._context:
            self._refuse(request, f"the model reads and writes {self._context} tokens at most")
            return None
        if not self._apart:
            return request
        if request.longest > 1 and (why := self._too_large(request)):
            self._refuse(request, why)
            return None
        name = str(next(self._names))
        self._asked[name] = request
        return replace(request, output=1, also=(), name=name)

    def _too_large(self, request: Request) -> str:
        """Why none of those that answer could hold it: then its prompt is not read either."""
        why = ""
        for engine in self._roles[1].engines:
            if not (why := request.refusal(engine.rules, engine.blocks)):
                break
        return why

    def _hand_over(self, wire: _Wire, number: int, answer: Answer) -> None:
        """A prompt was read: its keys and values travel to where it is answered."""
        name = answer.request.name
        whole = self._asked.pop(name)
        if whole.longest == 1:
            self._done(number, replace(answer, request=whole))
            return
        self._read[name] = whole, answer, number
        arrival = wire.arrival(whole, answer)
        self._traffic.send(Request(arrival, whole.prompt, whole.output, (), name, True, whole.also), number, 1)

    def _join(self, number: int, answer: Answer) -> None:
        """The other tokens of a request whose prompt was read elsewhere are there."""
        whole, before, reader = self._read.pop(answer.request.name)
        self._done(number, before.then(whole, answer), reader)

    def _done(self, number: int, answer: Answer, reader: int = -1) -> None:
        """A request is answered by an engine, after another one that read its prompt if there was one."""
        self._outcome.add(answer)
        for one in (number, reader) if self._groups else ():
            if one in self._groups:
                self._groups[one].seen.add(answer)
        if self._each is not None:
            self._each(answer)
        if following := self._follow(answer.request, True):
            self._send(following, answer.last, number)

    def _refuse(self, request: Request, why: str) -> None:
        """A request is never answered, nor any turn after it sent."""
        self._outcome.reject(request, why)
        for later in request.followers():
            self._outcome.reject(later, "a request before it in its session was rejected")
        self._send(self._follow(request, False), request.arrival, -1)

    def _send(self, requests: Iterable[Request], now: int, sender: int) -> None:
        for one in requests:
            inside = self._enter(replace(one, arrival=now + one.arrival))
            if inside:
                self._traffic.send(inside, sender)
