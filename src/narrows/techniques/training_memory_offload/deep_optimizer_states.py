"""Update a part of the optimizer's states on the device while the processor updates the rest: both, and both ways of the link.

States lie on the host. After the backward pass the device's memory is free of activations: subgroups of states are brought in,
updated there and sent back, in turn with subgroups that the processor updates where they lie. How many go to the device says
a small model of link, device and processor: so many that both sides end together.

## When it helps
States on the host, a processor that is much slower than the device, a fast link: the update is most of the iteration.

## When it does not
Large batches or long accumulation, behind which the update is little. A slow link leaves the states with the processor.

## Reference
Maurya et al., Deep Optimizer States: Towards Scalable Training of Transformer Models Using Interleaved Offloading, Middleware
2024, arXiv 2410.21316. The baseline is DeepSpeed's: the processor updates a subgroup, then its weights are copied.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from narrows.cost import Limit
from narrows.costmodel import op_time
from narrows.errors import NarrowsError
from narrows.graph import Graph, Op
from narrows.host import host
from narrows.machine import Cluster, Machine, cluster
from narrows.simulate.offload import STATE_BYTES, WEIGHT_BYTES, Offloaded, alone, offloaded
from narrows.simulate.schedule import Task, play
from narrows.simulate.timeline import Timeline
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

SHARES = (0.0, 0.2, 0.25, 1 / 3, 0.4, 0.5, 0.6, 2 / 3, 0.75, 0.8)
_NODE = "GPT of 20B on 4 H100, a sequence of 2,048 each"


@dataclass(frozen=True)
class DeepOptimizerStates(Measures):
    """Which share of the states a device updates, and what an iteration takes then."""

    card: ClassVar[Card] = Card(
        "deep-optimizer-states",
        relieves=(Limit.BANDWIDTH, Limit.COMMUNICATION),
        phases=("train",),
        exact=True,
        claims=(
            Claim("iteration_speedup", "x", 2.5, _NODE + ", against updates on the processor", "abstract", "simulated",
                  "its DeepSpeed waits for copies that ours makes in passing: within 36 %", 1.6, 3.4),
            Claim("over_static", "x", None, _NODE + ", against a fifth of the states that stay on the device", "abstract",
                  "simulated", "moving them there and back beats leaving them", at_least=1.3),
            Claim("balance", "fraction", None, _NODE + ": the less busy of processor and link, as a share of the update",
                  "abstract: perf. model", "simulated", "neither waits long for the other", at_least=0.8),
            Claim("updated_beside", "fraction", None, "a small language model, 6 steps, subgroups updated by two threads: share "
                  "of the second; NaN unless weights are Adam's, bit by bit", "section 4", "run", "a third", at_least=1 / 3),
        ),
    )  # fmt: skip
    devices: int = choice(4, 1, 8)
    host: str = choice("4x-h100", "dgx-2", help="what lies behind each device")
    subgroup: float = choice(1e8, 3e7, help="parameters of a subgroup")
    interleaved: bool = choice(True, help="False: the processor updates all, one subgroup after the other")

    def __post_init__(self) -> None:
        host(self.host)
        if self.devices < 1 or self.subgroup < 1:
            problem = f"devices={self.devices}, subgroup={self.subgroup}."
            raise NarrowsError(problem, where=self.card.slug, remedy="Give one or more of each.")

    def baseline(self) -> "DeepOptimizerStates":
        return replace(self, interleaved=False)

    def model(self, graph: Graph, group: Cluster, batch: int, sequence: int) -> Offloaded:
        """The model over the devices, which hold the weights."""
        nodes = -(-self.devices // group.devices_per_node)
        return offloaded(graph, replace(group, nodes=nodes), self.devices, batch, sequence)

    def iteration(self, model: Offloaded, machine: Machine, share: float, static: bool = False) -> Timeline:
        """Forward, backward with its gradients on their way, and the update, `share` of it on the device.

        static: that share never leaves the device's memory.
        """
        block, behind = model.block, host(self.host)
        mine = block.updated * block.count
        count = max(1, round(mine / self.subgroup))
        size = mine / count
        op = Op("update", "optimizer", {"elements": size, "states": 3}, act=model.dtype)
        kernel = float(op_time(op, Step.train(1, 1), machine).seconds)
        tasks = [Task("forward", "forward", "device", block.count * (block.forward + block.gather))]
        for i in range(block.count):
            tasks.append(Task(f"backward {i}", "backward", "device", block.backward + 2 * block.gather))
            gradients = block.updated * WEIGHT_BYTES / behind.link_bytes_per_s
            tasks.append(Task(f"gradients {i}", "gradients out", "out", gradients, ((len(tasks) - 1, 0.0),)))
        ready, last = ((len(tasks) - 1, 0.0),), len(tasks) - 1

        def add(kind: str, i: int, on: str, seconds: float, after: int) -> int:
            tasks.append(Task(f"{kind} {i}", kind, on, seconds, ((after, 0.0),) if after >= 0 else ready, float(i)))
            return len(tasks) - 1

        for i in range(count):
            if int((i + 1) * share + 1e-9) > int(i * share + 1e-9):  # spread evenly among the others
                came = -1 if static else add("states in", i, "in", size * STATE_BYTES / behind.link_bytes_per_s, -1)
                done = add("update", i, "device", kernel, came)
                if not static:
                    add("states out", i, "out", size * STATE_BYTES / behind.link_bytes_per_s, done)
                continue
            updated = add("update", i, "processor", size / behind.adam_per_s, -1 if self.interleaved else last)
            last = add("weights in", i, "in", size * WEIGHT_BYTES / behind.link_bytes_per_s, updated)
        return play(tasks)

    def best(self, model: Offloaded, machine: Machine) -> tuple[float, Timeline]:
        """The share that takes the least time, and its iteration."""
        shares = SHARES if self.interleaved else SHARES[:1]
        return min(((s, self.iteration(model, machine, s)) for s in shares), key=lambda one: one[1].seconds)

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """An iteration of the step's sequences over the devices, with and without; a row for each share that is tried."""
        group, chosen = alone(machine), replace(self, devices=1)
        if machine.link:
            group, chosen = replace(cluster("dgx-h100"), machine=machine, scale_up=machine.link), self
        batch, sequence = max(1, int(step["sequences"]) // chosen.devices), int(step["tokens"] / step["sequences"])
        model = chosen.model(graph, group, batch, sequence)
        share, timeline = chosen.best(model, machine)
        plain = chosen.baseline().best(model, machine)[1]
        values = {"seconds": timeline.seconds, "share": share, "seconds_on_processor": plain.seconds}
        rows: list[Mapping[str, Any]] = [
            {"share": s, "seconds": chosen.iteration(model, machine, s).seconds} for s in (SHARES if self.interleaved else (0.0,))
        ]
        return Reading(values, {"seconds": "s", "seconds_on_processor": "s"}, tuple(rows))
