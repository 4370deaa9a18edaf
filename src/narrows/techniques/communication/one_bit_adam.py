"""Train with Adam until its variance is stable, then freeze it and exchange the momentum as signs, one bit a number.

Adam is not linear in the gradient, so that compressing gradients with error feedback fails: the rounding errors
enter the variance squared and do not cancel. With the variance frozen, what is left is momentum with a fixed
preconditioner, which is linear, and in which errors carried to the next step do cancel. The momentum is averaged
in two stages: every rank sends each other rank its version of the piece which that rank serves (all-to-all), and the
server sends back the average, compressed again (all-gather). Both sides add what rounding left out to the next step.

## When it helps
Data-parallel training over slow links, where the gradients' all-reduce takes most of the step: Ethernet between
nodes, small batches per device, no gradient accumulation.

## When it does not
Fast links; gradients that overlap with the backward pass anyway (the momentum can only be exchanged after it); runs in
which the variance does not settle; rows of an embedding that the warm-up hardly meets, whose frozen variance is far
too small; ranks that have no memory for one and a bit more fp32 number per parameter.
Gradients cannot be clipped by their global norm once they are no longer averaged.

## Reference
Tang et al., 1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed, ICML 2021,
arXiv 2102.02888. Scales are mean magnitudes per chunk, and the variance is frozen with its bias corrected.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.cost import Limit
from narrows.costmodel import op_time
from narrows.errors import NarrowsError, closest
from narrows.graph import FP32, DType, Graph, Op
from narrows.machine import Machine
from narrows.modules.sign_layout import Layout
from narrows.step import Step
from narrows.technique import Card, Claim, No, Stage, Trains, Verdict, choice

if TYPE_CHECKING:
    import torch

_DEFAULTS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
_SETTING = "byte-level language model on English prose, 4 gloo ranks, 280 steps, 42 of them warm-up"


@dataclass(frozen=True)
class OneBitAdam(Trains):
    """1-bit Adam: options of the method; the optimizer's own (lr, betas, eps, weight_decay) go to `attach`."""

    card: ClassVar[Card] = Card(
        "1-bit-adam",
        relieves=(Limit.COMMUNICATION,),
        phases=("train",),
        exact=False,
        price="Adam's loss at equal steps; one and a bit more fp32 number per parameter for the rounding errors",
        stage=Stage.TRAIN,
        touches=("optimizer", "gradients"),
        needs=("training",),
        claims=(
            Claim("volume_at_equal_loss", "x less", 5.0, _SETTING, "abstract", "run",
                  "15 % warm-up (BERT) gives 1 / (0.15 + 0.85 / 32) = 5.7 over fp32; counts only if the loss ends"
                  " within 3 % of Adam's", at_least=5.0),
            Claim("volume_after_warmup", "x less", 32.0, _SETTING, "section 1", "run", "32 bits become 1, plus scales, padding",
                  at_least=30.0, at_most=32.0),
            Claim("feedback_gain", "x loss", None, "final loss without error feedback over the one with it, else the same run",
                  "section 3", "run", "the paper says worse, and no figure; two seeds differ by a hundredth", at_least=1.1),
            Claim("throughput_ethernet", "x", 3.3, "BERT-Large, 64 V100, 4.1 Gb/s Ethernet a node, batch 16 each, whole run",
                  "abstract", "simulated", "volumes and a datasheet's compute: a quarter either way", at_least=2.5, at_most=4.1),
        ),
    )  # fmt: skip
    warmup: int = choice(1000, 100, 10000, help="steps of plain Adam before the variance is frozen; about 15 % of a run")
    chunk: int = choice(8192, 2048, 65536, help="numbers that share one scale (a multiple of 8)")
    feedback: bool = choice(True, help="carry rounding errors on; False is naive sign compression, to compare with")
    compress: bool = choice(True, help="False is plain Adam all along, to compare with")

    def __post_init__(self) -> None:
        if self.warmup < 1:
            raise NarrowsError(f"warmup is {self.warmup}.", where="1-bit-adam: warmup", remedy="It needs at least one step.")
        if self.chunk < 8 or self.chunk % 8:
            raise NarrowsError(f"chunk is {self.chunk}.", where="1-bit-adam: chunk", remedy="Give a positive multiple of 8.")

    def baseline(self) -> "OneBitAdam":
        return replace(self, compress=False)

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        if step.phase != "train":
            return No(f"it changes how a model is trained, and this is a {step.phase} step")
        exchanged = [op for op in graph if _is_gradients(op)]
        if not exchanged:
            return No("no gradients are exchanged: this is one device (0 all-reduce ops in the update)")
        if machine is not None and machine.link is None:
            return No(f"{machine.name} has no link of known speed (0 B/s) to other devices")
        if machine is not None:
            seconds = [float(op_time(op, step, machine, graph.eager).seconds) for op in graph]
            share = sum(s for s, op in zip(seconds, graph, strict=True) if _is_gradients(op)) / sum(seconds)
            if share < 0.05:
                return No(f"the exchange of gradients takes {share:.1%} of the step; below 5 % compression is not worth it")
        return True

    def rewrite(self, graph: Graph) -> Graph:
        """After warm-up: each all-reduce of gradients is an all-to-all and an all-gather of signs and scales."""
        if not self.compress:
            return graph
        ranks = max((float(op["ranks"]) for op in graph if _is_gradients(op)), default=0.0)  # type: ignore[arg-type]

        def change(op: Op) -> tuple[Op, ...]:
            if _is_gradients(op):
                return self._exchange(op)
            if op.kind == "optimizer" and ranks and self.feedback:  # the rounding errors of worker and server
                return (op.but(states=op["states"] + 1 + 1 / ranks),)
            return (op,)

        return graph.map(change)

    def _exchange(self, op: Op) -> tuple[Op, ...]:
        cut = Layout(round(op["elements"]), round(op["ranks"]), self.chunk)  # type: ignore[arg-type]
        signs = DType("sign", 8 * cut.message_bytes / cut.piece)
        dims = {"elements": cut.piece * cut.ranks, "ranks": cut.ranks}
        touched = {"elements": cut.elements, "reads": 3 * cut.elements, "flop_per_element": 8}
        work = Op(f"{op.name} compress", "elementwise", touched, act=FP32, phase="update", kernels=8, repeat=op.repeat)
        ways = ("all_to_all", "all_gather")
        return work, *(Op(f"{op.name} {way}", way, dims, act=signs, phase="update", repeat=op.repeat) for way in ways)

    def attach(self, model: "torch.nn.Module", **options: Any) -> "torch.optim.Optimizer":
        """Give a DistributedDataParallel model its communication hook, and the optimizer to step with.

        Options: lr, betas, eps, weight_decay. Raises NarrowsError for a model that is not wrapped, for one rank
        alone, and for options it does not know.
        """
        from torch.nn.parallel import DistributedDataParallel

        from narrows.modules.one_bit_adam import OneBitAdamOptimizer

        unknown = next((name for name in options if name not in _DEFAULTS), None)
        if unknown:
            raise NarrowsError(f"no option {unknown!r}.", where="1-bit-adam: attach", remedy=closest(unknown, list(_DEFAULTS)))
        if not isinstance(model, DistributedDataParallel):
            raise NarrowsError(f"a {type(model).__name__} exchanges no gradients.", where="1-bit-adam: attach",
                               remedy="Wrap it in torch.nn.parallel.DistributedDataParallel.")  # fmt: skip
        ranks = model.process_group.size()
        if ranks == 1:
            remedy = "Use torch.optim.Adam, or start more ranks."
            raise NarrowsError("the world size is 1.", where="1-bit-adam: attach", remedy=remedy)
        warmup = self.warmup if self.compress else 2**62  # plain Adam never leaves the warm-up
        return OneBitAdamOptimizer(model, **(_DEFAULTS | options), warmup=warmup, chunk=self.chunk, feedback=self.feedback)


def _is_gradients(op: Op) -> bool:
    return op.kind == "all_reduce" and op.phase == "update" and op["ranks"] > 1  # type: ignore[operator]
