"""Keep each linear weight as a sum of binary planes whose scales are powers of two: products become shifts and additions.

A plane is {-1, 1} times a scale that a group of outputs of one input shares, and a scale is a sum of one or two signed powers
of two. So inputs are shifted by exponents, every eight of them make a table of their 256 signed sums, and the planes' bytes
look the sums up. Planes and scales are found by turns; what a block of inputs then misses in the outputs is made up for in
the weights of the inputs after it, as in GPTQ (the second objective: the error of the activations).

## When it helps
A model that does not fit its memory fits in a quarter of it or less, without retraining. Hardware without multipliers
runs it: additions and look-ups take a fraction of the energy of multiplications.

## When it does not
On a CPU three planes take a little longer than the bf16 layer, as multiplications are free there; so it is refused where the
plain weights fit the memory. All layers get the same number of planes: the paper's search for how many each layer needs is
not done.

## Reference
You et al., ShiftAddLLM: Accelerating Pretrained LLMs via Post-Training Multiplication-Less Reparameterization, NeurIPS 2024.
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

SAMPLES = 512  # tokens of each layer's input that are looked at
BLOCK = 32  # inputs that are found together, before the rest makes up for them
DAMPING = 0.01  # of the mean second moment: keeps directions that no sample took


@dataclass(frozen=True)
class ShiftAddLLM(ReplacesLinears):
    """Every linear weight but the output layer's as binary planes with power-of-two scales by input."""

    card: ClassVar[Card] = Card(
        slug="shiftaddllm",
        relieves=(Limit.CAPACITY, Limit.ENERGY),
        phases=("decode", "prefill", "forward"),
        exact=False,
        stage=Stage.QUANTIZE,
        touches=("linear weights",),
        blockwise=True,
        needs=("calibration",),
        price="rounding to 2 to 4 bits, made up for on calibration data; no faster than bf16 on a CPU",
        claims=(
            Claim(
                "shift_and_add_error", "relative", 0.0, "a layer of SmolLM2-135M, rotated, 16-bit whole inputs",
                "section 4.1: shifts, then queries and adds", "checked", "integers alone against a product in 64-bit floats;"
                " NaN where scales are no powers of two", at_most=1e-12,
            ),
            Claim(
                "perplexity_over_rounding", "share", None,
                "SmolLM2-135M, rotated, four blocks: increase of log-perplexity at 3.75 bits over rounding's at 4",
                "table 3: 5.6 points better at 3 bits", "run", "rounding: 3 bits, groups of 32 with scale and zero; other"
                " text moves it by 0.05", at_most=0.8,
            ),
            Claim(
                "arithmetic_energy_saved", "share", 0.8, "a decode step of Llama-2-7B's layers over fp16, arithmetic alone",
                "abstract: more than 80 %, with memory, at 2 to 3 bits", "checked", "pJ: multiplication 1.1, addition 0.4,"
                " look-up 0.37, shift 0.15; a table for each group and plane costs as much as its look-ups", at_least=0.5,
            ),
        ),
    )  # fmt: skip
    SLOWER = CODES_ON_CPU

    bits: int = choice(3, 2, 4, help="binary planes")
    group: int = choice(128, 64, 32, help="outputs that share the scale of an input in each plane")
    powers: int = choice(2, 1, help="powers of two that add up to a scale; 0: any bf16 number")
    rounds: int = choice(20, help="turns of scales and planes, fewer where they no longer help; 0: rounding to even levels")

    def __post_init__(self) -> None:
        if self.group < 2 or not 1 <= self.bits <= 4 or not 0 <= self.powers <= 3 or self.rounds < 0:
            problem = f"bits={self.bits}, group={self.group}, powers={self.powers}, rounds={self.rounds}."
            remedy = "Give 1 to 4 bits, a group of 2 or more, 0 to 3 powers and rounds from 0."
            raise NarrowsError(problem, where="shiftaddllm", remedy=remedy)

    def baseline(self) -> "ShiftAddLLM":
        return replace(self, powers=0, rounds=0)

    @property
    def form(self) -> Planes:
        """How the planes are kept."""
        return Planes(2, self.bits, self.group, self.powers, by="outputs")

    def unfit(self, name: str, inputs: int, outputs: int) -> str:
        return self.form.unfit(inputs, outputs)

    def parts(self, op: Op) -> Sequence[Op]:
        return (replace(op, weight=self.form.stored),)

    def hollow(self, name: str, linear: "nn.Linear") -> "nn.Module":
        from narrows.modules.planes import PlanesLinear

        return PlanesLinear.like(linear, self.form)

    def apply(self, model: "nn.Module", data: Sequence[Mapping[str, "Tensor"]]) -> "nn.Module":
        return self.calibrated(model, data, SAMPLES, "the error of the activations needs", self.planes)

    def planes(self, linear: "nn.Linear", x: "Tensor | None") -> "nn.Module":
        """The layer in planes, for inputs like x [T, K]; None for a layer that no data reached."""
        import torch

        from narrows.modules.planes import PlanesLinear, fit

        outputs, inputs = linear.weight.shape
        left = linear.weight.detach().float().clone()
        moments = torch.eye(inputs) if x is None else x.T @ x / len(x)
        moments.diagonal().add_(DAMPING * moments.diagonal().mean() + 1e-12)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
        upper = torch.linalg.cholesky(inverse, upper=True)
        planes, scales = [], []
        for first in range(0, inputs, BLOCK):
            last = min(first + BLOCK, inputs)
            block = left[:, first:last]
            found = fit(block.T.reshape(-1, self.group), self.form, self.rounds, uniform=not self.rounds)
            plane = found.planes.view(self.bits, last - first, outputs)
            planes.append(plane)
            scales.append(found.scale.view(self.bits, last - first, -1))
            if self.rounds and last < inputs:
                spread = scales[-1].repeat_interleave(self.group, -1)
                missed = block - (plane * spread).sum(0).T
                error = torch.linalg.solve_triangular(upper[first:last, first:last], missed, upper=True, left=False)
                left[:, last:] -= error @ upper[first:last, last:]
        whole = torch.cat(planes, 1).transpose(1, 2)
        return PlanesLinear.of(whole, torch.cat(scales, 1).transpose(1, 2), self.form, linear.bias, linear.weight.dtype)

    @classmethod
    def example(cls) -> Example:
        from narrows import samples

        return Example(*samples.tiny_llama(2, 32), Step.decode(1, context=32))

    @classmethod
    def example_instance(cls) -> "ShiftAddLLM":
        return cls(group=16)
