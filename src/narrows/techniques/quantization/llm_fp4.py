"""Keep weights and activations as 4-bit floats; each input channel has a power-of-two scale that hides in the weights.

Clipping is searched for every output of a weight and for the inputs of every layer, on the error that inputs like those
of the calibration data would make. Channels of a transformer's activations differ much in size and little within: an
integer for each shifts them into the same range. Such a scale only adds to the exponents of the weights that multiply
the channel, so no product becomes dearer.

## When it helps
Memory-bound decoding, at a quarter of the weight bytes; and prefill on hardware that multiplies 4-bit floats.

## When it does not
4-bit activations cost much quality, the more the smaller the model. Hardware without fp4 units computes in a wider
type; CPUs, which read packed 4-bit integers faster, are refused where the plain weights fit the memory.
The paper also searches the split between exponent and mantissa for each layer; here it is one option for all (`format`).

## Reference
Liu et al., LLM-FP4: 4-Bit Floating-Point Quantized Transformers, EMNLP 2023.
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

SAMPLES = 256  # tokens of each layer's input that the searches see
SHRINKS = (1.0, 0.85, 0.7, 0.55)  # shares of the range that clipping may leave


@dataclass(frozen=True)
class LLMFP4(CodesWeights):
    """4-bit floats for weights and inputs of every linear layer but the output layer."""

    card: ClassVar[Card] = Card(
        slug="llm-fp4",
        relieves=(Limit.BANDWIDTH, Limit.CAPACITY, Limit.COMPUTE),
        phases=("prefill", "decode", "forward"),
        exact=False,
        stage=Stage.QUANTIZE,
        touches=("linear weights",),
        blockwise=True,
        needs=("calibration",),
        price="8 % of a 13-billion model's accuracy; small models lose far more",
        claims=(
            Claim(
                "shifts_are_free", "relative", 0.0, "layers of two blocks of SmolLM2-135M", "abstract", "run",
                "explicit scales for each channel against shifted weights: powers of two, so fp32 sums alone may differ; NaN "
                "where no channel is shifted", at_most=1e-6,
            ),
            Claim(
                "loss_over_int4", "ratio", None, "SmolLM2-135M, W4A4: nats added over those of int4 with the same clipping",
                "abstract: +12.7 points over prior work", "run", "a clear margin; 1 for int4 itself", at_most=0.7,
            ),
            Claim(
                "loss_over_unshifted", "ratio", None, "SmolLM2-135M, W4A4: nats added over those with one scale for all channels",
                "abstract", "run", "shifting helps clearly; 1 without it", at_most=0.8,
            ),
        ),
    )  # fmt: skip

    format: str = choice("e2m1", "e1m2", "e3m0", help="exponent and mantissa bits of weights and inputs")
    shift: bool = choice(True, help="an exponent for each input channel, moved into the weights")
    group: int = choice(0, 64, 32, help="inputs of an output that share a scale; 0: all of them")

    def __post_init__(self) -> None:
        NumberFormat.parse(self.format)

    def baseline(self) -> "LLMFP4":
        return replace(self, format="int4", shift=False)

    def coding_of(self, name: str) -> Coding:
        form = NumberFormat.parse(self.format)
        return Coding(form, self.group, inputs=form, per="channel" if self.shift else "tensor")

    def apply(self, model: "nn.Module", data: Sequence[Mapping[str, "Tensor"]]) -> "nn.Module":
        from narrows.modules.coded_linear import CodedLinear

        inputs = self.seen(model, data, SAMPLES)
        for name, linear in self.layers(model).items():
            x, weight, coding = inputs.pop(name), linear.weight.detach().float(), self.coding_of(name)
            a = self._input_scale(x, weight, coding.weights)
            scale = self._scale(weight, x, coding.weights)
            model.set_submodule(name, CodedLinear.of(linear.weight, linear.bias, coding, scale, a))
        return model

    def _input_scale(self, x: "Tensor", weight: "Tensor", form: NumberFormat) -> "Tensor":
        """Scales [K] or [1] under which rounding inputs like x [T, K] changes the outputs of a weight [N, K] least."""
        import torch

        from narrows.modules.coded_linear import rounded

        size = x.abs().amax(0).clamp(min=2.0**-40)
        shifts = torch.zeros_like(size)
        if self.shift:  # as far as the format's own exponents reach
            shifts = (size.max() / size).log2().floor().clamp(0, 2**form.exponent - 1)
        heard = weight.square().sum(0)  # how loud an error of each input is in the outputs
        best, least = size, float("inf")
        for shrink in SHRINKS:
            scale = (size.max() * shrink / form.largest).bfloat16().float() * 2.0**-shifts
            error = float(((rounded(x / scale, form) * scale - x).square() * heard).sum())
            if error < least:
                best, least = scale, error
        return best if self.shift else best[:1]

    def _scale(self, weight: "Tensor", x: "Tensor", form: NumberFormat) -> "Tensor":
        """The scales [N, G] under which rounding a weight [N, K] changes its outputs for inputs like x [T, K] least."""
        import torch

        from narrows.modules.coded_linear import recoded, scales

        power = x.square().mean(0)
        best = scales(weight, form, self.group)
        least = torch.full_like(best, float("inf"))
        for shrink in SHRINKS:
            scale = scales(weight, form, self.group, shrink)
            error = (recoded(weight, form, scale).sub_(weight).square_() * power).view(*scale.shape, -1).sum(-1)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
        return best

    @classmethod
    def example(cls) -> Example:
        return Example(*samples.tiny_llama(2, 16), Step.decode(1, context=16))
