"""Fine-tune low-rank adapters so that fewer of a network's MLP activations are other than zero.

## What it does
Weights are frozen but those of the answer, and every linear layer gets a trained low-rank change (LoRA). To the loss comes a
price on density: the mean of tanh(|h| / width) over the activations h of the MLPs, which counts nonzeros smoothly. What is
zero needs no product with its column of the next matrix, and no read of it.

`narrows.modules.adapted_linear` has the layer, the price, `density`, which measures what is left, and `merge` for afterwards.

## When it helps
Decode of few sequences, or hardware that skips zeros: of the second matrix of an MLP the share of columns read is the density.
Any task that a network is fine-tuned for anyway; frozen weights may be rounded or pruned before.

## When it does not
Activations that are never exactly zero (GELU, SiLU) become small, and need a threshold. Kernels that multiply by zeros
gain nothing, and neither do large batches, in which every column is used by some row. A threshold that cuts the smallest
activations of a network tuned without the price is free, and down to 10 % density as good on the network of the claims: the
price pays below that, with a threshold on top.

## Reference
Runwal, Pedapati, Chen. From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in Transformers, AAAI
2025, arXiv 2402.01911. Here with LoRA alone, and one fixed width.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import DType, Graph, Op
from narrows.machine import Machine
from narrows.modules.linears import is_output, is_plain
from narrows.step import Step
from narrows.technique import Card, Claim, No, Stage, Trains, Verdict, choice

if TYPE_CHECKING:
    import torch

_TEXT = "model of characters with three ReLU MLPs, tuned on text that it has not seen; against the same adapters alone"


@dataclass(frozen=True)
class Deft(Trains):
    """Low-rank adapters with a price on activations that are not zero."""

    card: ClassVar[Card] = Card(
        slug="deft-density-efficient-fine-tuning",
        relieves=(Limit.BANDWIDTH, Limit.COMPUTE),
        phases=("train",),
        exact=False,
        price="a loss about half a percent higher than adapters alone reach",
        stage=Stage.TRAIN,
        touches=("optimizer", "linear weights"),
        needs=("training",),
        claims=(
            Claim(
                "density_reduction", "%", 50.72, _TEXT + "; paper: RoBERTa-Large", "abstract", "run",
                "another network and task; counts only where each of three seeds ends within 1 % of the loss without the price",
                at_least=50.0,
            ),
            Claim(
                "density_reduction_quantized", "%", None, "the same with frozen weights rounded to 4 bits", "abstract: works "
                "complementary with quantized models", "run", "as much as on plain weights, and as closely",
                at_least=50.0,
            ),
            Claim(
                "density_reduction_pruned", "%", None, "the same with the smaller half of the frozen weights at zero",
                "abstract: works complementary with pruned models", "run", "as much as on plain weights, and as closely",
                at_least=50.0,
            ),
            Claim(
                "nats_below_threshold", "nats", None, _TEXT + "; the smallest activations of both cut until 4 % are left",
                "ours: what a threshold gives without a price", "run", "the least of three seeds; a percent of the loss is clear",
                at_least=0.02,
            ),
        ),
    )  # fmt: skip

    strength: float = choice(0.5, 0.2, 1.0, help="what a density of one adds to the loss; 0: adapters alone")
    width: float = choice(0.1, 0.03, 0.3, help="activations above this count almost as one")
    rank: int = choice(8, 4, 16, help="of the adapters")

    def __post_init__(self) -> None:
        if self.strength < 0 or self.width <= 0 or self.rank < 1:
            remedy = "Give a strength from 0, a width above 0 and a rank from 1."
            raise NarrowsError(f"{self} is not possible.", where=self.card.slug, remedy=remedy)

    def baseline(self) -> "Deft":
        return replace(self, strength=0.0)

    def fits(self, name: str, inputs: int, outputs: int) -> bool:
        """Whether a linear layer of this path and these sizes gets an adapter."""
        return self.rank < min(inputs, outputs) and not is_output(name)

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        if step.phase != "train":
            return No(f"it changes how a model is trained, and this is a {step.phase} step")
        if not any(self._changes(op) for op in graph):
            return No(f"no plain linear layer has more than {self.rank} inputs and outputs")
        return True

    def rewrite(self, graph: Graph) -> Graph:
        """Frozen matrices give their inputs a gradient alone; adapters and the output layer are exchanged and updated."""
        fewer: defaultdict[DType, float] = defaultdict(float)
        for op in graph.forward:
            if not is_output(op.name):
                fewer[op.weight or op.act] += op.parameters
            if self._changes(op):
                fewer[op.weight or op.act] -= self.rank * (int(op["inputs"]) + int(op["outputs"])) * op.repeat  # type: ignore[arg-type]

        def change(op: Op) -> list[Op] | Op:
            if op.phase == "update" and op.kind in ("optimizer", "all_reduce"):
                return op.but(elements=op["elements"] + -fewer[op.act])
            return self._parts(op) if self._changes(op) else op

        return graph.map(change)

    def _changes(self, op: Op) -> bool:
        return is_plain(op) and self.fits(op.name, int(op["inputs"]), int(op["outputs"]))  # type: ignore[arg-type]

    def _parts(self, op: Op) -> list[Op]:
        """The frozen matrix, A and B; a backward pass through what is frozen is one product of two."""
        narrow = {"bias": 0, "saved": 0, "segments": 0}
        return [
            op.but(rows=op["rows"] * (0.5 if op.phase == "backward" else 1.0)),
            op.but(name=f"{op.name}.down", outputs=self.rank, **narrow),
            op.but(name=f"{op.name}.up", inputs=self.rank, **narrow),
        ]

    def attach(self, model: "torch.nn.Module", **options: Any) -> "torch.optim.Optimizer":
        """Freeze a model in place, adapt its linear layers and price its activations; `options` are Adam's.

        Raises NarrowsError where no layer can be adapted, or no activation function is a module that can be watched.
        """
        import torch
        from torch import nn

        from narrows.modules.adapted_linear import AdaptedLinear, activations, price_density

        where = self.card.slug
        if not activations(model):
            problem = "no activation function of it is a module."
            raise NarrowsError(problem, where=where, remedy="Use nn.ReLU() in the model where it calls a function.")
        found = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
        found = {name: m for name, m in found.items() if self.fits(name, m.in_features, m.out_features)}
        if not found:
            raise NarrowsError(f"no linear layer has more than {self.rank} inputs and outputs.", where=where,
                               remedy="Give a lower rank.")  # fmt: skip
        for name, linear in found.items():
            if not linear.weight.isfinite().all():
                raise NarrowsError("weights are NaN or infinite.", where=f"{where}: {name}", remedy="Repair the model first.")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_output(name.rpartition(".")[0]))
        for name, linear in found.items():
            model.set_submodule(name, AdaptedLinear(linear, self.rank))
        if self.strength:
            price_density(model, self.strength, self.width)
        return torch.optim.Adam((p for p in model.parameters() if p.requires_grad), **options)
