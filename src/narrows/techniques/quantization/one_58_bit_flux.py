"""Keep the weights of a diffusion transformer's blocks as trits, found on nothing but the model's own sampling.

## What it does
Each linear weight of the numbered blocks becomes -1, 0 or 1 times a scale that a group of inputs shares; embeddings and the
last layer stay. Trits and scales are found by turns, each going to where the layer's outputs change least for inputs that
the model meets when it turns noise into images: no image, caption or training set enters. Five trits take a byte.

`narrows.modules.trit_descent` has the search, `narrows.modules.flow_sampling` makes the data.

## When it helps
A model that does not fit its memory: a ninth of the blocks' bytes.

## When it does not
Sampling multiplies many rows by each weight, where a dense product in bf16 is faster: it is refused where the plain weights
fit the memory. Squared velocities of the small model of the claims are one to three percent off; at 4 bits,
`svdquant-nunchaku` loses less and runs on the hardware's own units.

## Reference
Yang et al., 1.58-bit FLUX, 2024, arXiv 2412.18653. It says what supervises and not how the trits are found: that is ours.
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

_TINY = "FLUX's architecture with 310,000 parameters, trained on digits, group 64: "


@dataclass(frozen=True)
class TernaryFlux(ReplacesLinears):
    """Trits with scales for every linear weight of numbered blocks."""

    card: ClassVar[Card] = Card(
        slug="1-58-bit-flux",
        relieves=(Limit.CAPACITY,),
        phases=("forward", "prefill", "decode"),
        exact=False,
        stage=Stage.QUANTIZE,
        touches=("linear weights",),
        needs=("calibration",),
        price="velocities a few percent off; many rows are multiplied more slowly than in bf16",
        claims=(
            Claim(
                "error_over_rounding", "ratio", None, _TINY + "squared error of the velocities on noise and labels that were not "
                "seen, over that with nearest trits", "abstract: self-supervision from the model", "run", "1 for nearest trits "
                "with the best scales", at_most=0.2,
            ),
            Claim(
                "samples_over_rounding", "ratio", None, _TINY + "squared distance of 64 images from those of the plain model "
                "from the same noise, over that with nearest trits", "abstract: comparable performance", "run", "errors add up "
                "over 8 steps", at_most=0.2,
            ),
            Claim(
                "storage", "x less", 7.7, "FLUX.1-dev's transformer, against bf16",
                "abstract", "checked", "counts only where error_over_rounding is at most 0.2; the paper keeps 2 bits a "
                "weight, these are 1.6 and a scale", at_least=7.7, at_most=10.0,
            ),
        ),
    )  # fmt: skip
    SLOWER = CODES_ON_CPU

    group: int = choice(128, 64, 32, help="inputs that share a scale")
    rounds: int = choice(6, 3, 12, help="of trits and scales; 0: the nearest trits, without data")

    def __post_init__(self) -> None:
        if self.group < 2 or self.rounds < 0:
            problem = f"group={self.group}, rounds={self.rounds}."
            raise NarrowsError(problem, where=self.card.slug, remedy="Give a group of 2 or more and rounds from 0.")

    def baseline(self) -> "TernaryFlux":
        return replace(self, rounds=0)

    @property
    def form(self) -> Planes:
        """How weights are kept."""
        return Planes(3, 1, self.group)

    def unfit(self, name: str, inputs: int, outputs: int) -> str:
        return self.form.unfit(inputs, outputs) if _in_block(name) else ""

    def _fits(self, op: Op) -> bool:
        return super()._fits(op) and _in_block(op.name)

    def parts(self, op: Op) -> Sequence[Op]:
        return (replace(op, weight=self.form.stored),)

    def layers(self, model: "nn.Module") -> "dict[str, nn.Linear]":
        found = {name: layer for name, layer in super().layers(model).items() if _in_block(name)}
        if not found:
            remedy = "Use a technique for every linear layer, like ptqtp."
            raise NarrowsError("no linear layer is in a numbered block.", where=self.card.slug, remedy=remedy)
        return found

    def hollow(self, name: str, linear: "nn.Linear") -> "nn.Module":
        from narrows.modules.planes import PlanesLinear

        return PlanesLinear.like(linear, self.form)

    def apply(self, model: "nn.Module", data: Sequence[Mapping[str, "Tensor"]]) -> "nn.Module":
        from narrows.modules.calibration import require_data
        from narrows.modules.compensated import moments
        from narrows.modules.planes import PlanesLinear
        from narrows.modules.trit_descent import descended

        layers = self.layers(model)
        if not self.rounds:
            found = {name: PlanesLinear.nearest(layer, self.form) for name, layer in layers.items()}
        else:
            require_data(data, "fitting trits needs", self.card.slug)
            found = {}
            for name, gram in moments(model, layers, data):
                layer = layers[name]
                best = descended(layer.weight, gram, self.form, self.rounds)
                found[name] = PlanesLinear.of(best.planes, best.scale, self.form, layer.bias, layer.weight.dtype)
        for name, replaced in found.items():
            model.set_submodule(name, replaced)
        return model

    @classmethod
    def example(cls) -> Example:
        from narrows import samples

        return Example(*samples.tiny_llama(2, 32), Step.forward(1, 32))

    @classmethod
    def example_instance(cls) -> "TernaryFlux":
        return cls(group=32)


def _in_block(name: str) -> bool:
    return any(part.isdecimal() or part == "*" for part in name.split("."))
