"""Run linear layers in 4-bit weights and 4-bit inputs, with a low-rank branch of plain numbers for what outliers would cost.

Inputs with large numbers are divided by a factor that the weights are multiplied by, which moves the outliers into the
weights. Their leading singular components become a branch of 16-bit numbers; only the rest is rounded to 4 bits.

## When it helps
Diffusion transformers and other large batches are bound by arithmetic, which 4-bit units do four times as fast as bf16:
weights alone in 4 bits would not help them. Memory falls to under a third.

## When it does not
The arithmetic needs 4-bit matrix units and kernels that fuse the branch with them; here is the reference, which rounds and
then multiplies plain numbers, slower than the plain layer. So it is refused where the plain weights fit the memory.
Unfused, the branch reads and writes every activation again: `unfused_overhead` says what that costs.

## Reference
Li et al., SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models, ICLR 2025.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import DType, Op
from narrows.modules.linears import CODES_ON_CPU, ReplacesLinears, branched
from narrows.step import Step
from narrows.technique import Card, Claim, Example, Stage, choice

if TYPE_CHECKING:
    from torch import Tensor, nn

SAMPLES = 256  # tokens of each layer's input that are looked at
STRENGTHS = (0.0, 0.25, 0.5, 0.75)  # how much of the inputs' range moves into the weights; the best for the outputs is kept


@dataclass(frozen=True)
class SVDQuant(ReplacesLinears):
    """Every linear layer but the output layer in 4-bit weights and inputs, beside a low-rank branch."""

    card: ClassVar[Card] = Card(
        slug="svdquant-nunchaku",
        relieves=(Limit.CAPACITY, Limit.COMPUTE),
        phases=("prefill", "forward"),
        exact=False,
        stage=Stage.QUANTIZE,
        touches=("linear weights",),
        blockwise=True,
        needs=("calibration",),
        price="rounding to 4 bits on both sides; a rank of 32 costs a third of a bit a weight in layers 3072 wide",
        claims=(
            Claim(
                "memory", "x", 3.5, "FLUX.1-dev's transformer of 12 billion parameters, bf16, rank 32, group 64", "abstract",
                "checked", "within a tenth below; without the branch it is 3.76, which fails", at_least=3.15, at_most=3.65,
            ),
            Claim(
                "error_over_smoothing", "ratio", None, "all-MiniLM-L6-v2, fp32: error of each layer's outputs on held-out text",
                "figure 4: smoothing, then low rank", "run", "median over the layers, over the same smoothing search without a"
                " branch", at_most=0.75,
            ),
            Claim(
                "unfused_overhead", "share", 0.57, "rank 32 on FLUX.1-dev, 1024 x 1024, RTX 4090; roofline", "figure 6: latency"
                " of a branch in kernels of its own", "checked", "a roofline counts traffic and arithmetic, no launches; 0"
                " without a branch", at_least=0.35, at_most=0.9,
            ),
        ),
    )  # fmt: skip
    SLOWER = CODES_ON_CPU

    rank: int = choice(32, 16, 64, help="of the branch; 0: smoothing and rounding alone")
    group: int = choice(64, 32, 128, help="inputs that share a scale, of a token and of an output")

    def __post_init__(self) -> None:
        if self.group < 2 or self.rank < 0:
            problem = f"rank={self.rank}, group={self.group}."
            raise NarrowsError(problem, where="svdquant-nunchaku", remedy="Give a rank from 0 and a group of 2 or more.")

    def baseline(self) -> "SVDQuant":
        return replace(self, rank=0)

    def unfit(self, name: str, inputs: int, outputs: int) -> str:
        if inputs % self.group or inputs % 2:
            return f"{inputs} inputs are no multiple of group={self.group}"
        return "" if self.rank < min(inputs, outputs) else f"{inputs} x {outputs} has no more than rank={self.rank}"

    def parts(self, op: Op) -> Sequence[Op]:
        stored = DType("int4", 4, self.group, scale_bits=16)
        return branched(op, replace(op, weight=stored, compute="int4"), self.rank)

    def hollow(self, name: str, linear: "nn.Linear") -> "nn.Module":
        from narrows.modules.branch import BranchedLinear, RoundedLinear

        base = RoundedLinear.like(linear, self.group)
        sizes = (linear.in_features, linear.out_features, self.rank)
        return BranchedLinear(base, *sizes, linear.weight) if self.rank else base

    def apply(self, model: "nn.Module", data: Sequence[Mapping[str, "Tensor"]]) -> "nn.Module":
        return self.calibrated(model, data, SAMPLES, "the search for what to smooth needs", self.replaced)

    def replaced(self, linear: "nn.Linear", x: "Tensor | None") -> "nn.Module":
        """The layer whose outputs for inputs x [T, K] change least; without inputs nothing is smoothed."""
        import torch

        weight = linear.weight.detach().float()
        if x is None:
            return self._smoothed(linear, torch.ones(weight.shape[1]))
        wide, steep = x.abs().amax(0).clamp(min=1e-5), weight.abs().amax(0).clamp(min=1e-5)
        best, least = None, float("inf")
        with torch.no_grad():
            wanted = torch.nn.functional.linear(x.to(linear.weight.dtype), linear.weight, linear.bias).float()
            for strength in STRENGTHS:
                factor = wide**strength / steep ** (1 - strength) if strength else torch.ones_like(wide)
                candidate = self._smoothed(linear, factor / (factor.max() * factor.min()).sqrt())
                error = float((candidate(x.to(linear.weight.dtype)).float() - wanted).square().sum())
                if error < least:
                    best, least = candidate, error
        if best is None:
            raise NarrowsError("outputs are NaN or infinite.", where="svdquant-nunchaku", remedy="Check the calibration data.")
        return best

    def _smoothed(self, linear: "nn.Linear", factor: "Tensor") -> "nn.Module":
        """The layer whose inputs are divided by `factor` [K] before they are rounded."""
        import torch

        from narrows.modules.branch import BranchedLinear, RoundedLinear
        from narrows.modules.low_rank import svd

        smooth = (1 / factor).bfloat16().float()
        left = linear.weight.detach().float() / smooth
        if not self.rank:
            return RoundedLinear.of(left, linear.bias, smooth, self.group)
        up, down = (half.to(linear.weight.dtype).float() for half in svd(left, self.rank))
        base = RoundedLinear.of(left - up @ down, linear.bias, smooth, self.group)
        layer = BranchedLinear(base, linear.in_features, linear.out_features, self.rank, linear.weight)
        with torch.no_grad():
            layer.up.weight.copy_(up)
            layer.down.weight.copy_(down * smooth)
        return layer

    @classmethod
    def example(cls) -> Example:
        from narrows import samples

        return Example(*samples.tiny_llama(2, 32), Step.prefill(1, 32))

    @classmethod
    def example_instance(cls) -> "SVDQuant":
        return cls(rank=4, group=32)
