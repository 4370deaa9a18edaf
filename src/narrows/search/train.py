"""The fastest layouts of a training step on a cluster: all are looked at, as arrays, except what a bound rules out.

Layouts fall into families that cut a layer alike (tensor, sequence, context, expert): a family costs one pass over the
graph. Within a family and a number of stages everything else is an array. Two bounds save work without losing the best: no
family is faster than its arithmetic and its tensor collectives at the datasheet's peaks, and no layout of some stages is
faster than its microbatches one after another on a stage without its ends.
"""

import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from heapq import heappush, heappushpop
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from narrows.backward import training
from narrows.cost import cost
from narrows.costmodel import peak
from narrows.errors import NarrowsError
from narrows.kinds import COLLECTIVES
from narrows.layout import CONTEXT, RECOMPUTE, Layout, divisors, nearest
from narrows.machine import Cluster
from narrows.parallel import is_layer, layer_count, tensor_parallel
from narrows.search.priced import Choice, Job, joules, price
from narrows.simulate.memory import memory, stages
from narrows.simulate.network import Axes, Network, constants, wire
from narrows.simulate.training import ledger
from narrows.step import Step
from narrows.units import format_bytes, format_seconds


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
class TrainPlan:
    """The best layouts of a job, how many were looked at in how many seconds, and why others were not chosen."""

    job: Job
    evaluated: int
    seconds: float
    best: tuple[Choice, ...]
    why_not: tuple[str, ...]
    pareto: tuple[Choice, ...] = ()


class Rival(NamedTuple):
    """What a layout of some devices is judged by on the Pareto front (energy is 0 where a machine's file does not say)."""

    seconds: float
    held: float
    joules: float
    layout: str


@dataclass
class _Found:
    """What a search keeps: the fastest layouts that fit, the leanest of those that do not, and counts."""

    keep: int
    fastest: list[tuple[float, float, str]] = field(default_factory=list)  # a heap, the slowest first
    leanest: tuple[float, str] = (np.inf, "")
    front: dict[tuple[int, float], list[Rival]] = field(default_factory=dict)  # by devices and their price
    evaluated: int = 0
    large: int = 0
    bounded: int = 0
    uneven: set[int] = field(default_factory=set)
    tried: dict[frozenset[str], float] = field(default_factory=dict)  # groups in any order: the fastest when they were tried
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def limit(self) -> float:
        """Seconds that a layout must stay below to be kept."""
        return -self.fastest[0][0] if len(self.fastest) == self.keep else np.inf

    @property
    def least(self) -> float:
        """Seconds of the fastest."""
        return -max(self.fastest)[0] if self.fastest else np.inf

    def put(self, seconds: float, held: float, layout: str) -> None:
        push = heappush if len(self.fastest) < self.keep else heappushpop
        push(self.fastest, (-seconds, -held, layout))


def plan_train(job: Job, space: Space = Space(), keep: int = 5, pareto: bool = False, prune: bool = True) -> TrainPlan:
    """The `keep` fastest layouts of a job that fit its memory, and with `pareto` all that nothing beats in every respect.

    Without `prune` nothing is bounded away: the result is the same. Raises NarrowsError where the batch cannot be split.
    """
    begun = time.perf_counter()
    found = _Found(keep)
    several = len(job.site.groups) > 1
    for groups in job.site.choices(job.devices) if several else [""]:
        _search(job.alone(groups), space, found, groups, prune and not pareto, pareto)
    for fewer in divisors(job.devices)[:-1] if pareto and not several else []:
        if fewer <= job.site.groups[0].devices_per_node or fewer % job.site.groups[0].devices_per_node == 0:
            _search(replace(job, devices=fewer), space, other := _Found(keep), "", False, True)
            found.evaluated += other.evaluated
            found.front |= other.front
    if not found.evaluated:
        legal = sorted({data * (job.batch // data + more) for data in found.uneven for more in (0, 1)} - {0})
        replicas = ", ".join(map(str, sorted(found.uneven)))
        raise NarrowsError(
            f"{job.batch} sequences cannot be split: layouts of {job.devices} devices have {replicas or 'no'} replicas.",
            where="batch", remedy=nearest("batch", job.batch, legal),
        )  # fmt: skip
    names = [name for _, _, name in sorted(found.fastest, key=lambda one: (-one[0], -one[1], one[2]))]
    best = tuple(price(job, Layout.parse(name)) for name in names)
    front = tuple(
        price(job if several else replace(job, devices=n), Layout.parse(name)) for n, name in _beaten_by_none(found.front)
    )
    return TrainPlan(job, found.evaluated, time.perf_counter() - begun, best, _why_not(job, found), front)


def _search(job: Job, space: Space, found: _Found, groups: str, prune: bool, pareto: bool) -> None:
    """Look at all layouts on all devices of a job, whose groups are named so in its site."""
    legal, these = list(_families(job, space, found.reasons)), frozenset(groups.split("+"))
    bounds = _least_seconds(job, legal)
    for least, _, family in sorted(zip(bounds, range(len(legal)), legal, strict=True)):
        if prune and least > found.limit:
            found.bounded += 1
            continue
        for layout in _staged(job, space, replace(family, groups=groups), found.uneven):
            if layout.pipeline > 1 or these not in found.tried:  # one stage lies on all groups, in any order
                _price_all(job, space, job.network(layout), layout, found, prune, pareto)
    found.tried[these] = found.least


def _families(job: Job, space: Space, reasons: Counter[str]) -> Iterator[Layout]:
    """Every legal cut of a layer; what a graph forbids is counted with its reason."""
    rings = bool(job.graph.find("attention"))  # latents and states are gathered, whichever is asked for
    experts = {int(op["experts"]) for op in job.graph.find("expert") if op.split == "experts"}  # type: ignore[arg-type]
    together = [e for e in divisors(job.devices) if all(many % e == 0 for many in experts)] if experts else [1]
    for tensor in divisors(job.devices):
        for context in job.contexts:
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


def _staged(job: Job, space: Space, family: Layout, uneven: set[int]) -> Iterator[Layout]:
    """The family with every legal number of stages and replicas, schedule and offload.

    `uneven` receives the numbers of replicas that the batch does not divide over.
    """
    left, deep = job.devices // (family.tensor * family.context), layer_count(job.graph) or 1
    several = len(job.site.groups) > 1  # whose stages may have any layers, as long as those of a group have equally many
    for pipeline in divisors(left):
        data = left // pipeline
        if data % family.expert:
            continue
        units = {"none": deep, "layers": deep + 2}
        balances = ["none"] if pipeline == 1 or several else [name for name, n in units.items() if n % pipeline == 0]
        if job.batch % data and not (several and pipeline == 1):
            uneven |= {data} if balances else set()
            continue
        for balance in balances:
            for schedule in space.schedule if pipeline > 1 else ("1f1b",):
                for offload in space.offload:
                    yield replace(family, pipeline=pipeline, data=data, balance=balance, schedule=schedule, offload=offload)


def _shared(total: int, counts: list[int], seconds: list[float], limit: float) -> NDArray[np.float64]:
    """Every way to share out a whole among kinds of takers, row by row: what each taker of a kind gets, at least 1.

    `counts` takers of each kind, that need so many `seconds` for each unit; none takes longer than the limit. One kind alone
    takes all of it, in equal parts that need not be whole.
    """
    *others, (last, each) = zip(counts, seconds, strict=True)
    if not others:
        return np.full((int(total / last * each <= limit), 1), total / last)
    rows, left, after = np.zeros((1, 0)), np.array([float(total)]), sum(counts)
    for many, one in others:
        after -= many
        few = np.arange(1, total // many + 1)
        row, chosen = np.nonzero((left[:, None] - few * many >= after) & (few * one <= limit))
        rows, left = np.column_stack([rows[row], few[chosen]]), left[row] - few[chosen] * many
    able = (left / last * each <= limit) & (left % last == 0)
    found: NDArray[np.float64] = np.column_stack([rows, left / last])[able]
    return found


def _ways(job: Job, net: Network, layout: Layout, limit: float) -> tuple[NDArray[np.int64], NDArray[np.float64], bool]:
    """Places in the sizes of a microbatch, each with a way to share out the work, that may stay below a limit.

    What is shared out are layers among runs of equal stages, or (True) among the groups that one stage lies on microbatches.
    """
    inner, sustained = layout.tensor * layout.context, constants(job.framework)["sustained"]
    runs: dict[tuple[int, ...], list[Any]] = {}  # the least seconds of a layer and a microbatch of each size, place by place
    for place in net.places:
        layer = place.layer
        shown = layer.forward + layer.backward + sum(layer.wire.values()) - layer.hidden.sum(0)
        runs.setdefault(place.stages, []).append(shown * sustained)
    whole = all(place.cluster.devices % (inner * layout.expert) == 0 for place in net.places)
    several = layout.pipeline == 1 and len(net.places) > 1 and whole
    at, rows = list[int](), list[NDArray[np.float64]]()
    for i, size in enumerate(net.sizes):
        if several:
            takes = [float(seconds[i]) * net.layers for seconds in runs[(0,)]]
            found = _shared(job.batch // size, [place.cluster.devices // inner for place in net.places], takes, limit)
        elif job.batch % (layout.data * size) == 0:
            takes = [float(max(seconds[i] for seconds in some)) * (job.batch // layout.data // size) for some in runs.values()]
            found = _shared(net.layers, [len(stages) for stages in runs], takes, limit)
        else:
            continue
        at += [i] * len(found)
        rows.append(found)
    return np.array(at, dtype=np.int64), np.concatenate(rows) if rows else np.zeros((0, len(runs))), several


def _axes(job: Job, space: Space, net: Network, layout: Layout, limit: float) -> Axes | None:
    """Every size of microbatch, number of chunks, ZeRO stage, recomputation, and way to share out layers or the batch.

    None where all of them take longer than the limit.
    """
    sizes, way, uneven = _ways(job, net, layout, limit)
    if not len(way):
        return None
    many = way.max(1) if uneven else job.batch // layout.data // np.array(net.sizes)[sizes]
    units = np.rint(way + 2 * (layout.balance == "layers") / layout.pipeline)
    chunks = np.arange(1, units.max() + 1) if layout.pipeline > 1 and layout.schedule == "1f1b" else np.ones(1)
    whole = (units[:, :, None] % chunks == 0).all(1)
    chunks, whole = chunks[whole.any(0)], whole[:, whole.any(0)]
    shards = [s for s in space.shard if s == 0 or layout.data * layout.context > 1]
    redos = [RECOMPUTE.index(r) for r in space.recompute]
    if np.allclose(net.layer.saved[1], net.layer.saved[0]):  # fused attention keeps nothing that is worth doing again
        redos = [redo for redo in redos if redo != RECOMPUTE.index("selective")]
    row, chunk, shard, redo = (
        a.ravel() for a in np.meshgrid(np.arange(len(way)), np.arange(len(chunks)), shards, redos, indexing="ij")
    )
    able = whole[row, chunk] & ((chunk == 0) | (many[row] % layout.pipeline == 0))
    if uneven:  # exchanges of every microbatch need all replicas
        able &= (shard <= 1) | (way.min(1) == way.max(1))[row]
    row, runs = row[able], list(dict.fromkeys(place.stages for place in net.places))
    layers = tuple(way[row, runs.index(place.stages)] for place in net.places) if len(runs) > 1 else ()
    rounds = tuple(way[row].T) if uneven else ()
    return Axes(sizes[row], many[row], chunks[chunk[able]], shard[able], redo[able], layers, rounds)


def _price_all(job: Job, space: Space, net: Network, layout: Layout, found: _Found, prune: bool, pareto: bool) -> None:
    """Price all that a layout with its stages leaves open."""
    limit = found.limit if prune else np.inf
    axes = _axes(job, space, net, layout, limit)
    if axes is None:
        found.bounded += limit < np.inf
        return
    found.evaluated += len(axes.size)

    def named(at: int, one: Axes) -> str:
        deep = {stage: int(few[at]) for place, few in zip(net.places, one.layers, strict=False) for stage in place.stages}
        rounds, inner = [int(many[at]) for many in one.rounds], layout.tensor * layout.context
        shares = [f"{place.cluster.devices // inner}x{many}" for place, many in zip(net.places, rounds, strict=False)]
        return str(
            replace(
                layout,
                chunks=int(one.chunks[at]),
                shard=int(one.shard[at]),
                microbatch=job.sizes[one.size[at]],
                accumulate=int(one.accumulate[at]),
                recompute=RECOMPUTE[one.redo[at]],
                layers="+".join(str(deep[stage]) for stage in sorted(deep)) if len(set(deep.values())) > 1 else "",
                shares="+".join(shares) if len(set(rounds)) > 1 else "",
            )
        )

    ranks = [(memory(net, layout, axes, stage, job.framework).total, job.room_of(net, stage)) for stage in stages(layout, net)]
    fits = np.logical_and.reduce([held <= room for held, room in ranks])
    held = np.maximum.reduce([held for held, _ in ranks])
    found.large += int((~fits).sum())
    if not fits.all() and held[~fits].min() < found.leanest[0]:
        lean = int(np.where(fits, np.inf, held).argmin())
        found.leanest = (float(held[lean]), named(lean, axes))
    if not fits.any():
        return
    axes, held = axes.at(fits), held[fits]
    spent = ledger(net, layout, axes, job.framework)
    seconds = sum(spent.values())
    for at in np.argsort(seconds, kind="stable")[: found.keep]:
        if seconds[at] < found.limit:
            found.put(float(seconds[at]), float(held[at]), named(at, axes))
    if pareto:
        drawn = joules(job, net, spent)
        points = np.column_stack([seconds, held, np.zeros_like(seconds) if drawn is None else drawn])
        front = found.front.setdefault((job.devices, job.price_per_hour), [])
        for at in unbeaten(points):
            own, kept, power = points[at].tolist()
            front.append(Rival(own, kept, power, named(at, axes)))


def unbeaten(points: NDArray[np.float64]) -> list[int]:
    """Rows (n, 3) that no other is at most as large as in every column, by the first column; of equal ones the first."""
    stairs: list[tuple[float, float]] = []  # of the second and third of those so far: the one rises, the other falls
    found = []
    for at in np.lexsort((points[:, 2], points[:, 1], points[:, 0])):
        second, third = points[at, 1], points[at, 2]
        i = bisect_right(stairs, (second, np.inf))
        if i and stairs[i - 1][1] <= third:
            continue
        end = i
        while end < len(stairs) and stairs[end][1] >= third:
            end += 1
        stairs[i:end] = [(second, third)]
        found.append(int(at))
    return found


def _least_seconds(job: Job, families: list[Layout]) -> list[float]:
    """Seconds that no layout of a family is faster than: its layers' arithmetic, and its tensor collectives, at the peaks."""
    step, c = Step.train(1, job.sequence), constants(job.framework)
    ops = [op for op in training(job.graph) if op.spec.matmul and is_layer(op)]
    work = [(op, float(cost(op, step).flop)) for op in ops]

    def rate(group: Cluster, tensor: int, sent: float) -> float:
        """Sequences a second that a device does at most."""
        link = (on := wire(group, 1, tensor, c["network"])).link or on.host_link
        flop = sum(flop / peak(op, group.machine) for op, flop in work)
        return 1 / (flop + (sent / link.bandwidth_bytes_per_s if link else 0.0))

    rates = {}
    for tensor, sequence in {(family.tensor, family.sequence) for family in families}:
        cut = tensor_parallel(job.graph, tensor, sequence)
        moved = sum(float(cost(op, step).link_bytes) for op in cut if op.kind in COLLECTIVES and is_layer(op))
        rates[tensor, sequence] = sum(many * rate(group, tensor, 2 * moved * tensor) for group, many in job.parts)
    return [c["sustained"] * job.batch / rates[one.tensor, one.sequence] for one in families]


def _beaten_by_none(fronts: dict[tuple[int, float], list[Rival]]) -> list[tuple[int, str]]:
    """Devices and layout of those that no other beats in time, memory, energy, devices and their price."""
    found: list[tuple[tuple[float, ...], str]] = []
    for (devices, dollars), front in sorted(fronts.items()):
        rivals = sorted(front)
        for at in unbeaten(np.array([rival[:3] for rival in rivals])):
            own = (devices, dollars, *rivals[at][:3])
            if not any(all(a <= b for a, b in zip(other, own, strict=True)) for other, _ in found):
                found.append((own, rivals[at].layout))
    return [(int(own[0]), name) for own, name in found]


def _why_not(job: Job, found: _Found) -> tuple[str, ...]:
    lines = []
    if found.large:
        held, name = found.leanest
        rooms = sorted({job.room(group) for group in job.site.groups})
        lines.append(
            f"{found.large} layouts need more than {' or '.join(map(format_bytes, rooms))} a device; "
            f"the leanest of them {format_bytes(held)}: {name}"
        )
    if found.bounded:
        lines.append(f"{found.bounded} groups of layouts cannot be faster than those that were found, whatever their details")
    without = [(groups, seconds) for groups, seconds in found.tried.items() if found.least < seconds < np.inf]
    lines += [
        f"on {' and '.join(sorted(groups))} alone a step takes {format_seconds(seconds)} at least" for groups, seconds in without
    ]
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
            "room_bytes": choice.room,
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
        "capacity_bytes": min(job.room(group) for group in job.site.groups),
        "framework": job.framework,
        "evaluated": plan.evaluated,
        "seconds": plan.seconds,
        "best": [plain(choice) for choice in plan.best],
        "why_not": list(plan.why_not),
        "pareto": [plain(choice) for choice in plan.pareto],
    }
