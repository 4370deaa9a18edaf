"""One slow device, or one slow link, in a synchronous training step: how much all others wait, in closed form and played out.

The stage that has it takes longer for each microbatch, so the pipeline fills and drains as before and runs at its pace in
between; its exchange of gradients and its optimizer step are as slow; and every other replica waits for that exchange.
"""

from dataclasses import dataclass, replace
from typing import Self

from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.layout import Layout
from narrows.machine import Cluster, Link
from narrows.simulate.network import network
from narrows.simulate.pipeline import Order, Work
from narrows.simulate.played import order, work
from narrows.simulate.schedule import Task, play
from narrows.simulate.timeline import Timeline
from narrows.simulate.training import step_seconds

KINDS = ("device", "link")
_AFTER = ("gradients", "optimizer", "offload", "host")  # of a stage, when its passes are done


@dataclass(frozen=True)
class Slow:
    """One device that computes, or whose links send, at `speed` of what the others do; on the stage that has most to do."""

    kind: str
    speed: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS or not 0 < self.speed <= 1:
            raise NarrowsError(f"{self.kind}={self.speed:g} is no straggler.", where="slow",
                               remedy="Write device=0.8 or link=0.5: a share above 0, and 1 at most.")  # fmt: skip

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `device=0.8` or `link=0.5`."""
        kind, _, speed = text.partition("=")
        try:
            share = float(speed)
        except ValueError as error:
            raise NarrowsError(f"{text!r} has no speed.", where="slow", remedy="Write device=0.8 or link=0.5.") from error
        return cls(kind.strip(), share)

    def everywhere(self, cluster: Cluster) -> Cluster:
        """The cluster if all of its devices, or links, were as slow."""
        if self.kind == "device":
            slow = cluster.machine.scaled(compute=self.speed, bandwidth=self.speed)
            return replace(cluster, machine=replace(slow, kernel_seconds=slow.kernel_seconds / self.speed))
        out = cluster.scale_out and self._link(cluster.scale_out)
        return replace(cluster, scale_up=self._link(cluster.scale_up), scale_out=out)

    def _link(self, link: Link) -> Link:
        return replace(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * self.speed)


def straggled(graph: Graph, cluster: Cluster, layout: Layout, sequence: int, slow: Slow, framework: str = "") -> dict[str, float]:
    """Seconds of a step by cause (see `training.ledger`) with one straggler; their sum is the step.

    All is as if every device were slow, except the other stages: they fill and drain the pipeline as fast as ever. While they
    drain it, the slow stage, the last, is done already and begins its exchange and update. Of its messages there shows, a
    microbatch, what is longer than half of the time by which it computes longer than the stage before.
    """
    usual, late = (step_seconds(graph, c, layout, sequence, framework) for c in (cluster, slow.everywhere(cluster)))
    rounds, messages = layout.accumulate, 2 * layout.chunks * (layout.accumulate + layout.pipeline - 1)
    slack = late["ends"] / (2 * rounds)
    more, less = (max(0.0, one["pipeline"] / messages - slack) for one in (late, usual))
    sent = usual["pipeline"] + rounds * (more - less)
    back = usual["backward"] + usual["recompute"]
    early = usual["bubble"] * back / (usual["forward"] + back)
    longer = sum(late[cause] - usual[cause] for cause in _AFTER)
    seen = max(0.0, 1 - early / longer) if longer else 0.0
    after = {cause: usual[cause] + (late[cause] - usual[cause]) * seen for cause in _AFTER}
    return {**late, "bubble": usual["bubble"], "pipeline": sent, **after}


def played(graph: Graph, cluster: Cluster, layout: Layout, sequence: int, slow: Slow, framework: str = "") -> Timeline:
    """The replica that has the straggler, and one of the others, pass by pass until the last optimizer step.

    Lanes are the stages of the first, then those of the second.
    """
    usual, late = (work(network(graph, c, layout, sequence, framework=framework), layout, framework)
                   for c in (cluster, slow.everywhere(cluster)))  # fmt: skip
    chosen, ranks = order(layout, usual), layout.pipeline
    place = chosen.placement
    each = [sum(usual.seconds[kind][stage] for kind in usual.seconds for stage in place if place[stage] == rank)
            for rank in range(ranks)]  # fmt: skip
    worst, tasks = each.index(max(each)), list[Task]()
    ends: list[list[int]] = [[] for _ in range(ranks)]  # the last pass of each stage in each replica
    for asked in (_with(usual, late, chosen, worst), usual)[: 1 + (layout.data > 1)]:
        first, last = len(tasks), dict[object, int]()
        for task in chosen.tasks(asked):
            last[task.resource] = len(tasks)
            needs = tuple((other + first, lag) for other, lag in task.needs)
            at = task.resource
            assert isinstance(at, int)
            tasks.append(task._replace(resource=at + ranks * bool(first), needs=needs))
        for rank in range(ranks):
            ends[rank].append(last[rank])
    after = [step_seconds(graph, c, layout, sequence, framework) for c in (cluster, slow.everywhere(cluster))]
    for rank, ended in enumerate(ends):
        ledger, exchange = after[rank == worst], len(tasks)
        tasks.append(Task(f"exchange {rank}", "exchange", None, ledger["gradients"], tuple((at, 0.0) for at in ended)))
        update = ledger["optimizer"] + ledger["offload"] + ledger["host"]
        tasks += [Task(f"update {rank}", "update", rank + ranks * i, update, ((exchange, 0.0),)) for i in range(len(ended))]
    return play(tasks)


def _with(usual: Work, late: Work, chosen: Order, rank: int) -> Work:
    """The usual work, but the late one in all stages of a rank, and in its messages."""
    place, ranks = chosen.placement, range(len(chosen.ranks))
    seconds = {kind: tuple(late.seconds[kind][s] if place[s] == rank else of for s, of in enumerate(row))
               for kind, row in usual.seconds.items()}  # fmt: skip
    sent = tuple(tuple((late if rank in (a, b) else usual).send_seconds(a, b) for b in ranks) for a in ranks)
    return replace(usual, seconds=seconds, message_seconds=sent)
