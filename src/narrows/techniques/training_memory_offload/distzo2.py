"""Fine-tune without a backward pass on several devices, a model that lies on the host: the two losses on different devices.

Zeroth-order training needs two forward passes, at weights moved either way along a random direction, and of them one number: how
far to step. Devices in pairs take a pass each, pairs take parts of the batch, and all agree by adding up one number. Each block
comes from the host in slices, one over each device's link, and is gathered over the fast links between devices; the
slices go back once updated.

## When it helps
A model far larger than the devices' memory, where ZO2's one device waits for the host's link: slices use every one, and
the second pass costs no time.

## When it does not
Long batches whose passes take longer than a block's way in: devices then add compute alone. Zeroth-order steps are noisy:
it takes many more than backpropagation.

## Reference
Wang et al., DistZO2: High-Throughput and Memory-Efficient Zeroth-Order Fine-tuning LLMs with Distributed Parallel Computing,
2025, arXiv 2507.03211. The baseline is ZO2, arXiv 2503.12668; the step is that of MeZO, Malladi et al. 2023, arXiv 2305.17333.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.host import host
from narrows.machine import Cluster, Machine, cluster
from narrows.simulate.offload import WEIGHT_BYTES, Offloaded, alone, offloaded
from narrows.simulate.schedule import Need, Task, play
from narrows.simulate.timeline import Timeline
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

PASSES = 2  # forward, at weights moved either way
AHEAD = 2  # blocks that may be on their way in or out beside the one at hand


@dataclass(frozen=True)
class DistZO2(Measures):
    """A zeroth-order step of a model on the host: blocks in, one or both passes, blocks out, on each of several devices."""

    card: ClassVar[Card] = Card(
        "distzo2",
        relieves=(Limit.CAPACITY, Limit.BANDWIDTH),
        phases=("train",),
        exact=True,
        price="many more steps than with backpropagation; devices joined by fast links",
        claims=(
            Claim("speedup", "x", 3, "OPT-175B, two sequences of 2048 tokens, 4 H100 on one host over ZO2 on one; batch "
                  "and devices are not in the abstract", "abstract", "simulated", "a third either way", at_least=2, at_most=4),
            Claim("sliced", "x", None, "the same, over a whole block on each device's link", "abstract: slices parameter blocks",
                  "simulated", "a direction; four links bring four times as much", at_least=1.5, at_most=4),
            Claim("exchanged", "numbers", None, "six steps of a small language model, passes and batch split over 4 ranks; not "
                  "a number unless all ranks' weights are those of one device, bit by bit", "abstract: scalar-gradient", "run",
                  "one number a rank and step", at_least=1, at_most=1),
        ),
    )  # fmt: skip
    pairs: int = choice(2, 1, 4, help="parts of the batch")
    apart: bool = choice(True, help="the two passes run on two devices; False: one after the other on one")
    slices: bool = choice(True, help="each device brings a slice of a block; False: each the whole")
    host: str = choice("4x-h100", "dgx-2", help="what lies behind each device")

    def __post_init__(self) -> None:
        host(self.host)
        if self.pairs < 1:
            raise NarrowsError(f"pairs={self.pairs}.", where=self.card.slug, remedy="Give one or more.")

    def baseline(self) -> "DistZO2":
        return replace(self, pairs=1, apart=False, slices=False)

    @property
    def devices(self) -> int:
        """How many take part."""
        return self.pairs * (PASSES if self.apart else 1)

    def model(self, graph: Graph, group: Cluster, batch: int, sequence: int) -> Offloaded:
        """The model in blocks, `batch` sequences to each part of the batch."""
        return offloaded(graph, group, self.devices, batch, sequence, redo="none")

    def play(self, model: Offloaded) -> Timeline:
        """A step of one device: links, the wire between devices, and the device as resources."""
        behind, block = host(self.host), model.block
        whole = block.parameters * self.devices * WEIGHT_BYTES
        own, passes = whole / (self.devices if self.slices else 1), 1 if self.apart else PASSES
        tasks: list[Task] = []

        def add(name: str, i: int, on: str, seconds: float, *after: int) -> int:
            needs: tuple[Need, ...] = tuple((one, 0.0) for one in after if one >= 0)
            tasks.append(Task(f"{name} {i}", name, on, seconds, needs))
            return len(tasks) - 1

        out = [-1] * (block.count + 1 + AHEAD)  # a block's place is free when the one before it has left
        for i in range(block.count):
            came = add("in", i, "in", own / behind.link_bytes_per_s, out[i - 1 - AHEAD] if i > AHEAD else -1)
            if self.slices and self.devices > 1:
                came = add("gather", i, "wire", block.gather, came)
            done = add("passes", i, "device", passes * block.forward, came)
            out[i] = add("out", i, "out", own / behind.link_bytes_per_s, done)
        return play(tasks)

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Seconds of a step, tokens a second, and bytes of blocks on a device; how busy each resource is."""
        group = replace(cluster("dgx-h100"), machine=machine, scale_up=machine.link) if machine.link else alone(machine)
        chosen = self if machine.link else self.baseline()
        sequence = int(step["tokens"] / step["sequences"])
        batch = max(1, int(step["sequences"]) // chosen.pairs)
        model = chosen.model(graph, group, batch, sequence)
        timeline = chosen.play(model)
        rows = [{"resource": str(on), "busy": busy / timeline.seconds} for on, busy in timeline.busy_seconds.items()]
        held = (AHEAD + 1) * model.parameters / model.block.count * WEIGHT_BYTES
        tokens = chosen.pairs * batch * sequence
        values = {"seconds": timeline.seconds, "tokens_per_s": tokens / timeline.seconds, "held_bytes": held}
        return Reading(values, {"seconds": "s", "tokens_per_s": "/s", "held_bytes": "B"}, tuple(rows))
