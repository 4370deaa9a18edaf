"""Keep all states of a model on the hosts and disks of its devices, each bringing in its share over its own link.

Weights, gradients and optimizer states are cut over all devices (ZeRO-3), and each share lies behind the device that owns
it: bringing a layer in uses every link at once, and the devices exchange the shares among themselves. Layers are brought in
ahead of their turn, activations go to the host, and a layer too large for a device is worked on in tiles.

## When it helps
Models far larger than the devices' memory, on few nodes, without cutting layers or pipelines by hand.

## When it does not
Small batches: the states' way to the disks and back takes the same time for any batch, and waits for the backward pass.
Where the devices' memory holds the states, or tensor and pipeline parallelism are at hand, these are faster.

## Reference
Rajbhandari et al., ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme Scale Deep Learning, SC 2021, arXiv 2104.07857.
FLOP are the model's, without those computed again; the exchange between nodes is as slow as DeepSpeed's was on other runs.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.host import host
from narrows.machine import Cluster, Machine, cluster
from narrows.simulate.offload import Offloaded, Policy, alone, offloaded, play_offloaded
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice


@dataclass(frozen=True)
class ZeroInfinity(Measures):
    """How fast a model trains whose states lie behind its devices, and whether every place holds what is put there."""

    card: ClassVar[Card] = Card(
        "zero-infinity",
        relieves=(Limit.CAPACITY, Limit.STORAGE),
        phases=("train",),
        exact=True,
        claims=(
            Claim("largest_on_dgx2", "1e12 parameters", 1.0, "16 V100 with 1.5 TB and 28 TB behind them, layers 25,600 wide, a "
                  "sequence of 1,024 a device", "abstract", "simulated", "a trillion; 28 TB hold no more than 1.6", 1.0, 1.6),
            Claim("petaflop_512", "PFLOP/s", 25, "GPT of 1T, 512 V100, 5 sequences of 1,024 a device; not a number if it "
                  "does not fit", "abstract", "simulated", "within 25 %: which FLOP the paper counts is not said", 18.75, 31.25),
            Claim("superlinear", "x", None, "the same model on 64: FLOP/s of a device on 512 over that", "abstract", "simulated",
                  "more disks for the same states: above linear", at_least=1.05),
            Claim("tile", "fraction", None, "two linear layers with 16 tiles: the largest weight over the whole; NaN unless "
                  "results and gradients agree to 1e-6", "section 5.1.3", "run", "a sixteenth", at_most=1 / 16),
            Claim("states_on_disk", "fraction", None, "a small language model, 6 steps of Adam with states in files; NaN "
                  "unless every weight is that of Adam, bit by bit", "section 5.1.1", "run", "all states", at_least=1.0),
        ),
    )  # fmt: skip
    devices: int = choice(8, 16, 512)
    host: str = choice("dgx-2", "12-ssd", help="what lies behind each device")
    tiles: int = choice(16, 1, 4, help="pieces of a layer's weights")
    outside: bool = choice(True, help="False keeps everything in the devices' memory, cut over them (ZeRO-3)")

    def __post_init__(self) -> None:
        host(self.host)
        if min(self.devices, self.tiles) < 1:
            problem = f"devices={self.devices}, tiles={self.tiles}."
            raise NarrowsError(problem, where=self.card.slug, remedy="Give one or more of each.")

    def baseline(self) -> "ZeroInfinity":
        return replace(self, outside=False, tiles=1)

    @property
    def policy(self) -> Policy:
        """What lies where; the update comes after the backward pass."""
        if not self.outside:
            return Policy("device", "device", "device")
        return Policy("disk", "disk", "host", early=False, gradients="disk", tiles=self.tiles)

    def model(self, graph: Graph, group: Cluster, batch: int, sequence: int) -> Offloaded:
        """The model on as many devices, `batch` sequences each."""
        nodes = -(-self.devices // group.devices_per_node)
        return offloaded(graph, replace(group, nodes=nodes), self.devices, batch, sequence)

    def fits(self, model: Offloaded, group: Cluster) -> bool:
        """Whether devices, hosts and disks hold it."""
        return model.fits(group.machine, host(self.host), self.policy, -(-self.devices // group.devices_per_node))

    def tflop_per_s(self, graph: Graph, group: Cluster, batch: int, sequence: int) -> float:
        """TFLOP/s of a device; not a number where the model does not fit."""
        model = self.model(graph, group, batch, sequence)
        return model.tflop_per_s(host(self.host), self.policy) if self.fits(model, group) else math.nan

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """A step of the step's sequences, spread over the devices, and bytes of each place (`fits`: 1 if each holds them).

        A row for each resource: how much of the step it is busy.
        """
        group = cluster("dgx-v100") if machine.link else alone(machine)
        if machine.link:
            group = replace(group, machine=machine, scale_up=machine.link, devices_per_node=16)
        sequence = int(step["tokens"] / step["sequences"])
        chosen = self if machine.link else replace(self, devices=1)
        model = chosen.model(graph, group, max(1, int(step["sequences"]) // chosen.devices), sequence)
        timeline = play_offloaded(model.block, host(self.host), self.policy)
        held = model.held(self.policy)
        values = {"tflop_per_s": model.flop / model.devices / timeline.seconds / 1e12, "seconds": timeline.seconds}
        values |= {f"{place}_bytes": size for place, size in held.items()} | {"fits": float(chosen.fits(model, group))}
        units = {"tflop_per_s": "TFLOP/s", "seconds": "s"} | {f"{place}_bytes": "B" for place in held}
        rows = [{"resource": name, "busy": busy / timeline.seconds} for name, busy in timeline.busy_seconds.items()]
        return Reading(values, units, tuple(rows))
