"""Keep each weight as an index into a codebook of a few numbers that similar neurons share, learned on the outputs' error.

Neurons (outputs) are sorted by how widely their weights spread and cut into groups; each group gets codewords of its own by
k-means. Codebooks and indices are then learned together on calibration data: gradients of the outputs' error pass straight
through to a latent value behind each weight, an index may move to the next codeword only, and moves less the farther it is.

## What it does
Puts 2 to 4 bits an index, a codebook a group and 2 bytes of place a neuron in the place of linear weights.

## When it helps
Where the model must fit: a 7B is 2 GB. Below 4 bits codewords that lie where the weights are lose far less than even steps.

## When it does not
Speed: packed 4-bit integers are read faster, and with many rows codewords are looked up before the product. The
order is kept as 2 bytes a neuron instead of being moved into the neighbouring layers, which a residual stream does not allow:
0.03 bits a weight at 576 inputs. At 2 bits a 135M model is damaged badly whatever learns its codebooks; 3 and 4 bits are
usable.

## Reference
Yvinec, Dapogny, Bailly: Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings, ICLR 2024,
arXiv 2309.17361. Here each layer is learned by itself, by gradient descent at the pace of its inputs' second moments.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from narrows import samples
from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import DType, Op
from narrows.modules.linears import CODES_ON_CPU, ReplacesLinears
from narrows.step import Step
from narrows.technique import Card, Claim, Example, Stage, choice

if TYPE_CHECKING:
    from torch import Tensor, nn

    from narrows.modules.codebook_linear import Codebooks

SAMPLES = 2048  # rows of a layer's input that learning sees
DAMPING = 0.01  # of the mean second moment: keeps directions that inputs never took from drifting


@dataclass(frozen=True)
class JLCM(ReplacesLinears):
    """Every linear layer but the output layer as indices into the codebooks of its groups of neurons."""

    SLOWER = CODES_ON_CPU
    card: ClassVar[Card] = Card(
        slug="jlcm",
        relieves=(Limit.CAPACITY,),
        phases=("prefill", "decode", "forward"),
        exact=False,
        stage=Stage.QUANTIZE,
        touches=("linear weights",),
        needs=("calibration",),
        price="quality falls with the bits; codewords are looked up for every product",
        claims=(
            Claim(
                "output_error_over_kmeans", "ratio", None, "2 bits, block 12 of SmolLM2-135M, rotated, held-out inputs", "method",
                "run", "the square error is that of one k-means codebook a layer without groups and learning", at_most=0.7,
            ),
            Claim(
                "loss_over_kmeans", "ratio", None, "nats added by 2 bits in two blocks of SmolLM2-135M, rotated", "method", "run",
                "the damage follows the outputs' error, less what later blocks make of it", at_most=0.7,
            ),
            Claim(
                "gigabytes_of_7b", "GB", 2.0, "Llama-2-7B, fp16 embeddings and head, codebooks included", "abstract", "checked",
                "2 Go; at the fewest bits that lose a fifth of the outputs' energy, which one k-means codebook needs 3 for",
                at_most=2.2,
            ),
        ),
    )  # fmt: skip

    bits: int = choice(2, 3, 4, help="bits of an index: 2 ** bits codewords")
    rows: int = choice(32, 64, help="neurons of a group, which share a codebook")
    steps: int = choice(30, help="of learning; 0: k-means alone")
    grouped: bool = choice(True, help="without it one codebook serves a layer, copied to every group")

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 4 or self.rows < 1 or 2**self.bits * 16 % self.rows or self.steps < 0:
            problem = f"bits={self.bits}, rows={self.rows}, steps={self.steps}."
            raise NarrowsError(problem, where="jlcm", remedy="Give 2 to 4 bits, 32 or 64 rows, and 0 or more steps.")

    def baseline(self) -> "JLCM":
        return replace(self, steps=0, grouped=False)

    @property
    def form(self) -> DType:
        """Indices, and for each neuron its place and its share of the codebook."""
        return DType(f"codebook{self.bits}", self.bits, 0, scale_bits=16 + 16 * 2**self.bits // self.rows)

    def unfit(self, name: str, inputs: int, outputs: int) -> str:
        if outputs % self.rows or inputs % 8 or outputs >= 2**15:
            return f"{outputs} outputs of {inputs} inputs do not pack in groups of rows={self.rows}"
        return ""

    def parts(self, op: Op) -> Sequence[Op]:
        return (replace(op, weight=self.form),)

    def hollow(self, name: str, linear: "nn.Linear") -> "nn.Module":
        from narrows.modules.codebook_linear import CodebookLinear

        made = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        return CodebookLinear(linear.in_features, linear.out_features, self.form, self.rows, linear.bias is not None, **made)

    def apply(self, model: "nn.Module", data: Sequence[Mapping[str, "Tensor"]]) -> "nn.Module":
        from narrows.modules.calibration import observed, require_data
        from narrows.modules.codebook_linear import CodebookLinear

        layers = self.layers(model)
        if self.steps:
            require_data(data, "learning needs", "jlcm")
        for names in _blocks(layers):  # block by block: the inputs of all layers at once would be larger than the model
            inputs = observed(model, {name: layers[name] for name in names}, data, SAMPLES) if self.steps else {}
            for name in names:
                found = self.codebooks(layers[name].weight, inputs.get(name))
                model.set_submodule(name, CodebookLinear.of(found, self.form, layers[name].bias))
        return model

    def codebooks(self, weight: "Tensor", x: "Tensor | None" = None) -> "Codebooks":
        """The codebooks and indices of a weight [N, K], learned for inputs like x [T, K] where those are given."""
        from narrows.modules.codebook_linear import clustered, learned

        found = clustered(weight, self.bits, self.rows if self.grouped else 0)
        if x is not None and self.steps:
            moments = x.T @ x / len(x)
            moments.diagonal().add_(DAMPING * moments.diagonal().mean() + 1e-12)
            found = learned(found, weight, moments, self.steps)
        copies = weight.shape[0] // self.rows // len(found.books)
        return replace(found, books=found.books.repeat_interleave(copies, 0))

    @classmethod
    def example(cls) -> Example:
        return Example(*samples.tiny_llama(2, 16), Step.decode(1, context=16))

    @classmethod
    def example_instance(cls) -> "JLCM":
        return cls(rows=16)


def _blocks(names: Mapping[str, object]) -> list[list[str]]:
    """The names by the block that they are in: all before the last number of their path."""
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        last = max((i for i, part in enumerate(parts) if part.isdecimal()), default=-1)
        found.setdefault(".".join(parts[: last + 1]), []).append(name)
    return list(found.values())
