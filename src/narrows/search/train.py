"""The fastest layouts of a training step on a cluster: all are looked at, as arrays, except what a bound rules out.

Layouts fall into families that cut a layer alike (tensor, sequence, context, expert): a family costs one pass over the
graph. Within a family and a number of stages everything else is an array. Two bounds save work without losing the best: no
family is faster than its arithmetic and its tensor collectives at the datasheet's peaks, and no layout of some stages is
faster than its microbatches one after another on a stage without its ends.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from heapq import heappush, heappushpop
from typing import Any

import numpy as np

from narrows import energy
from narrows.backward import training
from narrows.cost import cost
from narrows.costmodel import generation, peak
from narrows.errors import NarrowsError, closest
from narrows.graph import Graph
from narrows.kinds import COLLECTIVES
from narrows.layout import CONTEXT, FRAMEWORKS, RECOMPUTE, Layout, divisors, nearest
from narrows.machine import Cluster
from narrows.measured.table import Forecast
from narrows.parallel import is_layer, tensor_parallel
from narrows.simulate.memory import Memory, memory, peak_bytes, stages
from narrows.simulate.training import Axes, Network, constants, ledger, network, wire
from narrows.step import Step
from narrows.units import format_bytes
from narrows.validate import interval

LEAST_TOKENS = 1024  # of a device in a context group: shorter shares are not tried
MOST_SEQUENCES = 32  # of a microbatch: larger ones are not tried


@dataclass(frozen=True)
class Job:
    """A training step to lay out: `batch` sequences of `sequence` tokens on so many devices of a cluster.

    capacity_bytes   what a device may hold (0: all of its memory);  framework   whose constants count (see FRAMEWORKS)
    """

    graph: Graph
    cluster: Cluster
    devices: int
    batch: int
    sequence: int
    capacity_bytes: float = 0.0
    framework: str = "megatron"

    def __post_init__(self) -> None:
        if self.framework not in FRAMEWORKS:
            problem = f"{self.framework!r} has no constants."
            raise NarrowsError(problem, where="framework", remedy=closest(self.framework, list(FRAMEWORKS)))
        for name in ("devices", "batch", "sequence"):
            if getattr(self, name) < 1:
                raise NarrowsError(f"it is {getattr(self, name)}.", where=name, remedy="Give a whole number above 0.")
        if any("source" in name for name in self.graph.fields):
            raise NarrowsError(f"{self.graph.name} has an encoder beside its decoder.", where="model", remedy="Give one stack.")
        each = self.cluster.devices_per_node
        if self.devices > each and self.devices % each:
            legal = range(each, self.devices + 2 * each, each)
            problem = f"{self.devices} devices are no whole nodes of {each}."
            raise NarrowsError(problem, where="devices", remedy=nearest("devices", self.devices, legal))
        nodes = -(-self.devices // each)
        if nodes > 1 and self.cluster.scale_out is None:
            problem = f"{nodes} nodes are needed, and the cluster has no link between nodes."
            raise NarrowsError(problem, where=f"{self.cluster.name}: scale_out", remedy="Give it a scale_out link.")
        object.__setattr__(self, "cluster", replace(self.cluster, nodes=max(nodes, 1)))
        object.__setattr__(self, "capacity_bytes", self.capacity_bytes or self.cluster.machine.memory.capacity_bytes)


@dataclass(frozen=True)
class Space:
    """What is tried besides every legal number of devices for each dimension.

    Sequence parallelism sends what tensor parallelism alone sends, and keeps less: without it is not tried by default.
    """

    sequence: tuple[bool, ...] = (True,)
    context_by: tuple[str, ...] = CONTEXT
    shard: tuple[int, ...] = (0, 1, 2, 3)
    recompute: tuple[str, ...] = RECOMPUTE
    schedule: tuple[str, ...] = ("1f1b",)
    offload: tuple[str, ...] = ("none",)


@dataclass(frozen=True)
class Choice:
    """A layout with its step: seconds with an 80 % interval, the ledger that adds up to it, memory, and what it costs.

    memory    of the rank that holds most;  joules, dollars   of a step, None where the machine's file does not say
    """

    layout: Layout
    seconds: float
    interval: tuple[float, float]
    ledger: dict[str, float]
    memory: Memory
    tokens_per_second: float
    mfu: float
    joules: float | None
    dollars: float | None


@dataclass(frozen=True)
class TrainPlan:
    """The best layouts of a job, how many were looked at in how many seconds, and why others were not chosen."""

    job: Job
    evaluated: int
    seconds: float
    best: tuple[Choice, ...]
    why_not: tuple[str, ...]
    pareto: tuple[Choice, ...] = ()


@dataclass
class _Found:
    """What a search keeps: the fastest layouts that fit, the leanest of those that do not, and counts."""

    keep: int
    fastest: list[tuple[float, float, str]] = field(default_factory=list)  # a heap, the slowest first
    leanest: tuple[float, str] = (np.inf, "")
    front: dict[int, list[tuple[float, float, str]]] = field(default_factory=dict)
    evaluated: int = 0
    large: int = 0
    bounded: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def limit(self) -> float:
        """Seconds that a layout must stay below to be kept."""
        return -self.fastest[0][0] if len(self.fastest) == self.keep else np.inf

    def put(self, seconds: float, held: float, layout: str) -> None:
        push = heappush if len(self.fastest) < self.keep else heappushpop
        push(self.fastest, (-seconds, -held, layout))


def plan_train(job: Job, space: Space = Space(), keep: int = 5, pareto: bool = False, prune: bool = True) -> TrainPlan:
    """The `keep` fastest layouts of a job that fit its memory, and with `pareto` all that nothing beats in every respect.

    Without `prune` nothing is bounded away: the result is the same. Raises NarrowsError where the batch cannot be split.
    """
    begun = time.perf_counter()
    found = _Found(keep)
    _search(job, space, found, prune and not pareto, pareto)
    if pareto:
        for fewer in divisors(job.devices)[:-1]:
            if fewer <= job.cluster.devices_per_node or fewer % job.cluster.devices_per_node == 0:
                _search(replace(job, devices=fewer), space, other := _Found(keep), False, True)
                found.evaluated += other.evaluated
                found.front |= other.front
    names = [name for _, _, name in sorted(found.fastest, key=lambda one: (-one[0], -one[1], one[2]))]
    best = tuple(price(job, Layout.parse(name)) for name in names)
    front = tuple(price(replace(job, devices=n), Layout.parse(name)) for n, name in _beaten_by_none(found.front))
    return TrainPlan(job, found.evaluated, time.perf_counter() - begun, best, _why_not(job, found), front)


def price(job: Job, layout: Layout) -> Choice:
    """One layout's step on a job's cluster; raises NarrowsError, with the nearest legal choice, where it does not fit the job."""
    layout.require(job.graph, devices=job.devices, batch=job.batch, sequence=job.sequence)
    net, axes = network(job.graph, job.cluster, layout, job.sequence, framework=job.framework), Axes.of(layout)
    spent = {cause: float(s) for cause, s in ledger(net, job.cluster, layout, axes, job.framework).items()}
    seconds = sum(spent.values())
    held = max((memory(net, layout, axes, stage, job.framework) for stage in stages(layout)), key=lambda one: float(one.total))
    flop, moved = _work(job)
    machine = job.cluster.machine
    use = flop / (seconds * job.devices * machine.peak(net.dtype.name))
    busy = moved / (seconds * job.devices * machine.memory.bandwidth_bytes_per_s)
    again = 1 + spent["recompute"] / (spent["forward"] + spent["backward"])
    draws = energy.power(machine)
    key = f"training-{job.framework if job.framework in ('deepspeed', 'fsdp') else 'cluster'}-{generation(machine.name)}"
    return Choice(
        layout,
        seconds,
        interval(Forecast("plan", np.nan, seconds, key, 0.0, machine.name)),
        spent,
        held,
        job.batch * job.sequence / seconds,
        use,
        job.devices * seconds * draws.watts(min(1.0, use * again), min(1.0, busy * again)) if draws else None,
        job.devices * seconds / 3600 * machine.price_per_hour if machine.price_per_hour else None,
    )


def _work(job: Job) -> tuple[float, float]:
    """FLOP and bytes of memory of the whole step, without anything redone."""
    step = Step.train(1, job.sequence)
    ops = [(op, cost(op, step)) for op in training(job.graph) if op.phase != "update"]
    flop = sum(float(work.flop) for op, work in ops if op.spec.matmul)
    return job.batch * flop, job.batch * sum(float(work.read_bytes + work.write_bytes) for _, work in ops)


def _search(job: Job, space: Space, found: _Found, prune: bool, pareto: bool) -> None:
    if not any(job.batch % data == 0 for data in divisors(job.devices)):
        raise NarrowsError(f"{job.batch} sequences cannot be split.", where="batch", remedy="Give another batch.")
    legal = list(_families(job, space, found.reasons))
    bounds = _least_seconds(job, legal)
    for least, _, family in sorted(zip(bounds, range(len(legal)), legal, strict=True)):
        if prune and least > found.limit:
            found.bounded += 1
            continue
        sizes = [size for size in divisors(job.batch) if size <= MOST_SEQUENCES]
        net = network(job.graph, job.cluster, family, job.sequence, sizes, job.framework)
        for layout in _staged(job, space, net, family):
            _price_all(job, space, net, layout, sizes, found, prune, pareto)


def _families(job: Job, space: Space, reasons: Counter[str]) -> Iterator[Layout]:
    """Every legal cut of a layer; what a graph forbids is counted with its reason."""
    contexts = [c for c in divisors(job.devices) if c == 1 or (job.sequence % (2 * c) == 0 and job.sequence // c >= LEAST_TOKENS)]
    rings = bool(job.graph.find("attention"))  # latents and states are gathered, whichever is asked for
    experts = {int(op["experts"]) for op in job.graph.find("expert") if op.split == "experts"}  # type: ignore[arg-type]
    together = [e for e in divisors(job.devices) if all(many % e == 0 for many in experts)] if experts else [1]
    for tensor in divisors(job.devices):
        for context in contexts:
            for by in space.context_by if context > 1 and rings else space.context_by[:1]:
                for expert in together:
                    for sequence in space.sequence if tensor > 1 else (False,):
                        inner = tensor * context * expert
                        if inner > job.devices or job.devices % inner:
                            continue
                        layout = Layout(tensor, sequence, context, by, data=expert, expert=expert)
                        try:
                            layout.require(job.graph, sequence=job.sequence)
                        except NarrowsError as refusal:
                            reasons[f"{refusal.where}: {refusal.problem}"] += 1
                            continue
                        yield layout


def _staged(job: Job, space: Space, net: Network, family: Layout) -> Iterator[Layout]:
    """The family with every legal number of stages and replicas, schedule and offload."""
    left = job.devices // (family.tensor * family.context)
    for pipeline in divisors(left):
        data = left // pipeline
        if data % family.expert or job.batch % data:
            continue
        balances = [b for b, units in (("none", net.layers), ("layers", net.layers + 2)) if units % pipeline == 0]
        for balance in balances if pipeline > 1 else ["none"]:
            for schedule in space.schedule if pipeline > 1 else ("1f1b",):
                for offload in space.offload:
                    yield replace(family, pipeline=pipeline, data=data, balance=balance, schedule=schedule, offload=offload)


def _price_all(
    job: Job, space: Space, net: Network, layout: Layout, sizes: list[int], found: _Found, prune: bool, pareto: bool
) -> None:
    """Price every size of microbatch, number of chunks, ZeRO stage and recomputation of a layout with its stages."""
    each = job.batch // layout.data
    legal = [i for i, size in enumerate(sizes) if each % size == 0]
    layer, sustained = net.layer, constants(job.framework)["sustained"]
    busy = (layer.forward + layer.backward + sum(layer.wire.values())) * sustained * net.layers / layout.pipeline
    if prune and float(min((busy[i] / sizes[i] for i in legal), default=np.inf)) * each > found.limit:
        found.bounded += 1
        return
    units = (net.layers + 2 * (layout.balance == "layers")) // layout.pipeline
    chunks = divisors(units) if layout.pipeline > 1 and layout.schedule == "1f1b" else [1]
    shards = [s for s in space.shard if s == 0 or layout.data * layout.context > 1]
    redos = [RECOMPUTE.index(r) for r in space.recompute]
    if np.allclose(layer.saved[1], layer.saved[0]):  # fused attention keeps nothing that is worth doing again
        redos = [redo for redo in redos if redo != RECOMPUTE.index("selective")]
    size, chunk, shard, redo = (a.ravel() for a in np.meshgrid(legal, chunks, shards, redos, indexing="ij"))
    many = each // np.array(sizes)[size]
    able = (chunk == 1) | (many % layout.pipeline == 0)
    axes = Axes(size[able], many[able], chunk[able], shard[able], redo[able])
    found.evaluated += int(able.sum())

    def named(at: int, one: Axes) -> str:
        return str(
            replace(
                layout,
                chunks=int(one.chunks[at]),
                shard=int(one.shard[at]),
                microbatch=sizes[one.size[at]],
                accumulate=int(one.accumulate[at]),
                recompute=RECOMPUTE[one.redo[at]],
            )
        )

    held = peak_bytes(net, layout, axes, job.framework)
    fits = held <= job.capacity_bytes
    found.large += int((~fits).sum())
    if not fits.all() and held[~fits].min() < found.leanest[0]:
        lean = int(np.where(fits, np.inf, held).argmin())
        found.leanest = (float(held[lean]), named(lean, axes))
    if not fits.any():
        return
    axes, held = axes.at(fits), held[fits]
    seconds = sum(ledger(net, job.cluster, layout, axes, job.framework).values())
    for at in np.argsort(seconds, kind="stable")[: found.keep]:
        if seconds[at] < found.limit:
            found.put(float(seconds[at]), float(held[at]), named(at, axes))
    if pareto:
        front = found.front.setdefault(job.devices, [])
        least = np.inf
        for at in np.lexsort((held, seconds)):
            if held[at] < least:
                least = held[at]
                front.append((float(seconds[at]), float(held[at]), named(at, axes)))


def _least_seconds(job: Job, families: list[Layout]) -> list[float]:
    """Seconds that no layout of a family is faster than: its layers' arithmetic, and its tensor collectives, at the peaks."""
    machine, step, c = job.cluster.machine, Step.train(1, job.sequence), constants(job.framework)
    ops = [op for op in training(job.graph) if op.spec.matmul and is_layer(op)]
    flop = sum(float(cost(op, step).flop) / peak(op, machine) for op in ops)
    sent = {(1, False): 0.0}
    for tensor, sequence in {(family.tensor, family.sequence) for family in families} - set(sent):
        link = (on := wire(job.cluster, 1, tensor, c["network"])).link or on.host_link
        cut = tensor_parallel(job.graph, tensor, sequence)
        moved = sum(float(cost(op, step).link_bytes) for op in cut if op.kind in COLLECTIVES and is_layer(op))
        sent[tensor, sequence] = 2 * moved * tensor / link.bandwidth_bytes_per_s if link else 0.0
    return [c["sustained"] * job.batch * (flop + sent[one.tensor, one.sequence]) / job.devices for one in families]


def _beaten_by_none(fronts: dict[int, list[tuple[float, float, str]]]) -> list[tuple[int, str]]:
    """Devices and layout of those that no other beats in time, memory and devices; energy and price follow these."""
    found: list[tuple[int, float, float, str]] = []
    for devices, front in sorted(fronts.items()):
        for seconds, held, name in sorted(front):
            if not any(n <= devices and s <= seconds and h <= held for n, s, h, _ in found):
                found.append((devices, seconds, held, name))
    return [(devices, name) for devices, _, _, name in found]


def _why_not(job: Job, found: _Found) -> tuple[str, ...]:
    lines = []
    if found.large:
        held, name = found.leanest
        lines.append(
            f"{found.large} layouts need more than {format_bytes(job.capacity_bytes)} a device; "
            f"the leanest of them {format_bytes(held)}: {name}"
        )
    if found.bounded:
        lines.append(f"{found.bounded} groups of layouts cannot be faster than those that were found, whatever their details")
    return (*lines, *(f"{reason} ({count} cuts)" for reason, count in found.reasons.most_common(8)))


def as_json(plan: TrainPlan) -> dict[str, Any]:
    """A plan as plain data: the stable contract of `narrows plan train --json` (SI units)."""

    def plain(choice: Choice) -> dict[str, Any]:
        return {
            "config": str(choice.layout),
            "devices": choice.layout.devices,
            "step_seconds": choice.seconds,
            "interval": list(choice.interval),
            "tokens_per_second": choice.tokens_per_second,
            "mfu": choice.mfu,
            "memory_bytes": float(choice.memory.total),
            "memory": {name: float(value) for name, value in choice.memory.parts().items()},
            "ledger": choice.ledger,
            "joules": choice.joules,
            "dollars": choice.dollars,
        }

    job = plan.job
    return {
        "model": job.graph.name,
        "cluster": job.cluster.name,
        "devices": job.devices,
        "global_batch": job.batch,
        "sequence": job.sequence,
        "capacity_bytes": job.capacity_bytes,
        "framework": job.framework,
        "evaluated": plan.evaluated,
        "seconds": plan.seconds,
        "best": [plain(choice) for choice in plan.best],
        "why_not": list(plan.why_not),
        "pareto": [plain(choice) for choice in plan.pareto],
    }
