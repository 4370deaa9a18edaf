"""Train with what is kept in 8-bit floats: Adam's moments, each group's range stretched to the format's, and activations.

## What it does
Numbers of one group of a moment differ by far less than the 229,376 between E4M3's largest and smallest number, and most of
its codes stay unused. Their sizes are therefore raised to the power that makes the group's range the format's, and come
back by the root: equal relative steps become as many times finer as the power is.

Inputs of linear layers are kept with one scale a tensor, which fp8 products need anyway, and layers that read the same
tensor share it. What norms and activation functions keep has a scale for every 16 numbers, so that a spike spoils
few others. Attention keeps what it kept.

`narrows.modules.fp8_training` has both. On hardware with fp8 units the products of linear layers run there; `attach`
rounds their operands to fp8 and multiplies in the model's dtype.

## When it helps
Training that does not fit, or that would fit with longer sequences or larger batches; bf16 training on hardware with
fp8 units.

## When it does not
Weights, gradients and the fp32 copy stay: 8 of 16 bytes a parameter. With a second beta near 1 a moment changes by less
than half of a code's step and stands still: 0.95 is the default of `attach`. Activation functions that are called as plain
functions are not seen. Without fp8 units it costs time.

## Reference
Xi et al., COAT: Compressing Optimizer States and Activation for Memory-Efficient FP8 Training, ICLR 2025, arXiv 2410.19313.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Graph, Op
from narrows.machine import Machine
from narrows.modules.linears import is_plain
from narrows.step import Step
from narrows.technique import Card, Claim, No, Stage, Trains, Verdict, choice

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class COAT(Trains):
    """FP8 optimizer states and saved activations."""

    card: ClassVar[Card] = Card(
        slug="coat",
        relieves=(Limit.CAPACITY, Limit.COMPUTE),
        phases=("train",),
        exact=False,
        price="a loss within a percent; without fp8 units the time of packing",
        stage=Stage.TRAIN,
        touches=("optimizer", "linear weights"),
        needs=("training",),
        claims=(
            Claim(
                "bytes_at_equal_loss", "x less", 1.54, "character model of 600,000 parameters in bf16, 120 steps of 256: "
                "weights, fp32 copy, gradients, moments and what the forward pass leaves, against AdamW in bf16", "abstract",
                "run", "counts only where the held-out loss ends within 1 % of AdamW's", at_least=1.4, at_most=1.75,
            ),
            Claim(
                "moment_error", "ratio", None, "AdamW's moments after those steps, E4M3 in groups of 128: squared error of "
                "the update's direction over that without stretching, median over parameters", "method: dynamic range expansion",
                "run", "1 where nothing is stretched; powers near 2 halve the steps, which quarters it", at_most=0.5,
            ),
            Claim(
                "footprint_7b", "x less", 1.54, "Llama-2-7B, 4 sequences of 2048 tokens, everything on one device", "abstract",
                "checked", "the paper's is spread over several devices: a tenth either way", at_least=1.39, at_most=1.69,
            ),
        ),
    )  # fmt: skip

    group: int = choice(128, 64, 256, help="numbers of a moment that share a scale; 0: moments stay fp32")
    expand: bool = choice(True, False, help="stretch each group's range to the format's")
    act_group: int = choice(16, 32, help="numbers of a saved activation that share a scale; 0: activations stay as they are")

    def __post_init__(self) -> None:
        if self.group < 0 or self.act_group < 0:
            remedy = "Give group and act_group from 0."
            raise NarrowsError(f"{self} is not possible.", where=self.card.slug, remedy=remedy)

    def baseline(self) -> "COAT":
        return replace(self, group=0, expand=False, act_group=0)

    @property
    def state_bits(self) -> float:
        """Bits of a moment's number with its share of scale and power."""
        return 8 + 16 * (1 + self.expand) / self.group if self.group else 32

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        if step.phase != "train":
            return No(f"it changes how a model is trained, and this is a {step.phase} step")
        if not any(is_plain(op) for op in graph.forward):
            return No("it has no plain linear layer besides its output layer")
        if machine is not None and machine.kind == "cpu":
            return No(f"{machine.name} has no fp8 units, and packing alone would cost time")
        return True

    def rewrite(self, graph: Graph) -> Graph:
        """Products in fp8, what is kept for the backward pass in 8 bits, and an optimizer with smaller states."""
        attention = {op.name for op in graph.forward if op.kind == "attention"}

        def change(op: Op) -> Op:
            if op.kind == "optimizer" and self.group:
                return op.but(states=op["states"] - 2 * (1 - self.state_bits / 32))  # type: ignore[operator]
            if not self.act_group or op.phase not in ("forward", "backward"):
                return op
            if is_plain(op):
                own = op["rows"] * op["inputs"] if attention & set(op.inputs) else op.saved  # type: ignore[operator]
                return op.but(compute="fp8", saved=own * (8 / op.act.bits))
            in_groups = op.kind in ("norm", "elementwise")
            return op.but(saved=op.saved * ((8 + 16 / self.act_group) / op.act.bits)) if in_groups else op

        return graph.map(change)

    def attach(self, model: "torch.nn.Module", **options: Any) -> "torch.optim.Optimizer":
        """Change a model in place and give its AdamW; `options` are those of `ExpandedAdamW` (lr, betas, eps, weight_decay).

        Raises NarrowsError for a model without plain linear layers besides its output layer.
        """
        from narrows.modules.fp8_training import ExpandedAdamW, train_in_fp8

        if self.act_group and not train_in_fp8(model, self.act_group):
            raise NarrowsError("the model has no plain linear layer.", where=self.card.slug, remedy="Use another technique.")
        return ExpandedAdamW(model.parameters(), **options, group=self.group, expand=self.expand)
