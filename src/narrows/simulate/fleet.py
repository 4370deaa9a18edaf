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
from narrows.simulate.closed_loop import constants
from narrows.simulate.outcome import Outcome
from narrows.simulate.serving import Answer, Engine, Request, Rules
from narrows.simulate.step_times import PS, Overlap, StepTimes
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

    def times(self) -> StepTimes:
        """The times of its steps, with what the engine adds."""
        return _times(replace(self, replicas=1, blocks=0, utilization=1.0, wire=None, streams=False))

    def room(self) -> int:
        """Blocks of keys and values that a replica holds.

        What an engine finds when it starts: its share of the memory, less weights, the peak of a step's activations,
        the sampler's logits and what driver and captured graphs take. Raises NarrowsError where nothing is left.
        """
        if self.blocks:
            return self.blocks
        step = Step.prefill(1, min(self.rules.max_tokens, 32768))
        own = prepared(self.graph, step, self.machine, self.devices)
        logits = max((float(op["outputs"]) for op in own if op.split == "vocabulary" and op.kind == "linear"), default=0.0)  # type: ignore[arg-type]
        used = float(own.weight_bytes) + float(footprint(own, step).activation_bytes)
        used += SAMPLER * 4 * min(self.rules.max_sequences, 1024) * logits + CONTEXT_BYTES
        left = self.machine.memory.capacity_bytes * VISIBLE * self.utilization - used
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
        own = prepared(self.graph, Step.decode(1, 4096), self.machine, self.devices)
        one, two = (float(footprint(own, Step.decode(1, n)).kv_bytes) for n in (4095, 8191))
        return (two - one) / 4096 or one / 4096


@lru_cache(maxsize=64)
def _times(group: Group) -> StepTimes:
    engine = _presets().get(group.rules.name, {}).get("times", "vllm")
    c = constants(engine)
    return StepTimes(group.graph, group.machine, group.devices, group.rules.max_tokens, group.rules.max_sequences,
                     c["decode"] * group.scale, c["step_ms"] * 1e-3, c["sequence_us"] * 1e-6, group.overlap)  # fmt: skip


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
    if prefill is None:
        replicas = _started(group, done, outcome)
        for request in requests:
            for engine in replicas:
                engine.advance(request.arrival)
            replicas[route(request, replicas)].push(request)
        for engine in replicas:
            engine.advance()
        outcome.close(replicas)
        return outcome
    return _apart(requests, prefill, group, route, done, outcome)


def _within(requests: Iterable[Request], context: int, outcome: Outcome) -> Iterator[Request]:
    for request in requests:
        if request.prompt + request.output > context:
            outcome.reject(request, f"the model reads and writes {context} tokens at most")
        else:
            yield request


def clients(requests: Iterable[Request], group: Group, count: int) -> Outcome:
    """What so many clients see who each send their next request to one replica when the last is answered.

    Arrivals of the requests do not count.
    """
    outcome, queue = Outcome(), iter(requests)

    def send(now: int) -> None:
        following = next(queue, None)
        if following is not None:
            engine.push(replace(following, arrival=now))

    def done(answer: Answer) -> None:
        outcome.add(answer)
        send(answer.last)

    def reject(request: Request, why: str) -> None:
        outcome.reject(request, why)
        send(request.arrival)

    engine = Engine(group.times(), group.rules, group.room(), done, reject, outcome.pace)
    for _ in range(count):
        send(0)
    engine.advance()
    outcome.close([engine])
    return outcome


def _started(group: Group, emit: Callable[[Answer], None], outcome: Outcome) -> list[Engine]:
    times, blocks = group.times(), group.room()
    return [Engine(times, group.rules, blocks, emit, outcome.reject, outcome.pace) for _ in range(group.replicas)]


def _apart(requests: Iterable[Request], prefill: Group, decode: Group, route: Route, done: Callable[[Answer], None],
           outcome: Outcome) -> Outcome:  # fmt: skip
    """Prompts are read by one group; then their keys and values travel to another, which decodes."""
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
    outcome.close([*readers, *writers])
    return outcome
