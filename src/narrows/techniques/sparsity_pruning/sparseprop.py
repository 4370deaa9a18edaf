"""Train with unstructured sparse weights on CPUs: only nonzeros are kept, multiplied, and given gradients.

## What it does
Each linear layer keeps its largest weights as compressed sparse rows. Forward, a weight multiplies a register full of
rows at a time. Backward, one pass over the nonzeros gives the gradient of the inputs and that of the weights, at the
nonzeros alone. Which weights are zero stays fixed: tune a pruned network, or train a sparse one. A network that is
pruned at least this far already keeps its function; otherwise the smallest weights of each layer are dropped.

`narrows.modules.sparse_linear.SparseLinear` is the layer, with a C kernel that is compiled for this CPU on first use.

## When it helps
fp32 training on a CPU, from about 90 % zeros on, and inference on many rows.

## When it does not
Below 80 % zeros (70 % without a backward pass) dense products are as fast. Few rows (decoding) do not fill registers.
On a CPU with matrix units for bf16, dense bf16 trains over twice as fast as fp32 with 90 % zeros. Convolutions stay
dense. GPUs, and CPUs without a C compiler, have no kernel.

## Reference
Nikdan, Pegolotti, Iofinova, Kurtic, Alistarh. SparseProp: Efficient Sparse Backpropagation for Faster Training of Neural
Networks. ICML 2023.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.modules.nonzeros import KeepsNonzeros
from narrows.step import Step
from narrows.technique import Card, Claim, Example, Stage, choice


@dataclass(frozen=True)
class SparseProp(KeepsNonzeros):
    """Linear layers that keep, multiply and train their largest weights alone."""

    card: ClassVar[Card] = Card(
        slug="sparseprop",
        relieves=(Limit.COMPUTE, Limit.BANDWIDTH, Limit.CAPACITY),
        phases=("train", "prefill", "forward"),
        exact=False,
        stage=Stage.FACTOR,
        touches=("linear weights",),
        price="dropping weights costs quality unless the network is pruned already; tune afterwards",
        claims=(
            Claim(
                "gradient_error", "relative", None, "90 % zeros, layers of MiniLM; against masked dense autograd",
                "abstract: a version of backpropagation", "checked",
                "same sums in another order; fp32 rounding over at most 1536 inputs and 200 rows", at_most=1e-4,
            ),
            Claim(
                "step_speed", "x", None, "90 % zeros, forward and backward, two layers of MiniLM, 8 x 64 tokens, one thread",
                "abstract: speed-ups end to end", "run",
                "a direction; attention and norms stay dense, and the median of interleaved pairs is steady to 5 %",
                at_least=1.3,
            ),
            Claim(
                "time_by_density", "x", None, "a layer of 768 x 3072, 512 rows: 90 % over 98 % zeros, forward and backward",
                "method: linear in the density", "run",
                "5 if nothing but the nonzeros cost time; what is paid for each row and tile leaves over half", at_least=2.5,
            ),
            Claim(
                "same_training", "relative", None, "90 % zeros, 60 steps of SGD on text; against a masked dense network",
                "abstract: training from scratch", "run",
                "the same arithmetic, so that only rounding, grown over the steps, parts the losses", at_most=1e-3,
            ),
        ),
    )  # fmt: skip

    sparsity: float = choice(0.9, 0.95, 0.8, 0.98, help="share of a layer's weights that are zero; 0 leaves it dense")

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise NarrowsError(f"sparsity={self.sparsity}.", where="sparseprop", remedy="Give a share from 0 to below 1.")

    def baseline(self) -> "SparseProp":
        return replace(self, sparsity=0.0)

    @property
    def option(self) -> str:
        return f"sparsity={self.sparsity:g}"

    def nonzeros(self, inputs: int, outputs: int) -> int:
        return max(1, round((1 - self.sparsity) * inputs * outputs)) if self.sparsity else 0

    @classmethod
    def example(cls) -> Example:
        import torch
        from torch import nn

        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(50, 100), nn.Linear(100, 256), nn.GELU(), nn.Linear(256, 30, bias=False))
        return Example(model.eval(), [{"input": torch.randint(50, (2, 64))}], Step.forward(2, 64))
