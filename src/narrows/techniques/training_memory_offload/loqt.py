"""Train with weights in 4 bits: what is trained is a low-rank part, merged into them at growing intervals.

## What it does
The matrix of each linear layer is frozen in 4 bits, and a product P B is trained in its place. P, in 4 bits too, holds the
directions of the outputs along which the matrix's gradient is largest, and B begins as what makes up best for the rounding.
Only B has a gradient and optimizer states, and replicas exchange its gradient alone. Now and then P B goes into the matrix,
which is rounded again, and a new P is taken from the gradient of one batch: so the sum of the changes has any rank.
Intervals grow, since late changes are smaller than a step of the rounding and must add up first.

`narrows.modules.merged_linear` has the layer and the optimizer.

## When it helps
Pretraining or tuning a model whose weights, gradients and optimizer states do not fit the memory.

## When it does not
Where full-rank training fits: it learns less from each token. The small model of the claims ends 2 to 3 % above Adam's loss,
and over 4 % when both see four times as much text. Low-rank products take time on top, and so does unpacking; that is not
predicted, since a kernel could do it on the way, but here it is plain tensor arithmetic, as is the SVD of each merge.
Small layers beside large embeddings and output layers, which stay as they are.

## Reference
Loeschcke et al. LoQT: Low-Rank Adapters for Quantized Pretraining. NeurIPS 2024, arXiv 2405.16528. Numbers are 4-bit integers
with scale and zero instead of NF4, optimizer states are fp32 instead of 8-bit.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import DType, Graph, Op
from narrows.machine import Machine
from narrows.modules.linears import is_output
from narrows.step import Step
from narrows.technique import Card, Claim, No, Stage, Trains, Verdict, choice

if TYPE_CHECKING:
    import torch

_TEXT = "model of 420,000 parameters that predicts the next character from 16, 300 steps of 128; rank 112 of 512"


@dataclass(frozen=True)
class LoQT(Trains):
    """Frozen 4-bit matrices with a trained low-rank part that is merged into them."""

    card: ClassVar[Card] = Card(
        slug="loqt",
        relieves=(Limit.CAPACITY,),
        phases=("train",),
        exact=False,
        price="a somewhat higher loss after as many steps, and the time of unpacking and of the low-rank products",
        stage=Stage.TRAIN,
        touches=("optimizer", "linear weights"),
        needs=("training",),
        claims=(
            Claim(
                "bytes_at_equal_loss", "x less", None, _TEXT + "; weights, gradients, optimizer states, against Adam in fp32",
                "abstract", "run", "counts only where the held-out loss ends within 3 % of Adam's", at_least=3.0,
            ),
            Claim(
                "beyond_low_rank", "x", None, "a layer of 128 x 128 that learns another, rank 16: distance from it over that of "
                "the nearest change of rank 16", "method: merging", "checked", "the nearest by the singular values (Eckart "
                "and Young); a product that is never merged cannot be below 1", at_most=0.2,
            ),
            Claim(
                "rounding_left", "share", None, "the same layer before training, rank 16: distance of the new layer from the "
                "old over that without B", "method: error compensation", "run", "16 of 128 directions hold an eighth of "
                "an even error's square, which leaves 0.935; the best of five rounds is less", at_most=0.95,
            ),
            Claim(
                "gigabytes_7b", "GB", 24, "Llama-2-7B, rank 512, one sequence of 256 tokens: weights, gradients, optimizer and "
                "activations", "abstract: on a 24 GB GPU", "checked", "it must fit; the paper's rank is 1,024 with 8-bit "
                "states", at_most=24.0,
            ),
        ),
    )  # fmt: skip

    rank: int = choice(256, 128, 512, 64, help="columns of P")
    gap: int = choice(200, 100, 500, help="steps between merges, at least; 0: the first P stays")
    growth: float = choice(1.2, 1.5, help="the i-th interval is longer by this to the i-th power")
    group: int = choice(64, 32, 16, help="inputs that share a scale of the 4-bit matrices; 0: they stay plain")
    speed: float = choice(3.0, 1.0, 10.0, help="learning rate of B over that of other parameters")

    def __post_init__(self) -> None:
        if self.rank < 1 or (self.group and self.rank % self.group) or self.gap < 0 or self.growth < 0 or self.speed <= 0:
            remedy = "Give a rank that is a multiple of group, gap and growth from 0 and a speed above 0."
            raise NarrowsError(f"{self} is not possible.", where="loqt", remedy=remedy)

    def baseline(self) -> "LoQT":
        return replace(self, gap=0, group=0)

    @property
    def form(self) -> DType | None:
        """What matrices are kept as; None leaves them plain."""
        return DType("int4", 4, self.group, scale_bits=16, zero_bits=16) if self.group else None

    def fits(self, name: str, inputs: int, outputs: int) -> bool:
        """Whether a layer of this path and these sizes is changed; others are trained as they are."""
        divides = not self.group or (inputs % self.group == 0 and outputs % 2 == 0)
        return divides and self.rank < min(inputs, outputs) and not is_output(name)

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        if step.phase != "train":
            return No(f"it changes how a model is trained, and this is a {step.phase} step")
        if not any(self._changes(op) for op in graph):
            return No(f"no linear layer with weights of its own has more than {self.rank} inputs and outputs in groups that fit")
        return True

    def rewrite(self, graph: Graph) -> Graph:
        """Between merges: frozen matrices give their inputs a gradient alone, and B alone is exchanged and updated."""
        frozen: Counter[DType] = Counter()
        for op in graph.forward:
            if self._changes(op):
                less = (int(op["outputs"]) - self.rank) * int(op["inputs"])  # type: ignore[arg-type]
                frozen[op.weight or op.act] += less * op.repeat

        def change(op: Op) -> list[Op] | Op:
            if op.phase == "update" and op.act in frozen and op.kind in ("optimizer", "all_reduce"):
                return op.but(elements=op["elements"] + -frozen[op.act])
            return self._parts(op) if self._changes(op) else op

        return graph.map(change)

    def _changes(self, op: Op) -> bool:
        plain = op.kind == "linear" and op.weight is not None and op.weight.bits >= 16 and not op.tied and op["matrices"] == 1
        return plain and self.fits(op.name, int(op["inputs"]), int(op["outputs"]))  # type: ignore[arg-type]

    def _parts(self, op: Op) -> list[Op]:
        """The frozen matrix, B and P; a backward pass through what is frozen is one product of two."""
        share = 0.5 if op.phase == "backward" else 1.0
        fixed = {"weight": self.form or op.weight, "rows": op["rows"] * share}
        narrow = {"saved": 0, "segments": 0}
        return [
            op.but(**fixed),
            op.but(name=f"{op.name}.factor", outputs=self.rank, bias=0, **narrow),
            op.but(name=f"{op.name}.projector", inputs=self.rank, bias=0, **narrow, **fixed),
        ]

    def attach(self, model: "torch.nn.Module", **options: Any) -> "torch.optim.Optimizer":
        """Freeze the matrices of a model in place; `options` are Adam's. Raises NarrowsError where no layer can be changed.

        Replicas agree on them: wrap the model then in DistributedDataParallel(..., init_sync=False, broadcast_buffers=False),
        which would send the packed numbers otherwise.
        """
        from torch import nn

        from narrows.modules.merged_linear import MergedLinear, MergingAdam

        shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        found = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and id(m.weight) not in shared}
        found = {name: m for name, m in found.items() if self.fits(name, m.in_features, m.out_features)}
        if not found:
            remedy = "Give a lower rank, or a group that divides their inputs."
            raise NarrowsError(f"no linear layer fits {self}.", where="loqt", remedy=remedy)
        for name, linear in found.items():
            if not linear.weight.isfinite().all():
                raise NarrowsError("weights are NaN or infinite.", where=f"loqt: {name}", remedy="Repair the model first.")
            model.set_submodule(name, MergedLinear(linear, self.rank, self.form))
        return MergingAdam(model, self.gap, self.growth, speed=self.speed, **options)
