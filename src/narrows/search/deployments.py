"""What a plan of serving is asked for, and the deployments it chooses from: machines there are, load, replicas and their cuts."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from narrows.costmodel import ATTENTION
from narrows.errors import NarrowsError
from narrows.graph import FP8, Graph
from narrows.machine import Machine
from narrows.measured.kernels import format_of, in_format
from narrows.simulate.fleet import Group, rules
from narrows.simulate.requests import Request
from narrows.simulate.speculation import Speculation
from narrows.simulate.step_times import PS
from narrows.simulate.tiers import PIECE
from narrows.step import Step

SAMPLES = 16  # prompts, evenly spaced by length, that stand for all
OWN = "own"  # the format that the model has


@dataclass(frozen=True, slots=True)
class Kind:
    """So many equal devices; a replica lies within a `node` of them."""

    machine: Machine
    count: int
    node: int = 8

    def __post_init__(self) -> None:
        if self.count < 1 or self.node < 1:
            raise NarrowsError(
                f"{self.count} devices, {self.node} in a node.", where=self.machine.name, remedy="Give at least 1."
            )


@dataclass(frozen=True)
class Job:
    """A load to serve on the devices there are: `share` of the requests must keep `ttft` and `tpot` (seconds).

    Requests of more than `context` tokens are rejected (0: none is). Replicas that decode are tried with each of
    `speculations` too: how many tokens are kept depends on the text, so whoever asks must know.
    """

    graph: Graph
    kinds: tuple[Kind, ...]
    requests: tuple[Request, ...]
    ttft: float = math.inf
    tpot: float = math.inf
    share: float = 0.9
    engine: str = "vllm-v1"
    context: int = 0
    speculations: tuple[Speculation, ...] = ()

    def __post_init__(self) -> None:
        for name in ("kinds", "requests"):
            if not getattr(self, name):
                raise NarrowsError("there are none.", where=name, remedy="Give at least one.")
        if rules(self.engine).batched:
            raise NarrowsError(
                f"{self.engine} does not batch as requests come.", where="engine", remedy="Give vllm-v1 or sglang."
            )
        if not (self.ttft > 0 and self.tpot > 0 and 0 < self.share < 1):
            raise NarrowsError("a limit is not above 0, or the share not below 1.", where="ttft, tpot, share",
                               remedy="Give seconds, and a share like 0.9.")  # fmt: skip

    @property
    def priced(self) -> bool:
        """Whether what every device costs is known: else devices are counted instead of dollars."""
        return all(kind.machine.price_per_hour for kind in self.kinds)

    @cached_property
    def rate(self) -> float:
        """Requests a second; infinite where they all come at once."""
        span = (self.requests[-1].arrival - self.requests[0].arrival) / PS
        return (len(self.requests) - 1) / span if span else math.inf

    @cached_property
    def prompts(self) -> tuple[int, ...]:
        """Tokens to read of typical prompts, shortest first, without what a cache of all prefixes holds."""
        seen: set[int] = set()
        left = []
        for request in self.requests:
            known = next((i for i, name in enumerate(request.hashes) if name not in seen), len(request.hashes))
            seen.update(request.hashes)
            left.append(max(request.prompt - PIECE * known, 1) if rules(self.engine).prefix_cache else request.prompt)
        left.sort()
        return tuple(left[min(int((i + 0.5) * len(left) / SAMPLES), len(left) - 1)] for i in range(SAMPLES))

    @property
    def typical(self) -> Step:
        """The step that reads a prompt of mean length."""
        return Step.prefill(1, max(sum(self.prompts) // SAMPLES, 1))

    @cached_property
    def output(self) -> float:
        """Mean tokens of an answer."""
        return sum(r.output for r in self.requests) / len(self.requests)

    @cached_property
    def held(self) -> int:
        """Tokens in the cache of a sequence that decodes, in the mean over its steps."""
        return round(sum((r.prompt + r.output / 2) * r.output for r in self.requests) / sum(r.output for r in self.requests))


@dataclass(frozen=True)
class Space:
    """What is tried; formats that the machine or the model has not are left out."""

    tensor: tuple[int, ...] = (1, 2, 4, 8)
    pipeline: tuple[int, ...] = (1, 2, 4)
    experts: tuple[int, ...] = (1, 2, 4, 8)
    precision: tuple[str, ...] = (OWN, "fp8", "int8", "int4")
    cache: tuple[str, ...] = (OWN, "fp8")
    max_sequences: tuple[int, ...] = (64, 128, 256, 512, 1024)
    max_tokens: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    apart: tuple[bool, ...] = (False, True)


EVERY = Space()


@dataclass(frozen=True, slots=True)
class Side:
    """Equal replicas: the devices of each, and the sequences and rows of a batch.

    Layers are cut over `tensor` devices and shared by `pipeline` stages, or the experts of a mixture by `experts` devices:
    so many batches are under way at a time.
    """

    machine: Machine
    tensor: int
    replicas: int
    max_sequences: int
    max_tokens: int
    pipeline: int = 1
    experts: int = 1

    @property
    def batches(self) -> int:
        """That are under way in a replica at a time."""
        return self.pipeline * self.experts

    @property
    def devices(self) -> int:
        return self.tensor * self.batches * self.replicas

    def __str__(self) -> str:
        ways = "".join(f"{name}={getattr(self, name)} " for name in ("pipeline", "experts") if getattr(self, name) > 1)
        size = f"{self.replicas} x {self.tensor * self.batches} {self.machine.name}"
        return f"{size} {ways}sequences={self.max_sequences} tokens={self.max_tokens}"


@dataclass(frozen=True, slots=True)
class Config:
    """A deployment: replicas that read and answer, or `prefill` ones that read the prompts of those that answer."""

    engine: str
    precision: str
    cache: str
    decode: Side
    prefill: Side | None = None
    speculation: Speculation | None = None

    @property
    def sides(self) -> tuple[Side, ...]:
        return (self.decode,) if self.prefill is None else (self.prefill, self.decode)

    @property
    def devices(self) -> int:
        return sum(side.devices for side in self.sides)

    @property
    def exact(self) -> bool:
        """Whether weights and cache are in the formats that the model has."""
        return self.precision == self.cache == OWN

    @property
    def dollars_per_hour(self) -> float | None:
        """What its devices cost; None where a machine's file does not say."""
        prices = [side.machine.price_per_hour for side in self.sides]
        return None if None in prices else sum(p * side.devices for p, side in zip(prices, self.sides, strict=True) if p)

    def groups(self, job: Job) -> tuple[Group, Group | None]:
        """The groups of a simulation: of those that answer, and of those that read."""
        answers = replace(self._group(job, self.decode), speculation=self.speculation)
        return answers, self._group(job, self.prefill) if self.prefill else None

    def _group(self, job: Job, side: Side) -> Group:
        own = rules(self.engine, max_sequences=side.max_sequences, max_tokens=side.max_tokens)
        graph = served(job.graph, self.precision, self.cache, side.machine)
        return Group(graph, side.machine, own, side.tensor, side.replicas, context=job.context, pipeline=side.pipeline,
                     experts=side.experts)  # fmt: skip

    def __str__(self) -> str:
        formats = f"weights={self.precision} cache={self.cache}" + (f" {self.speculation}" if self.speculation else "")
        return f"{self.decode} {formats}" + (f", prompts on {self.prefill}" if self.prefill else "")


def served(graph: Graph, precision: str, cache: str, machine: Machine) -> Graph:
    """A model with weights (for fp8 arithmetic too) and cache in other formats; raises NarrowsError where a machine lacks one."""
    if precision != OWN:
        form = format_of(precision, "precision")
        if form == FP8 and "fp8" not in machine.peak_flop_per_s:
            raise NarrowsError(f"{machine.name} does not compute in fp8.", where="precision", remedy="Use int8 weights.")
        graph = in_format(graph, form, "fp8" if form == FP8 else "")
    if cache != OWN:
        graph = graph.map(lambda op: op.but(cache=format_of(cache, "cache")) if op.kind in ATTENTION else op)
    return graph
