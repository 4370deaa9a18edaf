"""Lay out the training of a very large decoder on a machine whose links get slower outwards, and see what each knob does.

Tensor parallelism stays on the links inside a node, a pipeline with many microbatches crosses nodes, the optimizer's states
are sharded over the replicas (ZeRO-1), and activations are recomputed. Then every knob is turned by itself, and devices are
doubled with the batch (weak scaling) and without it (strong scaling).

## When it helps
Models that fit no node, on a machine with fast links inside a node and slow ones between: weights that are gathered over
the slow ones for every microbatch (ZeRO-3) leave devices waiting.

## When it does not
A model that fits a few devices needs neither: sharded data parallelism alone is simpler and as fast. Few microbatches for
each replica leave the pipeline empty, which is what limits strong scaling.

## Reference
Dash et al., Optimizing Distributed Training on Frontier for Large Language Models, 2023, arXiv 2312.12705. Its fractions are
of the peak of a die, and are compared with ours as FLOP of the model, without those computed again. Not a row of it went
into our constants: kernels are those of MI210 and MI250X, the framework's those of DeepSpeed on other machines.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.layout import Layout
from narrows.machine import Machine, cluster
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

if TYPE_CHECKING:
    from narrows.search.priced import Choice, Job

_PEAK = "of a MI250X die's peak; within 5 points, as no row of Frontier was fitted"


def _fraction(name: str, percent: float, setting: str) -> Claim:
    return Claim(name, "% of peak", percent, setting, "abstract", "simulated", _PEAK, percent - 5, percent + 5)


@dataclass(frozen=True)
class TrillionOnFrontier(Measures):
    """The recipe (tensor inside a node, pipeline across, ZeRO-1) for a model, and how sensitive its speed is."""

    card: ClassVar[Card] = Card(
        "trillion-parameter-training-on-frontier",
        relieves=(Limit.COMMUNICATION, Limit.CAPACITY, Limit.SCHEDULING),
        phases=("train",),
        exact=True,
        claims=(
            _fraction("peak_22b", 38.38, "GPT of 22B, 64 dies, the recipe that is found"),
            _fraction("peak_175b", 36.14, "GPT of 175B, 1,024 dies, tensor 4, pipeline 16, 640 sequences a replica"),
            _fraction("peak_1t", 31.96, "GPT of 1T, 3,072 dies, tensor 8, pipeline 64, 1,600 sequences a replica"),
            Claim("distance_of_recipe", "doublings", None, "175B on 1,024 dies and 1T on 3,072: most doublings between the "
                  "tensor or pipeline size found and the published one", "section V", "simulated", "a power of two", at_most=1),
        ),
    )  # fmt: skip
    wiring: str = choice("frontier-gcd", "selene", "dgx-h100", help="the cluster whose links join the devices")
    devices: int = choice(8, 64, 512)
    whole_layers: bool = choice(True, False, help="recompute whole layers; False also tries less")
    sharded: bool = choice(False, help="shard weights over all devices instead (ZeRO-3), the simple way")

    def baseline(self) -> "TrillionOnFrontier":
        return replace(self, sharded=True)

    def recipe(self, job: "Job") -> "Choice":
        """The fastest layout of the recipe's kind that fits; NarrowsError where there is none."""
        from narrows.search.priced import price
        from narrows.search.train import Space, plan_train

        if self.sharded:
            fewest = max(1, job.batch // job.devices)
            return price(replace(job, batch=fewest * job.devices), Layout(data=job.devices, shard=3, accumulate=fewest,
                                                                          recompute="full"))  # fmt: skip
        redo = ("full",) if self.whole_layers else ("full", "none")
        found = plan_train(job, Space(sequence=(False,), context_by=("ring",), shard=(1,), recompute=redo), keep=20)
        plain = [one for one in found.best if one.layout.context == 1]
        if not plain:
            raise NarrowsError(f"no layout on {job.devices} devices fits.", where=job.graph.name,
                               remedy=(*found.why_not, "Give more devices.")[0])  # fmt: skip
        return plain[0]

    def laid_out(self, job: "Job", tensor: int, pipeline: int) -> "Choice":
        """A recipe with these sizes, one sequence a microbatch."""
        from narrows.search.priced import price

        if self.sharded:
            return self.recipe(job)
        data = job.devices // tensor // pipeline
        return price(job, Layout(tensor, data=data, shard=1, pipeline=pipeline, accumulate=job.batch // max(data, 1),
                                 recompute="full"))  # fmt: skip

    def knobs(self, job: "Job", chosen: "Choice") -> Iterator[Mapping[str, Any]]:
        """A row for each knob turned by itself: percent of the recipe's speed, and bytes; or why it cannot be."""
        from narrows.search.priced import price

        one = chosen.layout
        turned = {
            "tensor x 2": {"tensor": one.tensor * 2, "data": one.data // 2, "accumulate": one.accumulate * 2},
            "pipeline x 2": {"pipeline": one.pipeline * 2, "data": one.data // 2, "accumulate": one.accumulate * 2},
            "tensor / 2": {"tensor": one.tensor // 2, "data": one.data * 2, "accumulate": one.accumulate // 2},
            "pipeline / 2": {"pipeline": one.pipeline // 2, "data": one.data * 2, "accumulate": one.accumulate // 2},
            "microbatch x 2": {"microbatch": one.microbatch * 2, "accumulate": one.accumulate // 2},
            "two chunks": {"chunks": 2},
            "no ZeRO": {"shard": 0},
            "ZeRO-3": {"shard": 3},
            "nothing recomputed": {"recompute": "none"},
        }
        for knob, change in turned.items():
            try:
                other = price(job, replace(one, **change))  # type: ignore[arg-type]
            except NarrowsError as refusal:
                yield {"knob": knob, "speed": "", "bytes": "", "note": f"{refusal.where}: {refusal.problem}"}
                continue
            held = float(other.memory.total)
            note = "" if held <= other.room else "does not fit"
            yield {"knob": knob, "speed": 100 * chosen.seconds / other.seconds, "bytes": held, "note": note}

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """The recipe for the step's sequences as the global batch, weak and strong scaling to twice the devices, and knobs.

        Raises NarrowsError where no link joins the machine's devices, or nothing fits.
        """
        from narrows.search.priced import Job

        group = cluster(self.wiring)
        if machine.name != group.machine.name:
            if machine.link is None:
                raise NarrowsError("no link joins its devices.", where=machine.name, remedy="Give a machine with a link.")
            group = replace(group, machine=machine, scale_up=machine.link)
        batch, sequence = int(step["sequences"]), int(step["tokens"] / step["sequences"])
        job = Job(graph, group, self.devices, batch, sequence, framework="deepspeed")
        chosen = self.recipe(job)
        weak = self.recipe(replace(job, devices=2 * self.devices, batch=2 * batch))
        values = {"peak": 100 * chosen.mfu, "seconds": chosen.seconds, "bytes": float(chosen.memory.total),
                  "weak_scaling": 100 * weak.mfu / chosen.mfu}  # fmt: skip
        if batch >= 2 * chosen.layout.data:
            values["strong_scaling"] = 100 * self.recipe(replace(job, devices=2 * self.devices)).mfu / chosen.mfu
        values |= {name: float(getattr(chosen.layout, name)) for name in ("tensor", "pipeline", "data", "microbatch")}
        units = {"peak": "%", "seconds": "s", "bytes": "B", "weak_scaling": "%", "strong_scaling": "%"}
        first = {"knob": "as it is", "speed": 100.0, "bytes": values["bytes"], "note": ""}
        return Reading(values, {name: unit for name, unit in units.items() if name in values}, (first, *self.knobs(job, chosen)))
