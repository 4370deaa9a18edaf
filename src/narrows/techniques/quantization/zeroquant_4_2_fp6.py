"""Keep linear weights as 6-bit floats with one scale for each output, in segments of 4 and 2 bits.

A float's steps are finest where most weights lie, so that a single scale for a whole row does: no groups, no calibration
data and nothing that could be fitted to them. A 4-bit segment (sign and exponent) and a 2-bit segment (fraction) each
fill whole bytes, so that loads stay aligned.

## When it helps
Decoding with few sequences reads every weight once for each token: 6 of 16 bits are 2.7 times less to read. A model
whose quality does not survive 4 bits fits in three eighths of its memory.

## When it does not
Long prompts and large batches are bound by arithmetic. The gain in time needs a kernel that unpacks in registers; on
a CPU it is a third for one row and a loss from 16 rows, so that CPUs are refused where the plain weights fit the memory.
Relative steps suit weights that are small where activations are large: after a random rotation, which spreads outliers over
all channels, SmolLM2-135M loses 20 % of perplexity instead of 1 %.

## Reference
Wu et al., ZeroQuant(4+2): Redefining LLMs Quantization with a New FP6-Centric Strategy for Diverse Generative Tasks, 2023.
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


@dataclass(frozen=True)
class ZeroQuantFP6(CodesWeights):
    """6-bit floats for every linear layer but the output layer."""

    card: ClassVar[Card] = Card(
        slug="zeroquant-4-2-fp6",
        relieves=(Limit.CAPACITY, Limit.BANDWIDTH),
        phases=("decode",),
        exact=False,
        stage=Stage.QUANTIZE,
        touches=("linear weights",),
        blockwise=True,
        price="about 1 % more perplexity at 135 M parameters, without calibration",
        claims=(
            Claim(
                "perplexity", "ratio", None, "SmolLM2-135M, Brown; the paper: StarCoder-15B like FP16", "abstract", "run",
                "about 1 % over fp32, as larger models are closer; one scale an output leaves int4 at more than 1.5",
                at_most=1.02,
            ),
            Claim(
                "bits_per_weight", "bits", 6.0, "two layers of SmolLM2-135M, scales apart", "abstract: 4+2", "run",
                "resident bytes of the segments; NaN unless every weight comes back as the nearest of the 64 values, bit by bit",
                at_least=6.0, at_most=6.0,
            ),
            Claim(
                "decode_speedup", "x", 16 / 6, "Llama-2-7B, batch 1, A100-80GB, roofline without overheads", "16 over 6 bits",
                "checked", "output layer and cache stay in fp16; of a format above 1.02 x perplexity nothing is gained",
                at_least=2.3, at_most=2.67,
            ),
        ),
    )  # fmt: skip

    format: str = choice("e3m2", "e2m3", help="exponent and mantissa bits; any number format of 2 to 8 bits")
    group: int = choice(0, help="inputs of an output that share a scale; 0: all of them")

    def __post_init__(self) -> None:
        NumberFormat.parse(self.format)

    def baseline(self) -> "ZeroQuantFP6":
        return replace(self, format="int4")

    def coding_of(self, name: str) -> Coding:
        return Coding(NumberFormat.parse(self.format), self.group)

    def apply(self, model: "nn.Module", data: Sequence[Mapping[str, "Tensor"]]) -> "nn.Module":
        from narrows.modules.coded_linear import CodedLinear

        for name, linear in self.layers(model).items():
            model.set_submodule(name, CodedLinear.of(linear.weight, linear.bias, self.coding_of(name)))
        return model

    @classmethod
    def example(cls) -> Example:
        return Example(*samples.tiny_llama(2, 16), Step.decode(1, context=16))
