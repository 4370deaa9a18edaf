"""Keep each linear weight as a sum of two trit-planes, {-1, 0, 1} times a scale that a group of inputs shares.

Scales and planes are found by turns: the scales by least squares, then for each weight the pair of trits that comes
nearest. Neither turn can raise the error. Five trits take a byte, so that a weight takes 3.2 bits and its scales.

## When it helps
A model that does not fit its memory fits in a fifth of it, without calibration data or training. Hardware that adds
and does not multiply runs it as it is: a product is sums of inputs, scaled once for each group.

## When it does not
On a CPU reading two planes takes about as long as the bf16 layer for one row and longer for more, while packed 4 bits take a
fifth; so it is refused where the plain weights fit the memory.
At 4 bits and more, plain integers lose less.

## Reference
Xiao et al., PTQTP: Post-Training Quantization to Trit-Planes for Large Language Models, 2025.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Op
from narrows.modules.linears import CODES_ON_CPU, Planes, ReplacesLinears
from narrows.step import Step
from narrows.technique import Card, Claim, Example, Stage, choice

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class PTQTP(ReplacesLinears):
    """Every linear weight but the output layer's as trit-planes with a scale for each group of inputs."""

    card: ClassVar[Card] = Card(
        slug="ptqtp",
        relieves=(Limit.CAPACITY,),
        phases=("decode", "prefill", "forward"),
        exact=False,
        stage=Stage.QUANTIZE,
        touches=("linear weights",),
        blockwise=True,
        price="above three bits a weight for a loss between that of 3-bit and 4-bit integers; no faster than bf16 on a CPU",
        claims=(
            Claim(
                "bits_per_weight", "bits", 3.17, "two planes of 1.58 bits; ours with scales, Llama-2-7B's layers, group 128",
                "abstract", "checked", "five trits a byte are 1.6 bits, two bf16 scales a group 0.25",
                at_least=3.0, at_most=3.5,
            ),
            Claim(
                "error_after_rounds", "ratio", None, "SmolLM2-135M, rotated, group 64: squared error over that before",
                "method: progressive approximation", "run", "NaN, which fails, where a round raises it; without rounds it is 1",
                at_most=0.85,
            ),
            Claim(
                "perplexity_over_ternary", "share", None,
                "SmolLM2-135M, rotated, four blocks, group 64: increase of log-perplexity over one trit-plane's or signs'",
                "abstract: outperforms binary and low-bit methods", "run", "of the better of one trit-plane and two sign planes"
                " fitted alike; the planes themselves move it by 0.05", at_most=0.5,
            ),
        ),
    )  # fmt: skip
    SLOWER = CODES_ON_CPU

    group: int = choice(128, 64, 32, help="inputs that share a scale in each plane")
    planes: int = choice(2, 1, help="planes of trits")
    rounds: int = choice(20, help="turns of scales and trits, fewer where they no longer help")

    def __post_init__(self) -> None:
        if self.group < 2 or not 1 <= self.planes <= 4 or self.rounds < 0:
            problem = f"group={self.group}, planes={self.planes}, rounds={self.rounds}."
            raise NarrowsError(problem, where="ptqtp", remedy="Give a group of 2 or more, 1 to 4 planes and rounds from 0.")

    def baseline(self) -> "PTQTP":
        return replace(self, planes=1, rounds=0)

    @property
    def form(self) -> Planes:
        """How the planes are kept."""
        return Planes(3, self.planes, self.group)

    def unfit(self, name: str, inputs: int, outputs: int) -> str:
        return self.form.unfit(inputs, outputs)

    def parts(self, op: Op) -> Sequence[Op]:
        return (replace(op, weight=self.form.stored),)

    def hollow(self, name: str, linear: "nn.Linear") -> "nn.Module":
        from narrows.modules.planes import PlanesLinear

        return PlanesLinear.like(linear, self.form)

    def apply(self, model: "nn.Module", data: Sequence[Mapping[str, "Tensor"]] = ()) -> "nn.Module":
        from narrows.modules.planes import PlanesLinear

        for name, linear in self.layers(model).items():
            model.set_submodule(name, PlanesLinear.nearest(linear, self.form, self.rounds))
        return model

    @classmethod
    def example(cls) -> Example:
        from narrows import samples

        return Example(*samples.tiny_llama(2, 32), Step.decode(1, context=32))

    @classmethod
    def example_instance(cls) -> "PTQTP":
        return cls(group=32)
