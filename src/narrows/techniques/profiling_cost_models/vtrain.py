"""Predict the time and price of a training step on thousands of devices from the times of its distinct operators.

A large decoder is one layer many times over, and a plan (tensor, data, pipeline, microbatch) gives every replica and
every device of a tensor group the same work. So each distinct operator is timed once, on one device; a step is written
out as tasks (a pass of a microbatch through a stage, the exchange of a layer's gradients, an update), which wait for
each other as the pipeline's order says; and playing them gives the step. Plans are then compared by their price.

## When it helps
Choosing how many devices and which plan before anyone pays for them. With operator times of your own (`Profile`, from a
CSV or JSON file) it needs no model of the device; without, narrows' cost model stands in.

## When it does not
Stragglers, failures, and operators that slow each other down on one device. A pass takes the sum of its operators: what
a host adds that launches them too slowly has to be in their times.

## Reference
Bang et al., vTrain: A Simulation Framework for Evaluating Cost-effective and Compute-optimal Large Language Model
Training, MICRO 2024, arXiv 2312.12391. Messages between stages hold up their rank, as Megatron-LM's do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

from narrows.backward import training
from narrows.cost import Limit, total
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.kinds import COLLECTIVES
from narrows.layout import RECOMPUTE, Layout, divisors
from narrows.machine import Cluster, Machine, cluster
from narrows.parallel import layer_count
from narrows.simulate.memory import peak_bytes
from narrows.simulate.network import Axes, network
from narrows.simulate.operators import Key, Profile, play_step, stages
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

_ROWS = "25 published Megatron-LM runs, 8 to 3,072 A100"


@dataclass(frozen=True)
class VTrain(Measures):
    """Plays training plans and finds the cheapest one."""

    card: ClassVar[Card] = Card(
        "vtrain",
        relieves=(Limit.SCHEDULING, Limit.COMMUNICATION),
        phases=("train",),
        exact=True,
        claims=(
            Claim("iteration_error", "fraction", 0.1473, _ROWS, "validation on several nodes (512 A100 there)", "simulated",
                  "mean absolute error of the step: within 15 %", at_most=0.15),
            Claim("plan_rank_correlation", "Spearman", None, _ROWS + ": throughput of a device as a share of peak", "abstract",
                  "simulated", "a plan that is faster must be predicted faster: at least 0.9", at_least=0.9),
            Claim("saving", "fraction", 0.05, "GPT-530B, batch 1,920, against tensor 8, pipeline 35, data 8: the cheapest plan "
                  "that takes at most a tenth longer", "cost of MT-NLG", "simulated", "the paper saves a twentieth: half of that",
                  at_least=0.025),
        ),
    )  # fmt: skip
    wiring: str = choice("selene", "aws-p4d", help="the cluster whose links join the devices")
    devices: int = choice(8, 64, 512, help="most devices that a plan may use")
    slower: float = choice(0.1, 0.0, 0.3, help="how much longer than the usual plan the cheapest may take")
    replay: bool = choice(True, help="play tasks that wait for each other; False counts operations at half of the peak")

    def baseline(self) -> "VTrain":
        return replace(self, replay=False)

    def seconds(self, graph: Graph, group: Cluster, layout: Layout, sequence: int, profile: Profile | None = None) -> float:
        """Seconds of one step."""
        if self.replay:
            return play_step(graph, group, layout, stages(graph, group, layout, sequence, profile)).seconds
        work = total(training(graph), Step.train(layout.batch, sequence))
        return float(work.flop) / layout.devices / (group.machine.peak(graph.ops[0].act.name) / 2)

    def operators(self, graph: Graph, group: Cluster, layout: Layout, sequence: int) -> list[Key]:
        """What a profile for a plan has to hold: the distinct operators besides collectives."""
        distinct = stages(graph, group, layout, sequence).distinct
        return sorted(name for name in distinct if name[0].split()[0] not in COLLECTIVES)

    def plans(
        self, graph: Graph, group: Cluster, batch: int, sequence: int, recompute: Sequence[str] = RECOMPUTE
    ) -> list[Layout]:
        """Legal plans that fit the memory, each with the first kind of recomputation that makes it fit."""
        sizes = (divisors(group.devices_per_node), divisors(max(layer_count(graph), 1)), divisors(batch), (1, 2, 4))
        found = []
        for tensor, pipeline, data, micro in product(*sizes):
            if tensor * pipeline * data > self.devices or batch % (data * micro):
                continue
            for redo in recompute:
                layout = Layout(tensor, tensor > 1, data=data, pipeline=pipeline, microbatch=micro, recompute=redo,
                                accumulate=batch // data // micro)  # fmt: skip
                if _fits(graph, group, layout, sequence):
                    found.append(layout)
                    break
        return found

    def cheapest(
        self, graph: Graph, group: Cluster, plans: Sequence[Layout], usual: Layout, sequence: int
    ) -> dict[Layout, float]:
        """Seconds of the plans worth playing, the usual one and last the cheapest: at most `slower` slower than the usual.

        A step is no faster than its slowest stage's microbatches one after another: what is too slow or too dear even then
        is not played.
        """
        found = {usual: self.seconds(graph, group, usual, sequence)}
        limit, best = (1 + self.slower) * found[usual], usual
        for plan in plans:
            parts = stages(graph, group, plan, sequence)
            least = plan.accumulate * max(f + b for f, b in zip(parts.forward, parts.backward, strict=True))
            if plan == usual or least > limit or least * plan.devices >= found[best] * best.devices:
                continue
            found[plan] = self.seconds(graph, group, plan, sequence)
            if found[plan] <= limit and found[plan] * plan.devices < found[best] * best.devices:
                best = plan
        return {**{plan: seconds for plan, seconds in found.items() if plan != best}, best: found[best]}

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """The cheapest plan that is hardly slower than the usual one, for the step's sequences as the global batch.

        The usual one takes all devices, with the smallest model parallelism that fits: tensor first, then pipeline
        (Narayanan et al., SC 2021, section 5). A row for each plan that was played: devices, seconds and dollars of a step
        (device-seconds where the machine has no price). Raises NarrowsError where no plan fits, or the machine has no link.
        """
        if machine.link is None:
            raise NarrowsError("no link joins its devices.", where=machine.name, remedy="Give a machine with a link.")
        group = replace(cluster(self.wiring), machine=machine, scale_up=machine.link)
        batch, sequence = int(step["sequences"]), int(step["tokens"] / step["sequences"])
        plans = self.plans(graph, group, batch, sequence)
        if not plans:
            raise NarrowsError(f"no plan on up to {self.devices} devices fits.", where=graph.name,
                               remedy="Give more devices, or another batch.")  # fmt: skip
        usual = min(plans, key=lambda p: (-p.devices, p.tensor * p.pipeline, p.pipeline, p.microbatch))
        seconds = self.cheapest(graph, group, plans, usual, sequence)
        chosen, price = list(seconds)[-1], (machine.price_per_hour or 3600.0) / 3600
        rows = tuple({"plan": str(p), "devices": p.devices, "seconds": s, "price": s * p.devices * price}
                     for p, s in sorted(seconds.items(), key=lambda item: item[1] * item[0].devices))  # fmt: skip
        values = {"seconds": seconds[chosen], "devices": float(chosen.devices), "price": seconds[chosen] * chosen.devices * price,
                  "usual_seconds": seconds[usual], "usual_price": seconds[usual] * usual.devices * price}  # fmt: skip
        values["saving"] = 1 - values["price"] / values["usual_price"]
        money = "USD a step" if machine.price_per_hour else "device s"
        return Reading(values, {"seconds": "s", "usual_seconds": "s", "price": money, "usual_price": money}, rows)


def _fits(graph: Graph, group: Cluster, layout: Layout, sequence: int) -> bool:
    """Whether a layout is legal and the memory of its devices suffices."""
    try:
        layout.require(graph, sequence=sequence)
    except NarrowsError:
        return False
    held = peak_bytes(network(graph, group, layout, sequence), layout, Axes.of(layout))
    return bool(held <= group.machine.memory.capacity_bytes)
