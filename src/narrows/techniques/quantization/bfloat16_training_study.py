"""Train with the operands of every product in bfloat16 and sums, weights and updates in fp32, as it stands.

## What it does
Inputs, weights and output gradients of linear layers and convolutions are rounded to the nearest bfloat16 number, ties to
even; products are summed in fp32, and the optimizer changes an fp32 copy of the weights. Neither the learning rate nor the
number of steps changes, and the loss is not scaled: bfloat16 has the 8 exponent bits of fp32.

`attach` does this by rounding (see `narrows.modules.rounded_training`), whatever the hardware: a small run tells whether a
model bears it. `rewrite` tells what it saves where the hardware multiplies bfloat16.

## When it helps
Training on hardware that multiplies bfloat16: a multiple of the rate of fp32, at half the bytes of activations and
gradients.

## When it does not
Hardware without such units is refused, but for GPUs, which still move half the bytes. Rounding costs time and saves none, so
that runs with `attach` are for looking. fp16 (`form`) has finer steps and a narrower range: gradients below 3e-8 are lost
unless the loss is scaled.

## Reference
Kalamkar et al., A Study of BFLOAT16 for Deep Learning Training, 2019, arXiv 1905.12322.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.free import cast
from narrows.graph import DTYPES, FP32, Graph, Op
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, No, Stage, Trains, Verdict, choice

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BFloat16Training(Trains):
    """Operands of products in a 16-bit format, everything that adds up in fp32."""

    card: ClassVar[Card] = Card(
        slug="bfloat16-training-study",
        relieves=(Limit.COMPUTE, Limit.BANDWIDTH, Limit.CAPACITY),
        phases=("train",),
        exact=False,
        price="rounding to 8 bits of mantissa: as much as another seed",
        stage=Stage.TRAIN,
        touches=("dtype",),
        needs=("training",),
        claims=(
            Claim(
                "casts_that_differ", "share", 0.0, "2^18 random bit patterns: every exponent, subnormal numbers, infinities, "
                "NaN, ties", "abstract: emulation; rounding modes", "checked", "bit by bit what torch's cast gives",
                at_most=0.0,
            ),
            Claim(
                "worst_loss_over_fp32", "ratio", 1.0, "digits read, digits reconstructed and characters predicted, each with the "
                "gradients that a batch of 2^19 gives; held-out loss after as many steps", "abstract", "run", "all other "
                "settings are equal, and the loss is not scaled; other seeds move it by 0.3 to 2 %", at_most=1.01,
            ),
            Claim(
                "bias", "relative", 0.0, "mean of the rounding of 2^20 normal numbers' sizes", "abstract: rounding modes",
                "checked", "ties to even have none, which leaves the noise of the mean; cutting off loses 3e-3", at_most=1e-5,
            ),
        ),
    )  # fmt: skip

    form: str = choice("bf16", "fp16", help="format of the operands")
    nearest: bool = choice(True, False, help="round to the nearest; False cuts off, which biases every product")

    def __post_init__(self) -> None:
        if self.form not in ("bf16", "fp16"):
            raise NarrowsError(f"{self.form!r} is no 16-bit format.", where=f"{self.card.slug}: form", remedy="Use bf16 or fp16.")

    def baseline(self) -> "BFloat16Training":
        return replace(self, form="fp16", nearest=False)

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        if step.phase != "train":
            return No(f"it changes how a model is trained, and this is a {step.phase} step")
        if not any(FP32 in (op.act, op.weight) for op in graph):
            return No("nothing in it is fp32")
        if machine is not None and machine.peak(self.form) <= machine.peak("fp32") and machine.kind != "gpu":
            return No(f"{machine.name} computes {self.form} no faster than fp32")
        return True

    def rewrite(self, graph: Graph) -> Graph:
        """Everything in the format, and with the optimizer an fp32 copy of the weights."""

        def keep(op: Op) -> Op:
            return op.but(states=op["states"] + 1) if op.kind == "optimizer" and op.act == FP32 else op  # type: ignore[operator]

        return cast(graph.map(keep), DTYPES[self.form])

    def attach(self, model: "torch.nn.Module", **options: Any) -> "torch.optim.Optimizer":
        """Round the products of a model in place, and give Adam for its fp32 weights; `options` are Adam's.

        Raises NarrowsError for a model without a linear layer or convolution in fp32.
        """
        import torch

        from narrows.modules.rounded_training import round_products

        if not round_products(model, self.form, self.nearest):
            remedy = "Give a model in fp32, with linear layers or convolutions."
            raise NarrowsError("there is no fp32 product to round.", where=self.card.slug, remedy=remedy)
        return torch.optim.Adam(model.parameters(), **options)
