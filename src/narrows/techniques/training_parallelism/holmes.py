"""Train over clusters whose network cards do not talk to each other: gradients stay inside a cluster, a pipeline joins them.

InfiniBand and RoCE reach only cards of their own kind; between kinds there is Ethernet. A framework that forms groups by rank
then falls back to Ethernet for all. Here nodes are sorted by their cards: the nodes that hold one stage, and sum its gradients,
share a kind; only the small messages from stage to stage go over Ethernet.

## When it helps
Two clusters, or a cluster bought in two years, each with fast links inside: gradients are many times a stage's messages.

## When it does not
One kind of card, or as many stages as do not fall on the clusters: some stage then spans both, and is as slow as Ethernet.

## Reference
Yang et al., Holmes: Towards Distributed Training Across Clusters with Heterogeneous NIC Environment, ICPP 2024, arXiv 2312.03549.
Devices are equal here, so its layers by the speed of a stage are all alike, and its overlap of the optimizer is left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.layout import Layout, divisors
from narrows.machine import Cluster, Machine, cluster
from narrows.simulate.placement import Links, Order, Stage, placed_seconds, played, stage_of
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

_SETTING = "GPT of 7.5B in 2 stages, 4 and 8 nodes of 8 A100, 192 sequences, half InfiniBand, half RoCE, the worse"
KINDS = ("infiniband", "roce")


@dataclass(frozen=True)
class Holmes(Measures):
    """Which node holds which stage when half of the nodes have other cards, and what a step takes."""

    card: ClassVar[Card] = Card(
        "holmes",
        relieves=(Limit.COMMUNICATION,),
        phases=("train",),
        exact=True,
        claims=(
            Claim("of_rdma", "x", None, _SETTING + ": speed over that of InfiniBand alone", "abstract: close to homogeneous",
                  "simulated", "within 15 %", at_least=0.85),
            Claim("over_ethernet", "x", None, _SETTING + ": over Ethernet alone", "abstract: significantly exceeding",
                  "simulated",
                  "a tenth at least", at_least=1.1),
            Claim("gap_to_exhaustive", "x", None, "6 nodes of two kinds in 20 random orders, 2 and 3 stages: step over the "
                  "least of all placements, the worst", "section 3", "simulated", "sorting meets enumeration", at_most=1.01),
        ),
    )  # fmt: skip
    wiring: str = choice("aws-p4d", "dgx-h100", help="the cluster whose nodes these are")
    nodes: int = choice(4, 8)
    stages: int = choice(0, 2, 4, help="0: whichever is fastest")
    sorted_by_card: bool = choice(True, help="False: nodes in the order of their ranks, and Ethernet, which all of them have")
    rdma_bytes_per_s: float = 25e9  # of a node: cards of 200 Gb/s, as in the paper
    ethernet_bytes_per_s: float = 3.125e9  # 25 Gb/s

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.stages < 0 or self.nodes % (self.stages or 1):
            raise NarrowsError(f"{self.nodes} nodes do not divide over {self.stages} stages.", where="holmes: stages",
                               remedy="Give a divisor of the nodes.")  # fmt: skip

    def baseline(self) -> "Holmes":
        return replace(self, sorted_by_card=False)

    def links(self, kinds: tuple[str, ...]) -> Links:
        """Bytes per second between every two nodes with these cards."""
        same = np.array(kinds)[:, None] == np.array(kinds)[None]
        fast = same if self.sorted_by_card else np.zeros_like(same)
        return np.where(fast, self.rdma_bytes_per_s, self.ethernet_bytes_per_s)

    def order(self, kinds: tuple[str, ...], stages: int) -> Order:
        """The node of each stage of each replica: stage after stage takes nodes, those of one kind first."""
        nodes = sorted(range(self.nodes), key=lambda n: kinds[n]) if self.sorted_by_card else list(range(self.nodes))
        rows = self.nodes // stages
        return tuple(tuple(nodes[stage * rows + row] for stage in range(stages)) for row in range(rows))

    def configurations(self, graph: Graph, group: Cluster, batch: int, sequence: int) -> Iterator[Stage]:
        """Every number of stages asked for, with tensor parallelism inside a node and with replicas there."""
        inside = group.devices_per_node
        for stages in [self.stages] if self.stages else divisors(self.nodes):
            for tensor in (inside, 1):
                data = self.nodes // stages * inside // tensor
                layout = Layout(tensor, data=data, pipeline=stages, accumulate=max(1, batch // data), shard=int(data > 1))
                try:
                    layout.require(graph, sequence=sequence)
                except NarrowsError:
                    continue
                yield stage_of(graph, replace(group, nodes=self.nodes), layout, sequence)

    def run(self, graph: Graph, group: Cluster, kinds: tuple[str, ...], batch: int, sequence: int) -> tuple[Stage, float]:
        """The fastest configuration, and its step played out; NarrowsError where the graph has no such stages."""
        links = self.links(kinds)
        known = [(one, self.order(kinds, one.layout.pipeline)) for one in self.configurations(graph, group, batch, sequence)]
        if not known:
            raise NarrowsError(f"no {self.stages} equal stages.", where=f"holmes: {graph.name}", remedy="Give another number.")
        chosen, order = min(known, key=lambda one: placed_seconds(one[0], one[1], links))
        return chosen, played(chosen, order, links)

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """A step of the step's sequences on nodes of which every second has the other kind of card; a row for each network.

        Raises NarrowsError where no link joins the machine's devices, or the layers do not divide over the stages.
        """
        if machine.link is None:
            raise NarrowsError("no link joins its devices.", where=machine.name, remedy="Give a machine with a link.")
        group = replace(cluster(self.wiring), machine=machine, scale_up=machine.link)
        mixed = tuple(KINDS[n % 2] for n in range(self.nodes))
        batch, sequence = int(step["sequences"]), int(step["tokens"] / step["sequences"])
        chosen, seconds = self.run(graph, group, mixed, batch, sequence)
        rows = [
            {"network": name, "seconds": one.run(graph, group, kinds, batch, sequence)[1]}
            for name, one, kinds in (("both kinds, sorted", replace(self, sorted_by_card=True), mixed),
                                     ("InfiniBand alone", replace(self, sorted_by_card=True), KINDS[:1] * self.nodes),
                                     ("Ethernet alone", self.baseline(), mixed))
        ]  # fmt: skip
        values = {"seconds": seconds, "message_bytes": chosen.message_bytes, "gradient_bytes": chosen.gradient_bytes,
                  "stages": float(chosen.layout.pipeline)}  # fmt: skip
        return Reading(values, {"seconds": "s", "message_bytes": "B", "gradient_bytes": "B"}, tuple(rows))
