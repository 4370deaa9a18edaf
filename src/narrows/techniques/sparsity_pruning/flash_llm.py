"""Load weights sparse and compute with them dense: decoding reads the nonzeros alone, matrix units multiply whole tiles.

## What it does
Each linear layer keeps its largest weights as tiled CSL: 32 bits for each, a bf16 number and its place in a tile of 128 x 64.
A kernel expands one tile in on-chip memory while another is multiplied. The multiplications by zero are not saved, since a
few rows leave matrix units idle anyway. A network that was pruned and tuned to this sparsity keeps its function.

`narrows.modules.csl_linear` has the layout and the plain product.

## When it helps
Decoding of few sequences on GPUs, with unstructured sparsity of 70 to 90 %: fewer bytes per step, and fewer devices to hold
the model.

## When it does not
Many rows: arithmetic bounds the product, and it is not reduced. CPUs, where tiles are expanded in memory. There is no GPU
kernel here: the gain that is predicted is that of the authors' kernel, taken to reach the share of the bandwidth that 4-bit
kernels do. At 90 % that is too much: work for each tile, sparse or not, then takes most of its time. Pruning a model that
was not tuned for it destroys it.

## Reference
Xia et al. Flash-LLM: Enabling Cost-Effective and Highly-Efficient Large Generative Model Inference with Unstructured
Sparsity. VLDB 2024, arXiv 2309.10285.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from narrows import samples
from narrows.cost import Limit
from narrows.costmodel import op_seconds
from narrows.errors import NarrowsError
from narrows.graph import Graph, Op
from narrows.machine import Machine
from narrows.modules.linears import ReplacesLinears, csl
from narrows.step import Step
from narrows.technique import Card, Claim, Example, Stage, choice

if TYPE_CHECKING:
    from torch import Tensor, nn

LEAST_GAIN = 1.05  # of the layers' time, below which it is not worth the weights that are lost


@dataclass(frozen=True)
class FlashLLM(ReplacesLinears):
    """Linear layers whose largest weights are kept in tiles that are expanded for a dense product."""

    card: ClassVar[Card] = Card(
        slug="flash-llm",
        relieves=(Limit.BANDWIDTH, Limit.CAPACITY),
        phases=("decode",),
        exact=False,
        stage=Stage.QUANTIZE,
        touches=("linear weights",),
        blockwise=True,
        price="dropping weights costs quality unless the model is pruned already and was tuned since",
        claims=(
            Claim(
                "expansion_error", "relative", None, "80 % zeros, a layer of MiniLM; against masked dense",
                "abstract: load as sparse, compute as dense", "checked", "infinite unless the weights are the masked ones bit "
                "by bit; the same sums in another order over at most 1,536 inputs", at_most=1e-5,
            ),
            Claim(
                "bytes_saved", "x", None, "the same layer, bf16; the lesser of resident and file bytes", "abstract", "checked",
                "2.5, as 6.4 bits a weight are stored for 16, less 4 bytes a tile and a file's header", at_least=2.45,
            ),
            Claim(
                "kernel_speed", "x", 1.7, "80 % zeros, A100, layers of OPT-66B, 8 to 32 rows; against dense fp16",
                "results in the authors' repository", "simulated", "within 20 %", at_least=1.36, at_most=2.04,
            ),
            Claim(
                "tokens_per_gpu_second", "x", 3.6, "80 % zeros, OPT-66B and 175B, 8 to 64 sequences on as few A100 80GB as hold "
                "them; over dense fp16; the best", "abstract: up to, over FasterTransformer, best of three", "simulated",
                "over half of it: our dense step is as fast as its kernels, without what FasterTransformer adds", at_least=1.8,
                at_most=3.6,
            ),
        ),
    )  # fmt: skip

    SLOWER = "expanding tiles for one row takes a CPU 15 to 40 times as long as the product in bf16"

    sparsity: float = choice(0.8, 0.7, 0.9, help="share of a layer's weights that are zero; 0 leaves it dense")

    def __post_init__(self) -> None:
        if self.sparsity and not 0.5 < self.sparsity < 1:
            remedy = "Give 0, or a share above 0.5 and below 1: half of the weights take as many bytes as all."
            raise NarrowsError(f"sparsity={self.sparsity}.", where="flash-llm", remedy=remedy)

    def baseline(self) -> "FlashLLM":
        return replace(self, sparsity=0.0)

    def nonzeros(self, inputs: int, outputs: int) -> int:
        """How many weights a layer of this size keeps."""
        return max(1, round((1 - self.sparsity) * inputs * outputs))

    def unfit(self, name: str, inputs: int, outputs: int) -> str:
        many = self.nonzeros(inputs, outputs)
        if many >= 2**31:
            return f"{many} nonzeros are more than 32 bits count"
        bits = csl(inputs, outputs, many).bits
        return f"its {inputs} x {outputs} weights would take {bits:.3g} bits each" if self.sparsity and bits >= 16 else ""

    def unpaid(self, machine: Machine | None, graph: Graph, ops: Sequence[Op], step: Step) -> str:
        if machine is None:
            return ""
        if machine.kind != "gpu":
            return f"its kernel is for GPUs, and {machine.name} is a {machine.kind}; {self.SLOWER}"
        if any(op.act.bits != 16 for op in ops):
            return f"its numbers are {ops[0].act.name}; the kernel is for 16 bits"
        changed = [part for op in ops for part in self.parts(op)]
        before, after = (sum(op_seconds(op, step, machine) for op in each) for each in (ops, changed))
        gain = float(np.min(before / after))
        if gain < LEAST_GAIN:
            return f"its linear layers would be {gain:.3g} times as fast: reading weights is not what holds them back"
        return ""

    def parts(self, op: Op) -> Sequence[Op]:
        if not self.sparsity:
            return (op,)
        inputs, outputs = int(op["inputs"]), int(op["outputs"])  # type: ignore[arg-type]
        return (replace(op, weight=csl(inputs, outputs, self.nonzeros(inputs, outputs))),)

    def hollow(self, name: str, linear: "nn.Linear") -> "nn.Module":
        from narrows.modules.csl_linear import CSLLinear

        return CSLLinear.like(linear, self.nonzeros(linear.in_features, linear.out_features))

    def layers(self, model: "nn.Module") -> "dict[str, nn.Linear]":
        found = super().layers(model)
        return found if self.sparsity else {}

    def apply(self, model: "nn.Module", data: "Sequence[Mapping[str, Tensor]]" = ()) -> "nn.Module":
        from narrows.modules.csl_linear import CSLLinear

        for name, linear in self.layers(model).items():
            model.set_submodule(name, CSLLinear.of(linear, self.nonzeros(linear.in_features, linear.out_features)))
        return model

    @classmethod
    def example(cls) -> Example:
        return Example(*samples.tiny_llama(2, 16), Step.decode(1, context=16))
