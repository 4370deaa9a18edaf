"""Keep weights and activations of linear layers as 8-bit floats: weights with a scale for each output, inputs with one in all.

A float spends its codes on small numbers too, so that a few large activations do not take the steps away from the rest, as
they do from 8-bit integers. e4m3 suits transformers, whose activations have outliers; e3m4 has finer steps for
activations without; e5m2 has so wide a range that inputs are cast as they are.

## When it helps
Prefill, encoders and large batches on hardware that multiplies 8-bit floats; decoding, at half the weight bytes.

## When it does not
Hardware without fp8 units computes in bf16 and gains bytes alone; CPUs are refused where the plain weights fit the memory.
Convolutions stay as they are.

## Reference
Shen et al., Efficient Post-training Quantization with FP8 Formats, MLSys 2024.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from narrows import samples
from narrows.cost import Limit
from narrows.modules.number_formats import CodesWeights, Coding, NumberFormat
from narrows.step import Step
from narrows.technique import Card, Claim, Example, Stage, choice

if TYPE_CHECKING:
    from torch import Tensor, nn

SAMPLES = 1024  # tokens that the ranges are taken from
CAST = "e5m2"  # wide enough for inputs without a scale


@dataclass(frozen=True)
class FP8PTQ(CodesWeights):
    """8-bit floats for weights and inputs of every linear layer but the output layer."""

    card: ClassVar[Card] = Card(
        slug="fp8-ptq-e5m2-e4m3-e3m4",
        relieves=(Limit.BANDWIDTH, Limit.CAPACITY, Limit.COMPUTE),
        phases=("prefill", "decode", "forward"),
        exact=False,
        stage=Stage.QUANTIZE,
        touches=("linear weights",),
        blockwise=True,
        needs=("calibration",),
        price="3 to 5 % more perplexity at 135 M parameters",
        claims=(
            Claim(
                "same_bits", "share", 1.0, "all 256 codes of e4m3 and e5m2, and 50,000 numbers rounded to each; e3m4's ends",
                "the formats", "checked", "torch's own fp8 casts, bit by bit; e3m4, which torch lacks, by its definition",
                at_least=1.0,
            ),
            Claim(
                "loss_over_int8", "ratio", None, "SmolLM2-135M: nats added over those of int8 with a shifted range",
                "abstract: coverage 92.64 % against 65.87 %", "run", "outliers take int8's steps away; 1 for int8 itself",
                at_most=0.6,
            ),
            Claim(
                "coverage", "share", 0.9264, "SmolLM2-135M's next tokens, MiniLM's sentences, AntiBERTy's hidden residues,"
                " EfficientNet-Lite0's names (its last layer), digits by linear layers and by attention; the paper: 75 networks",
                "abstract: coverage 92.64 % against 65.87 %", "run",
                "all six must keep 99 % of their measure; int8 loses those whose activations have outliers", at_least=1.0,
            ),
        ),
    )  # fmt: skip

    format: str = choice("e4m3", "e3m4", "e5m2", help="exponent and mantissa bits of weights and inputs")

    def __post_init__(self) -> None:
        NumberFormat.parse(self.format)

    def baseline(self) -> "FP8PTQ":
        return replace(self, format="int8")

    def coding_of(self, name: str) -> Coding:
        form = NumberFormat.parse(self.format)
        return Coding(form, inputs=form, zero=not form.exponent)  # integers waste fewer steps on a range that is shifted

    def apply(self, model: "nn.Module", data: Sequence[Mapping[str, "Tensor"]]) -> "nn.Module":
        from narrows.modules.coded_linear import CodedLinear

        inputs = {} if self.format == CAST else self.seen(model, data, SAMPLES)
        for name, linear in self.layers(model).items():
            coding, scale, zero = self.coding_of(name), None, None
            if name in inputs:
                high, low = inputs[name].max(), inputs.pop(name).min()
                zero = (high + low)[None] / 2 * coding.zero
                scale = (high - zero).maximum(zero - low) / coding.weights.largest
            coded = CodedLinear.of(linear.weight, linear.bias, coding, input_scale=scale, input_zero=zero)
            model.set_submodule(name, coded)
        return model

    @classmethod
    def example(cls) -> Example:
        return Example(*samples.tiny_llama(2, 16), Step.decode(1, context=16))
