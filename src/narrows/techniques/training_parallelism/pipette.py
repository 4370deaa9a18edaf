"""Choose pipeline, data parallelism, microbatch and the node of every stage by the links as measured, not as sold.

Links between nodes of one cluster differ, by half and more. Each configuration whose memory fits is timed along the pipeline's
critical path: messages between stages count wherever a round trip of the microbatches in flight takes longer than the stages'
own work. Then annealing swaps nodes so that slow links carry little, and the fastest of all is taken.

## When it helps
Clusters whose links differ, pipelines of several stages, messages that are not hidden.

## When it does not
Equal links: any order of nodes is as good, and `narrows plan train` looks at far more configurations. A cluster whose links
change from day to day must be measured again.

## Reference
Yim et al., Pipette: Automatic Fine-grained Large Language Model Training Configurator for Real-World Clusters, DATE 2024, arXiv
2405.18093. There memory is learnt from profiles; here it is narrows' own account. Stages move node by node: tensor parallelism
stays inside one.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.layout import Layout, divisors
from narrows.machine import Cluster, Machine, cluster
from narrows.simulate.placement import Links, Order, Stage, placed_seconds, played, stage_of
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

_NODES = "GPT of 10B on 5 clusters of 6 nodes (8 A100 40 GB, 100 Gb/s), links at 20 to 100 %"


class Pick(NamedTuple):
    """A configuration with its nodes, and the seconds of a step that were expected."""

    stage: Stage
    order: Order
    seconds: float


@dataclass(frozen=True)
class Pipette(Measures):
    """The configuration and the placement for a cluster with these links."""

    card: ClassVar[Card] = Card(
        "pipette",
        relieves=(Limit.COMMUNICATION, Limit.SCHEDULING),
        phases=("train",),
        exact=True,
        claims=(
            Claim("estimate_error", "fraction", None, _NODES + ": mean error of the critical path against the schedule played",
                  "section IV", "simulated", "within 5 %", at_most=0.05),
            Claim("gap_to_exhaustive", "x", None, "the same: played time of the pick over the best's of all that fit, "
                  "the worst; infinite if it does not fit", "abstract", "simulated", "within 5 %", at_most=1.05),
            Claim("over_nominal", "x", None, "the same, 12 nodes: played time of the fastest by nominal links, nodes in "
                  "order, over the pick's", "abstract: significant speedup", "simulated", "links differ by five", at_least=1.1),
        ),
    )  # fmt: skip
    wiring: str = choice("aws-p4d", "dgx-h100", help="the cluster whose links join the devices")
    nodes: int = choice(1, 4, 16)
    measured: bool = choice(True, help="links and memory as they are; False: as sold, and in the order of the nodes")
    moves: int = choice(1000, 300, help="moves of the annealing for each configuration")
    spread: float = choice(0.0, 0.5, 0.8, help="where no links are given: how far below its rate a link may be, drawn at random")
    links: str = ""  # a CSV file: bytes per second between every two nodes, a row a node
    seed: int = 0

    def baseline(self) -> "Pipette":
        return replace(self, measured=False)

    def bandwidths(self, group: Cluster) -> Links:
        """Bytes per second between nodes: of the file, or the cluster's, lowered at random; NarrowsError for a wrong file."""
        each = group.scale_out or group.scale_up
        nominal = each.bandwidth_bytes_per_s * group.devices_per_node
        if not self.links:
            draw = np.random.default_rng(self.seed).uniform(1 - self.spread, 1, (self.nodes, self.nodes))
            return np.asarray(nominal * (draw + draw.T) / 2)
        try:
            found = np.atleast_2d(np.genfromtxt(Path(self.links), delimiter=","))
        except (OSError, ValueError) as error:
            raise NarrowsError(f"not a table of links ({error}).", where=self.links, remedy="Write a row a node.") from None
        off = found[~np.eye(len(found), dtype=bool)] if found.shape == (self.nodes, self.nodes) else np.array([np.nan])
        if not np.all(np.isfinite(off) & (off > 0)):
            raise NarrowsError(f"it has shape {found.shape}, or links that are not above zero.", where=self.links,
                               remedy=f"Give {self.nodes} rows of as many bytes per second.")  # fmt: skip
        return np.asarray(found)

    def stages(self, graph: Graph, group: Cluster, batch: int, sequence: int) -> Iterator[Stage]:
        """Every configuration: tensor parallelism inside a node where the graph allows it, else replicas."""
        inside = group.devices_per_node
        for pipeline in divisors(self.nodes):
            for microbatch in (1, 2, 4):
                data = self.nodes // pipeline
                for tensor in (inside, 1):
                    replicas = data * inside // tensor
                    layout = Layout(tensor, data=replicas, pipeline=pipeline, microbatch=microbatch,
                                    accumulate=max(1, batch // replicas // microbatch), shard=int(replicas > 1))  # fmt: skip
                    try:
                        layout.require(graph, batch=batch, sequence=sequence)
                    except NarrowsError:
                        continue
                    yield stage_of(graph, group, layout, sequence)
                    break

    def anneal(self, stage: Stage, links: Links) -> Pick:
        """The best order found by swapping two nodes at a time, worse ones taken ever more rarely."""
        rows, p, draw = self.nodes // stage.layout.pipeline, stage.layout.pipeline, random.Random(self.seed)

        def shaped(flat: Sequence[int]) -> Order:
            return tuple(tuple(flat[r * p : (r + 1) * p]) for r in range(rows))

        here = list(range(self.nodes))
        now = placed_seconds(stage, shaped(here), links)
        best, heat = (now, list(here)), now / 20
        for move in range(self.moves if self.measured and self.nodes > 2 else 0):
            i, j = draw.sample(range(self.nodes), 2)
            here[i], here[j] = here[j], here[i]
            after = placed_seconds(stage, shaped(here), links)
            cold = heat * (1 - move / self.moves) + 1e-12
            if after <= now or draw.random() < math.exp((now - after) / cold):
                now = after
                best = min(best, (now, list(here)))
            else:
                here[i], here[j] = here[j], here[i]
        return Pick(stage, shaped(best[1]), best[0])

    def pick(self, graph: Graph, group: Cluster, links: Links, batch: int, sequence: int) -> Pick:
        """The fastest configuration with its placement; NarrowsError where none fits."""
        group = replace(group, nodes=self.nodes)
        found = list(self.stages(graph, group, batch, sequence))
        room = group.machine.memory.capacity_bytes if self.measured else math.inf
        fits = [stage for stage in found if stage.held_bytes <= room]
        if not fits:
            raise NarrowsError(f"none of {len(found)} configurations fits {self.nodes} nodes.", where=graph.name,
                               remedy="Give more nodes, or a batch that divides.")  # fmt: skip
        known = links if self.measured else np.full_like(links, links.max())
        return min((self.anneal(stage, known) for stage in fits), key=lambda one: one.seconds)

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """The pick for the step's sequences as the global batch, its step played out, and that by nominal links; a row a stage.

        Raises NarrowsError where no link joins the machine's devices, or nothing fits.
        """
        if machine.link is None:
            raise NarrowsError("no link joins its devices.", where=machine.name, remedy="Give a machine with a link.")
        group = replace(cluster(self.wiring), machine=machine, scale_up=machine.link)
        links, sequence = self.bandwidths(group), int(step["tokens"] / step["sequences"])
        ours, other = (one.pick(graph, group, links, int(step["sequences"]), sequence) for one in (self, self.baseline()))
        one = ours.stage.layout
        values = {"seconds": played(ours.stage, ours.order, links), "estimated_seconds": ours.seconds,
                  "seconds_by_nominal_links": played(other.stage, other.order, links), "bytes": ours.stage.held_bytes,
                  "tensor": float(one.tensor), "pipeline": float(one.pipeline), "microbatch": float(one.microbatch)}  # fmt: skip
        units = {"seconds": "s", "estimated_seconds": "s", "seconds_by_nominal_links": "s", "bytes": "B"}
        rows = [{"stage": s, "nodes": " ".join(str(row[s]) for row in ours.order)} for s in range(one.pipeline)]
        return Reading(values, units, tuple(rows))
