"""Sparse layers at moderate sparsity: of each few weights one or two stay, in grouped patterns that a kernel runs fast.

## What it does
STen takes sparsity apart into a sparsifier (which weights stay), a layout (how they are kept) and operators (what multiplies
them, forward and backward), each replaceable. Here these are `sparsify`, `GroupedLinear` and its kernel; and the layout is
the paper's grouped n:m. Of each m outputs an input keeps weights for n. Inputs are sorted into groups of one pattern each,
so that the code for a pattern knows which sums it adds to: there is an index for an input, not one for each weight.

`narrows.modules.grouped_linear` has the three; the kernel is C, compiled for this CPU on first use.

## When it helps
Inference of fp32 encoders on a CPU: with 1:4 their layers are up to one and a half times as fast as dense, with 1:8 over
twice; 2:4 gains up to a third on many rows, nothing on a hundred. Compressed rows of half the weights are slower than dense.
It can be trained: gradients are those of the kept weights.

## When it does not
Its backward pass is dense. Few rows (decoding) do not fill registers. On a CPU with matrix units for bf16, dense bf16 is
faster than each of these. Widths must be multiples of the blocks and chunks. Some GPUs have 2:4 units, which take another
layout: this kernel does not run there, and the refusal says how much such units could give. Untuned, 2:4 costs far more
quality than 4 bits: MiniLM's sentence vectors keep a cosine of 0.63 with what they were.

## Reference
Ivanov, Dryden, Ben-Nun, Ashkboos, Hoefler. STen: Productive and Efficient Sparsity in PyTorch, arXiv 2304.07613 (2023).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from narrows.cost import Limit
from narrows.diagnose import seconds
from narrows.errors import NarrowsError
from narrows.graph import DType, Graph, Op
from narrows.machine import Machine
from narrows.modules.grouping import COMPILED, Grouping
from narrows.modules.nonzeros import KeepsNonzeros
from narrows.step import Step
from narrows.technique import Card, Claim, Example, Stage, choice

if TYPE_CHECKING:
    from torch import nn

FORMS = tuple(f"{n}:{m}" for n, m in COMPILED)


@dataclass(frozen=True)
class STen(KeepsNonzeros):
    """Linear layers of grouped n:m weights."""

    LEAST: ClassVar[Mapping[str, float]] = {"prefill": 0.5, "forward": 0.5}

    card: ClassVar[Card] = Card(
        slug="sten",
        relieves=(Limit.COMPUTE, Limit.BANDWIDTH, Limit.CAPACITY),
        phases=("prefill", "forward"),
        exact=False,
        stage=Stage.FACTOR,
        touches=("linear weights",),
        price="half of the weights gone costs quality until the network is tuned with them gone",
        claims=(
            Claim(
                "product_error", "relative", None, "a layer of MiniLM, each n:m, forward and backward; against masked dense",
                "abstract: operators", "checked", "the same sums in another order, over at most 1,536 inputs and 200 rows",
                at_most=1e-4,
            ),
            Claim(
                "layer_speed", "x", None, "1:4, MLP of a MiniLM layer, 512 rows, one thread; against dense fp32",
                "abstract: high-performance CPU inference at moderate sparsity", "run",
                "a direction; the median of interleaved pairs varies by a tenth on a busy machine", at_least=1.3,
            ),
            Claim(
                "over_compressed_rows", "x", None, "the same layers, half of the weights as compressed rows over 2:4",
                "abstract", "run", "the layout is what makes moderate sparsity pay: such rows take longer than dense layers",
                at_least=1.3,
            ),
            Claim(
                "energy_kept", "of n:m", None, "magnitude that grouping keeps of these layers, over that of free 1:4",
                "method", "checked", "groups take some inputs' choice away, but for few of the largest weights",
                at_least=0.93, at_most=1.0,
            ),
        ),
    )  # fmt: skip

    form: str = choice(*FORMS, help="n:m, weights that stay of each m; none leaves the layers dense")
    g: int = choice(16, 8, 32, help="inputs of each pattern in a chunk")

    def __post_init__(self) -> None:
        if self.form not in (*FORMS, "none") or not 0 < self.g <= 256 // 8:
            raise NarrowsError(f"{self} is not possible.", where="sten", remedy=f"Give form {', '.join(FORMS)} and g up to 32.")

    def baseline(self) -> "STen":
        return replace(self, form="none")

    @property
    def grouping(self) -> Grouping:
        """The layout."""
        n, m = self.form.split(":")
        return Grouping(int(n), int(m), self.g)

    @property
    def option(self) -> str:
        return f"form={self.form}"

    def nonzeros(self, inputs: int, outputs: int) -> int:
        return 0 if self.form == "none" else inputs * outputs * self.grouping.n // self.grouping.m

    def stored(self, inputs: int, outputs: int) -> DType:
        return self.grouping.stored

    def unfit(self, name: str, inputs: int, outputs: int) -> str:
        return "" if self.form == "none" else self.grouping.unfit(inputs, outputs)

    def unpaid(self, machine: Machine | None, graph: Graph, ops: Sequence[Op], step: Step) -> str:
        reason = super().unpaid(machine, graph, ops, step)
        if machine is None or machine.kind != "gpu":
            return reason
        halved = graph.map(lambda op: op.but(inputs=op["inputs"] * 0.5) if op in ops else op)
        most = seconds(graph, machine, step)[0] / seconds(halved, machine, step)[0]
        return f"{reason}; 2:4 units of its own, where it has any, make this step at most {float(most):.2f} x as fast"

    def filled(self, linear: "nn.Linear") -> "nn.Module":
        from narrows.modules.grouped_linear import GroupedLinear

        return GroupedLinear.of(linear, self.grouping)

    @classmethod
    def example(cls) -> Example:
        import torch
        from torch import nn

        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 192), nn.GELU(), nn.Linear(192, 40, bias=False))
        return Example(model.eval(), [{"input": torch.randint(50, (2, 64))}], Step.forward(2, 64))
