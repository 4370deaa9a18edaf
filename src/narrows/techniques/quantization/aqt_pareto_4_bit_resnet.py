"""Train a network with its weights and inputs rounded to 4 bits, wider for the same cost: better than a narrow one in bf16.

## What it does
Every product sees whole numbers: weights symmetric with a step for each output, its largest weight at the largest number;
inputs with one step a layer, which ends at a few times the root of their mean square, a running mean of training's. Gradients
pass as if nothing were rounded. The first and the last layer keep 8 bits. What a multiply-add costs is taken as its
bits over 16, as on hardware that is twice as fast for half the bits: a network of twice the width in 4 bits costs what
the narrow one does in bf16, and learns more.

`narrows.modules.quantized_training` has the rounding; `deployed` tells a graph as integers would run it.

## When it helps
A budget of compute or energy, hardware with 4-bit integer products, and the freedom to choose a width and train.

## When it does not
Hardware that unpacks 4-bit integers to multiply them: the cost is then that of the wider type. Training costs more, not
less: rounding comes on top (`rewrite`). Networks so wide that accuracy no longer rises with width have nothing to gain but
size. Inputs that one layer writes in 16 bits for the next to round leave convolutional networks bound by memory on large GPUs:
the forecast gains there are far below the bits'. A regularizing effect, which the paper has on ImageNet, is not seen on digits.

## Reference
Abdolrashidi et al., Pareto-Optimal Quantized ResNet Is Mostly 4-bit, ECV at CVPR 2021, arXiv 2105.03536.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import FP32, DType, Graph, Op
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, No, Stage, Trains, Verdict, choice

if TYPE_CHECKING:
    import torch

PLAIN = 16  # bits from which nothing is rounded
_DIGITS = "residual network of 9 convolutions on 4,000 digits, 3 epochs, 2,000 held out: "


@dataclass(frozen=True)
class AQT(Trains):
    """Quantization-aware training of all convolutions and linear layers."""

    card: ClassVar[Card] = Card(
        slug="aqt-pareto-4-bit-resnet",
        relieves=(Limit.COMPUTE, Limit.CAPACITY, Limit.ENERGY),
        phases=("train",),
        exact=False,
        price="the time of rounding while it trains",
        stage=Stage.TRAIN,
        touches=("dtype", "linear weights"),
        needs=("training",),
        claims=(
            Claim(
                "gain_at_equal_cost", "points", None, _DIGITS + "4 bits at widths 4 and 8 over none rounded at 2 and 4, which "
                "costs the same as bf16; the least of both", "abstract: the bf16 curve is dominated", "run", "standard error of "
                "an accuracy: 1 point", at_least=3.0,
            ),
            Claim(
                "gain_over_rounding_afterwards", "points", None, _DIGITS + "width 4: trained with 4 bits over trained without "
                "and then rounded", "abstract: quantization-aware training", "run", "twice the standard error of the difference"
                " on the same images", at_least=1.5,
            ),
            Claim(
                "integer_error", "relative", None, "that network, width 8: outputs of every layer in training's arithmetic "
                "against products of whole numbers", "abstract: designed with hardware in mind", "checked", "fp32 sums of exact "
                "products", at_most=1e-5,
            ),
        ),
    )  # fmt: skip

    bits: int = choice(4, 8, 2, help="of weights and inputs; 16 leaves them plain")
    edges: int = choice(8, 16, help="of the first and the last layer")
    spread: float = choice(3.0, 2.5, 4.0, help="where inputs end, in roots of their mean square")

    def __post_init__(self) -> None:
        if not all(width == PLAIN or 2 <= width <= 8 for width in (self.bits, self.edges)) or self.spread <= 0:
            remedy = "Give 2 to 8 bits, or 16, and a spread above 0."
            raise NarrowsError(f"{self} is not possible.", where=self.card.slug, remedy=remedy)

    def baseline(self) -> "AQT":
        return replace(self, bits=PLAIN, edges=PLAIN)

    def widths(self, layers: Sequence[str]) -> dict[str, int]:
        """Bits of each layer that is rounded, of all that multiply in order."""
        found = {name: self.edges if name in (layers[0], layers[-1]) else self.bits for name in layers}
        return {name: width for name, width in found.items() if width < PLAIN}

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        if step.phase != "train":
            return No(f"it changes how a model is trained, and this is a {step.phase} step")
        return True if _products(graph) else No("it has no convolution or linear layer with plain weights of its own")

    def rewrite(self, graph: Graph) -> Graph:
        """Training, with the rounding of inputs and weights in front of every product."""
        rounded = self.widths([op.name for op in _products(graph)])

        def change(op: Op) -> tuple[Op, ...]:
            if op.phase != "forward" or op.name not in rounded:
                return (op,)
            dims = dict(op.dims)
            sizes = {"inputs": op.spec.reads(dims), "weights": op.spec.matrix(dims)}
            return *(
                Op(f"{op.name} round {what}", "elementwise", {"elements": n, "reads": n, "flop_per_element": 4}, act=op.act,
                   repeat=op.repeat, kernels=4) for what, n in sizes.items()
            ), op  # fmt: skip

        return graph.map(change)

    def deployed(self, graph: Graph) -> Graph:
        """A forward graph as it runs once it is trained: products of integers, with fp32 steps for each output."""
        rounded = self.widths([op.name for op in _products(graph)])

        def change(op: Op) -> Op:
            if op.name not in rounded:
                return op
            width = 4 if rounded[op.name] <= 4 else 8  # what hardware multiplies
            return replace(op, weight=DType(f"int{rounded[op.name]}", rounded[op.name], scale_bits=32), compute=f"int{width}")

        return graph.map(change)

    def attach(self, model: "torch.nn.Module", **options: Any) -> "torch.optim.Optimizer":
        """Round a model's products in place, and give Adam for its plain weights; `options` are Adam's.

        Raises NarrowsError for a model without linear layers and convolutions.
        """
        import torch

        from narrows.modules.quantized_training import products, quantize

        found = products(model)
        if not found:
            remedy = "Give a model with linear layers or convolutions."
            raise NarrowsError("there is no product to round.", where=self.card.slug, remedy=remedy)
        quantize(model, self.widths(found), self.spread)
        return torch.optim.Adam(model.parameters(), **options)


def _products(graph: Graph) -> list[Op]:
    """The forward convolutions and linear layers with plain weights of their own."""
    found = graph.find("conv", "linear")
    return [op for op in found if op.weight is not None and op.weight.bits >= min(PLAIN, FP32.bits) and not op.tied]
