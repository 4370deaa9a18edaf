"""Shard weights over the two dies of a module, gradients over a node and optimizer states over all: each over the fastest links.

What is exchanged for every microbatch stays near: weights are gathered between two dies, gradients summed inside a node. Only
once a step do gradients and updated weights cross nodes, for the optimizer. ZeRO++ shards weights over all devices: forward
they cross nodes as int8, a second copy sharded over the node serves the backward pass, and gradients cross nodes as int4.

## When it helps
Links that get slower in three steps, and slow ones between nodes: a device waits for weights from other nodes under ZeRO-3,
and still under ZeRO++.

## When it does not
Few microbatches a step: what crosses nodes once does so in 16 bits, and ZeRO++ is faster (see `break_even`). Models whose
weights do not fit two devices. Large microbatches, behind whose arithmetic any exchange hides.

## Reference
Xu et al., Scaling Large Language Model Training on Frontier with Low-Bandwidth Partitioning, 2025, arXiv 2501.04266; ZeRO++:
Wang et al., 2023, arXiv 2306.10209. The speed between nodes is DeepSpeed's on another network, and rounding is free: against
ZeRO-3 our ZeRO++ gains more than the paper's (1.4x), and so three levels gain less on it unless microbatches are many.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from narrows.backward import training
from narrows.cost import Limit, cost
from narrows.costmodel import op_time
from narrows.errors import NarrowsError
from narrows.graph import DType, Graph, Op
from narrows.layout import Layout
from narrows.machine import Cluster, Link, Machine, cluster
from narrows.simulate.memory import memory
from narrows.simulate.network import Axes, constants, network, wire
from narrows.simulate.training import hidden_behind, ledger, owned
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice


class Exchange(NamedTuple):
    """A collective of all weights or gradients: over how many devices that lie `stride` apart, as how many bits, when."""

    name: str
    kind: str
    stride: int
    ranks: int
    bits: int
    per_step: bool = False


@dataclass(frozen=True)
class ThreeLevel(Measures):
    """A training step under three ways to shard, with the bytes a device holds and sends over each level of links."""

    card: ClassVar[Card] = Card(
        "frontier-3-level-zero-partitioning",
        relieves=(Limit.COMMUNICATION,),
        phases=("train",),
        exact=False,
        price="under ZeRO++ weights and gradients are rounded on the wire; with three levels gradients inside a node are",
        claims=(
            Claim("over_zeropp", "x", 1.71, "GPT of 20B, 384 dies, 16 microbatches of a sequence of 2,048: FLOP/s over ZeRO++'s",
                  "abstract", "simulated", "within 25 %; ZeRO++ here rounds for nothing, and the batch is ours", 1.28, 2.14),
            Claim("break_even", "microbatches", None, "the same: fewest a step that beat ZeRO++; infinite if none do",
                  "abstract", "simulated", "no more than large batches have", at_most=8),
            Claim("crossing", "of ZeRO-3's bytes", None, "16 emulated devices in two nodes: what crosses for a microbatch; not a "
                  "number unless weights and summed gradients are right", "section V", "checked", "nothing", at_most=0.0),
        ),
    )  # fmt: skip
    scheme: str = choice("levels", "zero++", "zero-3")
    wiring: str = choice("frontier-gcd", "dgx-h100", help="the cluster whose links join the devices")
    devices: int = choice(64, 8, 384)
    pair: int = choice(2, 4, help="devices that share the weights under `levels`")
    accumulate: int = choice(16, 1, 4, help="microbatches of a step")
    pair_bytes_per_s: float = 200e9  # between the dies of a module (OLCF, Frontier User Guide)

    def __post_init__(self) -> None:
        if self.scheme not in ("levels", "zero++", "zero-3") or self.devices % self.pair:
            raise NarrowsError(f"scheme={self.scheme}, {self.devices} devices in groups of {self.pair}.", where=self.card.slug,
                               remedy="Use levels, zero++ or zero-3, and a group that divides the devices.")  # fmt: skip

    def baseline(self) -> "ThreeLevel":
        return replace(self, scheme="zero++")

    def exchanges(self, node: int) -> tuple[Exchange, ...]:
        """What a device takes part in for a microbatch, or for a step."""
        n, node = self.devices, min(node, self.devices)
        if self.scheme == "zero-3":
            return (Exchange("weights forward", "all_gather", 1, n, 16), Exchange("weights backward", "all_gather", 1, n, 16),
                    Exchange("gradients", "reduce_scatter", 1, n, 16))  # fmt: skip
        if self.scheme == "zero++":
            return (Exchange("weights forward", "all_gather", 1, n, 8), Exchange("weights backward", "all_gather", 1, node, 16),
                    Exchange("gradients", "reduce_scatter", 1, n, 4))  # fmt: skip
        return (
            Exchange("weights forward", "all_gather", 1, self.pair, 16),
            Exchange("weights backward", "all_gather", 1, self.pair, 16),
            Exchange("gradients", "reduce_scatter", 1, node, 4),
            Exchange("gradients between nodes", "reduce_scatter", node, n // node, 16, per_step=True),
            Exchange("updated weights", "all_gather", node, n // node, 16, per_step=True),
        )

    def seconds(self, one: Exchange, parameters: float, group: Cluster) -> float:
        """Seconds of an exchange of `parameters`; over a stride each device exchanges its share of a node's."""
        if one.ranks == 1:
            return 0.0
        on = wire(group, one.stride, one.ranks, constants("deepspeed")["network"], members=group.devices_per_node)
        if one.stride * one.ranks <= self.pair and self.wiring == "frontier-gcd":
            on = replace(on, links=(Link("xgmi", self.pair_bytes_per_s, group.scale_up.latency_seconds), *on.links[1:]))
        elif one.stride * one.ranks > group.devices_per_node and one.stride > 1 and group.scale_out is not None:
            share = constants("deepspeed")["network"]  # every device of the node sends: each has its part of the cards
            wide = group.scale_out.bandwidth_bytes_per_s * share
            on = replace(on, links=(Link(group.scale_out.name, wide, group.scale_out.latency_seconds), *on.links[1:]))
        op = Op(one.name, one.kind, {"elements": parameters / one.stride, "ranks": one.ranks}, act=DType("wire", one.bits))
        return float(op_time(op, Step.train(1, 1), on).seconds)

    def run(self, graph: Graph, group: Cluster, batch: int, sequence: int, accumulate: int = 0) -> dict[str, float]:
        """Seconds of a step by cause, its TFLOP/s of a device without anything computed again, and bytes held."""
        accumulate = accumulate or self.accumulate
        group = replace(group, nodes=max(1, -(-self.devices // group.devices_per_node)))
        plain = Layout(data=self.devices, shard=3, microbatch=batch, accumulate=accumulate, recompute="full")
        net, axes = network(graph, group, plain, sequence, framework="deepspeed"), Axes.of(plain)
        spent = {cause: float(s) for cause, s in ledger(net, plain, axes, "deepspeed").items()}
        update = spent.pop("optimizer")
        busy = sum(spent.values()) - spent["gradients"]
        parameters = sum(owned(net, plain))
        each, once = 0.0, 0.0
        for one in self.exchanges(group.devices_per_node):
            seconds = self.seconds(one, parameters, group)
            each, once = (each, once + seconds) if one.per_step else (each + seconds, once)
        exposed = constants("deepspeed")["exposed"]
        shown = float(hidden_behind(each * accumulate, busy, exposed) + hidden_behind(once, busy / accumulate, exposed))
        total, one_step = busy + shown + update, Step.train(batch * accumulate, sequence)
        flop = sum(float(cost(op, one_step).flop) for op in training(graph) if op.spec.matmul and op.phase != "update")
        sharded = float(memory(net, plain, axes, 0, "deepspeed").total)
        return {"compute": busy, "exchanges": shown, "optimizer": update, "seconds": total,
                "tflop_per_s": flop / total / 1e12,
                "bytes": self.held(sharded, parameters, group.devices_per_node)}  # fmt: skip

    def held(self, sharded: float, parameters: float, node: int) -> float:
        """Bytes of a device, given those under ZeRO-3: with what this scheme holds in larger shares."""
        node = min(node, self.devices)
        more = {"zero-3": 0.0, "zero++": 2 / node, "levels": 2 / self.pair + 2 / node - 4 / self.devices}[self.scheme]
        return sharded + parameters * more

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """The step's sequences over devices and microbatches (one of each at least) under this scheme; a row for each scheme.

        Raises NarrowsError where no link joins the machine's devices.
        """
        group = cluster(self.wiring)
        if machine.name != group.machine.name:
            if machine.link is None:
                raise NarrowsError("no link joins its devices.", where=machine.name, remedy="Give a machine with a link.")
            group = replace(group, machine=machine, scale_up=machine.link)
        sequence, batch = (
            int(step["tokens"] / step["sequences"]),
            max(1, int(step["sequences"]) // self.devices // self.accumulate),
        )
        rows = [{"scheme": name, **replace(self, scheme=name).run(graph, group, batch, sequence)}
                for name in ("levels", "zero++", "zero-3")]  # fmt: skip
        values = self.run(graph, group, batch, sequence)
        units = dict.fromkeys(("compute", "exchanges", "optimizer", "seconds"), "s") | {
            "tflop_per_s": "TFLOP/s",
            "bytes": "B",
        }
        return Reading(values, units, tuple(rows))
