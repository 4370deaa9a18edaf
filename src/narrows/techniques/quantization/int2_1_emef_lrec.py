"""Keep linear weights in 2 bits, and train a small low-rank branch beside each against the outputs of the plain model.

A weight is one of four levels, two binary planes with a scale each for a group of inputs (the paper rounds to even levels).
Rounding so far breaks a model; the branches learn, on a few batches of any text, to give what the plain model gave (LREC).
The backward pass unpacks each layer again and keeps no float copy of its weights, so that tuning needs little more memory
than the packed model (EMEF).

## When it helps
A model in 2 bits that must still work, where some minutes of training are at hand; tuning on a machine that does not hold
the plain weights. The same branches can go on learning a task.

## When it does not
On a CPU planes are read faster than bf16 weights for a few rows alone, and packed 4 bits lose less and are faster still; so it
is refused where the plain weights fit the memory. In narrow layers the branch is not small: rank 16 takes 0.9 bits a weight
at a width of 576.

## Reference
Chai et al., INT2.1: Towards Fine-Tunable Quantized Large Language Models with Error Correction through Low-Rank Adaptation, 2023.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Op
from narrows.modules.linears import CODES_ON_CPU, Planes, ReplacesLinears, branched
from narrows.step import Step
from narrows.technique import Card, Claim, Example, Stage, choice

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class INT2(ReplacesLinears):
    """Every linear weight but the output layer's in 2 bits, with a trained branch of plain numbers beside it."""

    card: ClassVar[Card] = Card(
        slug="int2-1-emef-lrec",
        relieves=(Limit.CAPACITY,),
        phases=("decode", "prefill", "forward"),
        exact=False,
        stage=Stage.QUANTIZE,
        touches=("linear weights",),
        needs=("calibration",),
        price="a brief training, and still well below the plain model in small ones",
        claims=(
            Claim(
                "size_overhead", "x", 1.05, "Llama-2-7B: bytes with branches over those without",
                "abstract", "checked", "rank 8 in bf16, groups of 64; 1 without branches, which fails",
                at_least=1.01, at_most=1.07,
            ),
            Claim(
                "error_recovered", "share", None, "all-MiniLM-L6-v2, all layers in 2 bits: error of its outputs on held-out text",
                "abstract: rectifies quantization errors", "run", "of the squared error without the correction; 32 sequences"
                " of training text limit it", at_least=0.3,
            ),
            Claim(
                "tuning_memory_saved", "x", 5.6, "a layer of 2048 x 2048 and 64 tokens, over the same branch beside bf16 weights",
                "abstract: up to 5.6 x", "run", "bytes held until the backward pass: weights, what autograd keeps, gradients and"
                " Adam's states of the branch", at_least=3.0,
            ),
        ),
    )  # fmt: skip
    SLOWER = CODES_ON_CPU

    rank: int = choice(8, 16, 32, help="of the branches; 0: rounding alone")
    group: int = choice(64, 128, 32, help="inputs that share the scales of an output")
    steps: int = choice(100, help="of training, one batch each, over and over")
    rate: float = choice(2e-3, help="of learning, falling to 0 along the steps")

    def __post_init__(self) -> None:
        if self.group < 2 or self.rank < 0 or self.steps < 0 or not self.rate > 0:
            problem = f"rank={self.rank}, group={self.group}, steps={self.steps}, rate={self.rate}."
            remedy = "Give a group of 2 or more, a rank and steps from 0 and a positive rate."
            raise NarrowsError(problem, where="int2-1-emef-lrec", remedy=remedy)

    def baseline(self) -> "INT2":
        return replace(self, rank=0)

    @property
    def form(self) -> Planes:
        """How the planes are kept."""
        return Planes(2, 2, self.group)

    def unfit(self, name: str, inputs: int, outputs: int) -> str:
        small = "" if self.rank < min(inputs, outputs) else f"{inputs} x {outputs} has no more than rank={self.rank}"
        return self.form.unfit(inputs, outputs) or small

    def parts(self, op: Op) -> Sequence[Op]:
        return branched(op, replace(op, weight=self.form.stored), self.rank)

    def hollow(self, name: str, linear: "nn.Linear") -> "nn.Module":
        from narrows.modules.planes import PlanesLinear

        return self.beside(PlanesLinear.like(linear, self.form), linear)

    def beside(self, base: "nn.Module", linear: "nn.Linear") -> "nn.Module":
        """A base layer with a branch that gives 0 so far."""
        import torch

        from narrows.modules.branch import BranchedLinear

        if not self.rank:
            return base
        layer = BranchedLinear(base, linear.in_features, linear.out_features, self.rank, linear.weight)
        if not linear.weight.is_meta:
            generator = torch.Generator().manual_seed(linear.in_features)
            start = torch.randn(self.rank, linear.in_features, generator=generator) / linear.in_features**0.5
            with torch.no_grad():
                layer.down.weight.copy_(start)
                layer.up.weight.zero_()
        return layer

    def apply(self, model: "nn.Module", data: Sequence[Mapping[str, "Tensor"]]) -> "nn.Module":
        import torch

        from narrows.modules.calibration import require_data
        from narrows.modules.planes import PlanesLinear

        layers = self.layers(model)
        require_data(data, "the branches learn from", "int2-1-emef-lrec")
        training = model.training
        with torch.no_grad():
            wanted = [_main(model.eval()(**batch)).float() for batch in data]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        trained = []
        for name, linear in layers.items():
            layer = self.beside(PlanesLinear.nearest(linear, self.form), linear)
            model.set_submodule(name, layer)
            trained += [p for p in layer.parameters() if p.requires_grad]
        if trained:
            self._train(model, data, wanted, trained)
        return model.train(training)

    def _train(self, model: "nn.Module", data: Sequence[Mapping[str, "Tensor"]], wanted: "list[Tensor]", trained: Any) -> None:
        """Bring the outputs near to the wanted ones, by changing the branches alone."""
        import torch

        optimizer = torch.optim.Adam(trained, lr=self.rate)
        for step in range(self.steps):
            with torch.enable_grad():
                loss = _distance(model(**data[step % len(data)]), wanted[step % len(data)])
            if not loss.isfinite():
                problem = f"the loss of step {step} is {float(loss)}."
                raise NarrowsError(problem, where="int2-1-emef-lrec", remedy="Lower the rate, or check the data.")
            for group in optimizer.param_groups:
                group["lr"] = self.rate * (1 - step / self.steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()

    @classmethod
    def example(cls) -> Example:
        from narrows import samples

        return Example(*samples.tiny_llama(2, 32), Step.decode(1, context=32))

    @classmethod
    def example_instance(cls) -> "INT2":
        return cls(rank=4, group=32, steps=3)


def _distance(out: Any, wanted: "Tensor") -> "Tensor":
    """Of outputs from the wanted ones: between distributions (KL) where they are logits, else their relative square."""
    from torch.nn import functional as F

    found = _main(out).float()
    if not hasattr(out, "logits"):
        return (found - wanted).square().mean() / wanted.square().mean()
    return F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()


def _main(out: Any) -> "Tensor":
    """The tensor that a model is run for."""
    for name in ("logits", "last_hidden_state"):
        out = getattr(out, name, out)
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found
