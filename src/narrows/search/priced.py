"""A training step to lay out, and the price of one layout of it: seconds by cause, memory, energy, dollars."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from narrows import energy
from narrows.backward import training
from narrows.cost import cost
from narrows.costmodel import generation
from narrows.errors import NarrowsError, closest
from narrows.graph import Graph
from narrows.layout import FRAMEWORKS, Layout, divisors, nearest
from narrows.machine import Cluster
from narrows.measured.table import Forecast
from narrows.simulate.memory import Memory, memory, stages
from narrows.simulate.network import Axes, Network, network
from narrows.simulate.training import ledger
from narrows.site import Site
from narrows.step import Step
from narrows.validate import interval

LEAST_TOKENS = 1024  # of a device in a context group: shorter shares are not tried
MOST_SEQUENCES = 32  # of a microbatch: larger ones are not tried


@dataclass(frozen=True)
class Job:
    """A training step to lay out: `batch` sequences of `sequence` tokens on so many devices of a cluster.

    Of a site of several groups, which are used whole or left out, `devices` are the most there may be.

    capacity_bytes   what a device may hold (0: all of its memory);  framework   whose constants count (see FRAMEWORKS)
    """

    graph: Graph
    cluster: Cluster | Site
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
        groups = self.site.groups
        if len(groups) > 1:
            least = min(group.devices for group in groups)
            if self.devices < least:
                problem = f"{self.devices} devices are no group: {', '.join(f'{g.name} has {g.devices}' for g in groups)}."
                raise NarrowsError(problem, where="devices", remedy=f"The least is devices={least}.")
            return
        group, each = groups[0], groups[0].devices_per_node
        if self.devices > each and self.devices % each:
            legal = range(each, self.devices + 2 * each, each)
            problem = f"{self.devices} devices are no whole nodes of {each}."
            raise NarrowsError(problem, where="devices", remedy=nearest("devices", self.devices, legal))
        nodes = -(-self.devices // each)
        if nodes > 1 and group.scale_out is None:
            problem = f"{nodes} nodes are needed, and the cluster has no link between nodes."
            raise NarrowsError(problem, where=f"{group.name}: scale_out", remedy="Give it a scale_out link.")
        object.__setattr__(self, "cluster", replace(group, nodes=max(nodes, 1)))

    @property
    def site(self) -> Site:
        """The cluster, or the clusters."""
        return Site.of(self.cluster)

    @property
    def single(self) -> Cluster:
        """The cluster where there is one; NarrowsError where there are several groups."""
        first, *others = self.site.groups
        if others:
            problem = f"{self.site.name} has the groups {', '.join(group.name for group in self.site.groups)}."
            raise NarrowsError(problem, where="cluster", remedy="Give the cluster of one of them.")
        return first

    @property
    def sizes(self) -> list[int]:
        """Sequences of a microbatch that are tried."""
        return [size for size in divisors(self.batch) if size <= MOST_SEQUENCES]

    @property
    def contexts(self) -> list[int]:
        """Devices that share a sequence, as they are tried."""
        even = [c for c in divisors(self.devices) if self.sequence % (2 * c) == 0 and self.sequence // c >= LEAST_TOKENS]
        return [1, *(c for c in even if c > 1)]

    def network(self, layout: Layout) -> Network:
        """The job's graph on the devices of a layout."""
        sizes, contexts = self.sizes, self.contexts
        if layout.microbatch not in sizes or layout.context not in contexts:
            sizes, contexts = [layout.microbatch], [layout.context]
        return network(self.graph, self.cluster, layout, self.sequence, sizes, self.framework, contexts)

    @property
    def parts(self) -> list[tuple[Cluster, int]]:
        """The groups, and how many devices of each there are in use."""
        groups = self.site.groups
        return [(group, group.devices if len(groups) > 1 else self.devices) for group in groups]

    @property
    def price_per_hour(self) -> float:
        """Dollars that all devices cost; 0 where a machine's file does not say."""
        each = [many * (group.machine.price_per_hour or 0.0) for group, many in self.parts]
        return sum(each) if all(each) else 0.0

    def room(self, cluster: Cluster) -> float:
        """Bytes that a device of a group may hold."""
        return self.capacity_bytes or cluster.machine.memory.capacity_bytes

    def room_of(self, net: Network, stage: int) -> float:
        """Bytes that the devices of a stage may hold: those of the smallest."""
        return min(self.room(place.cluster) for place in net.places if stage in place.stages)

    def alone(self, groups: str) -> "Job":
        """The job on these groups and no others, in this order; one that is not of several groups as it is."""
        if len(self.site.groups) == 1 and not groups:
            return self
        chosen = self.site.only(groups)
        return replace(self, cluster=chosen.groups[0] if len(chosen.groups) == 1 else chosen, devices=chosen.devices)


@dataclass(frozen=True)
class Choice:
    """A layout with its step: seconds with an 80 % interval, the ledger that adds up to it, memory, and what it costs.

    memory    of the rank that is fullest, which has `room` bytes
    joules, dollars   of a step, None where a machine's file does not say
    """

    layout: Layout
    seconds: float
    interval: tuple[float, float]
    ledger: dict[str, float]
    memory: Memory
    room: float
    tokens_per_second: float
    mfu: float
    joules: float | None
    dollars: float | None


def price(job: Job, layout: Layout) -> Choice:
    """One layout's step on a job's cluster; raises NarrowsError, with the nearest legal choice, where it does not fit the job."""
    job = job.alone(layout.groups)
    layout.require(job.graph, devices=job.devices, batch=job.batch, sequence=job.sequence)
    net = job.network(layout)
    axes = replace(Axes.of(layout), size=net.sizes.index(layout.microbatch))
    spent = {cause: float(s) for cause, s in ledger(net, layout, axes, job.framework).items()}
    seconds = sum(spent.values())
    held = [(memory(net, layout, axes, stage, job.framework), job.room_of(net, stage)) for stage in stages(layout, net)]
    most, room = max(held, key=lambda one: float(one[0].total) / one[1])
    used, drawn = use(job, net, seconds)[0], joules(job, net, spent)
    kind = job.framework if job.framework in ("deepspeed", "fsdp") else "cluster"
    spans = [
        interval(Forecast("plan", np.nan, seconds, f"training-{kind}-{generation(one.machine.name)}", 0.0, one.machine.name))
        for one, _ in job.parts
    ]
    return Choice(
        layout,
        seconds,
        (min(low for low, _ in spans), max(high for _, high in spans)),
        spent,
        most,
        room,
        job.batch * job.sequence / seconds,
        used,
        None if drawn is None else float(drawn),
        seconds / 3600 * job.price_per_hour if job.price_per_hour else None,
    )


def use(job: Job, net: Network, seconds: Any) -> tuple[Any, Any]:
    """Shares of all devices' peak arithmetic and bandwidth that a step of so many seconds uses, without anything redone."""
    flop, moved = _work(job.graph, job.sequence)
    peak = sum(many * group.machine.peak(net.dtype.name) for group, many in job.parts)
    bandwidth = sum(many * group.machine.memory.bandwidth_bytes_per_s for group, many in job.parts)
    return job.batch * flop / seconds / peak, job.batch * moved / seconds / bandwidth


def joules(job: Job, net: Network, spent: dict[str, Any]) -> Any:
    """What a step draws on all devices, with what is redone: of seconds by cause, numbers or arrays; None where unknown."""
    seconds, draws = sum(spent.values()), [(energy.power(group.machine), many) for group, many in job.parts]
    again = 1 + spent["recompute"] / (spent["forward"] + spent["backward"])
    shares = [np.minimum(1.0, share * again) for share in use(job, net, seconds)]
    watts = [many * power.watts(*shares) for power, many in draws if power]
    return seconds * sum(watts) if len(watts) == len(draws) else None


@lru_cache(maxsize=16)
def _work(graph: Graph, sequence: int) -> tuple[float, float]:
    """FLOP and bytes of memory of a sequence's part in a step, without anything redone."""
    step = Step.train(1, sequence)
    ops = [(op, cost(op, step)) for op in training(graph) if op.phase != "update"]
    flop = sum(float(work.flop) for op, work in ops if op.spec.matmul)
    return flop, sum(float(work.read_bytes + work.write_bytes) for _, work in ops)
