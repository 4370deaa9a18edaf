"""Replace each linear or convolution layer by two with a narrow middle: K x N weights become (K + N) x rank.

## When it helps
Prefill, encoders and training are bound by arithmetic, and FLOP and parameters shrink by the same ratio. Layers whose
inputs lie close to a subspace lose little; brief tuning wins back much of the rest.

## When it does not
Square layers keep half their parameters only at a quarter of the full rank. The second layer adds a launch and a
round trip of the activations, which small layers and single rows do not win back. Weights of well-trained language
models are close to full rank: without tuning their perplexity rises fast.

## Reference
Cahyawijaya et al., Greenformer: Factorization Toolkit for Efficient Deep Neural Networks, AAAI 2022 demonstrations.
The solver `activation` is not in the paper: it weighs errors by the inputs that calibration saw. On MiniLM at half the
FLOP its sentence embeddings lose 0.44 times the cosine that they lose with the plain SVD.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError, closest
from narrows.graph import Graph, Op
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, Example, No, Rewrites, Stage, Verdict, choice

if TYPE_CHECKING:
    from torch import Tensor, nn

SOLVERS = ("svd", "activation", "snmf", "random")
SAMPLES = 4096  # rows of a layer's input that the solver `activation` sees


@dataclass(frozen=True)
class Greenformer(Rewrites):
    """Every linear layer and ungrouped convolution in two factors, where that takes fewer parameters."""

    card: ClassVar[Card] = Card(
        slug="greenformer",
        relieves=(Limit.COMPUTE, Limit.BANDWIDTH, Limit.CAPACITY),
        phases=("prefill", "decode", "forward", "train"),
        exact=False,
        stage=Stage.FACTOR,
        touches=("linear weights", "convolution weights"),
        blockwise=True,
        price="quality falls with the rank; tune briefly afterwards",
        claims=(
            Claim(
                "size_by_formula", "share", 0.5, "rank ratio 0.5; MLP, CNN, transformer", "method: r < m n / (m + n)", "run",
                "modules and torch's FLOP counter must equal the formula; rounding r down only lowers the share",
                at_least=0.45, at_most=0.5,
            ),
            Claim(
                "optimal_error", "relative", None, "SVD solver; two layers of MiniLM", "method: SVD solver", "checked",
                "Eckart-Young; what is left is fp32 rounding of the factors", at_most=1e-4,
            ),
            Claim(
                "latency", "x", None, "rank ratio 0.5, all-MiniLM-L6-v2, 16 x 128 tokens, one thread", "a plot: above 1", "run",
                "half the FLOP of the linear layers, less what narrow products and attention cost; clear of the pairs' noise",
                at_least=1.2,
            ),
            Claim(
                "removed_at_equal_accuracy", "share", None, "rank ratio 0.5, a sixth of training again; character MLP", "a plot",
                "run", "parameters removed if the accuracy falls by at most 0.01, else 0; embeddings stay", at_least=0.4,
            ),
        ),
    )  # fmt: skip

    rank_ratio: float = choice(0.5, 0.25, 0.75, help="share of the FLOP that is kept: of the rank at which nothing is saved")
    rank: int = choice(0, help="the same rank for every layer instead")
    solver: str = choice(*SOLVERS, help="how factors are found; activation needs data, random needs training")
    whole: str = choice("lm_head", help="layers with this last name stay whole")

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            remedy = closest(self.solver, list(SOLVERS))
            raise NarrowsError(f"{self.solver!r} is no solver.", where="greenformer: solver", remedy=remedy)
        if not 0 < self.rank_ratio <= 1 or self.rank < 0:
            problem = f"rank_ratio={self.rank_ratio}, rank={self.rank}."
            raise NarrowsError(problem, where="greenformer", remedy="Give a ratio above 0 and at most 1, or a positive rank.")

    def baseline(self) -> "Greenformer":
        return replace(self, rank_ratio=1.0, rank=0)

    def rank_of(self, inputs: int, outputs: int) -> int:
        """The rank that a layer of N outputs, each a sum over K inputs, gets; 0 where two factors save nothing."""
        rank = self.rank or max(1, int(self.rank_ratio * inputs * outputs / (inputs + outputs)))
        saves = rank * (inputs + outputs) < inputs * outputs and (self.rank or self.rank_ratio < 1)
        return rank if saves else 0

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        layers = [size for op in graph if (size := self._size(op))]
        if any(self.rank_of(*size) for size in layers):
            return True
        if not layers:
            return No("it has no plain linear layer and no ungrouped convolution")
        asked = f"rank={self.rank}" if self.rank else f"rank_ratio={self.rank_ratio}"
        return No(f"none of its {len(layers)} kinds of layer has fewer parameters in two factors at {asked}")

    def rewrite(self, graph: Graph) -> Graph:
        def split(op: Op) -> Op | tuple[Op, Op]:
            size = self._size(op)
            rank = self.rank_of(*size) if size else 0
            if not rank:
                return op
            first, second = f"{op.name}.0", f"{op.name}.1"
            if op.kind == "linear":
                return op.but(name=first, outputs=rank, bias=0), op.but(name=second, inputs=rank)
            narrow = op.but(name=second, in_positions=op["positions"], in_channels=rank, kernel=1)
            return op.but(name=first, out_channels=rank, bias=0), narrow

        return graph.map(split)

    def apply(self, model: "nn.Module", data: Sequence[Mapping[str, "Tensor"]]) -> "nn.Module":
        from narrows.modules import low_rank
        from narrows.modules.calibration import observed

        layers = self._layers(model)
        if not layers:
            problem = "no layer has fewer parameters in two factors."
            raise NarrowsError(problem, where="greenformer", remedy="Lower the rank or its ratio.")
        inputs: dict[str, Tensor] = {}
        if self.solver == "activation":
            if not data:
                problem = "the solver `activation` needs calibration data."
                raise NarrowsError(problem, where="greenformer", remedy="Pass a few batches, or solver=svd.")
            inputs = observed(model, {name: layer for name, (layer, _) in layers.items()}, data, SAMPLES, low_rank.patches)
        plain = {"snmf": low_rank.semi_nmf, "random": low_rank.random}.get(self.solver, low_rank.svd)
        for name, (layer, rank) in layers.items():
            solve = partial(low_rank.activation_svd, x=inputs[name]) if name in inputs else plain
            new = low_rank.factored(layer, rank, solve)
            if not name:
                return new
            model.set_submodule(name, new)
        return model

    def restructure(self, model: "nn.Module") -> "nn.Module":
        """What `apply` does to the structure of a model, on one without data."""
        from narrows.modules import low_rank

        for name, (layer, rank) in self._layers(model).items():
            model.set_submodule(name, low_rank.factored(layer, rank, low_rank.svd))
        return model

    def _size(self, op: Op) -> tuple[int, int] | None:
        """(K, N) of an op that could be factored: plain weights of its own."""
        if op.weight is None or op.weight.scale_bits or op.weight.bits < 16 or op.tied or op.name.split(".")[-1] == self.whole:
            return None
        if op.kind == "linear" and op["matrices"] == 1:
            return int(op["inputs"]), int(op["outputs"])  # type: ignore[arg-type]
        if op.kind == "conv" and op["groups"] == 1:
            return int(op["in_channels"]) * int(op["kernel"]), int(op["out_channels"])  # type: ignore[arg-type]
        return None

    def _layers(self, model: "nn.Module") -> "dict[str, tuple[nn.Module, int]]":
        """The layers to factor, by path, with their ranks."""
        from torch import nn

        from narrows.modules.low_rank import is_factorable, matrix

        shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        found = {}
        for name, layer in model.named_modules():
            if is_factorable(layer) and id(layer.weight) not in shared and name.split(".")[-1] != self.whole:
                outputs, inputs = matrix(layer).shape
                if rank := self.rank_of(inputs, outputs):
                    found[name] = (layer, rank)
        return found

    @classmethod
    def example(cls) -> Example:
        import torch
        from torch import nn

        torch.manual_seed(0)
        seen = (nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, bias=False), nn.ReLU())
        told = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10))
        model = nn.Sequential(*seen, *told)
        return Example(model.eval(), [{"input": torch.randn(4, 3, 16, 16)}], Step.forward(4))
