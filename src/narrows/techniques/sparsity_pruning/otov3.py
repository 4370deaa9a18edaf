"""Train once, then take whole channels out: layers become narrower, and the network computes what it did without them.

## What it does
A dependency graph, found by running the network once, says which channels stand and fall together: a convolution's, its
batch norm's, those of the depthwise convolution after it and what the next layer reads of them; a gate's and its partner's;
the query heads of one key-value head. While the network trains, `forgetting` drives the least salient groups to zero.
Removing groups that are zero changes no output, so nothing has to be tuned afterwards. Every layer loses the same share.

`narrows.modules.channels` is the dependency graph and the training; it knows operators, not architectures.

## When it helps
Networks that are trained or tuned anyway: every kernel, compiler and device runs the smaller shapes, at full speed.

## When it does not
Cut at once, without training through it, half the channels cost a network for digits 23 points, and a quarter 4. Channels of
a residual stream stay, as do those of a network's answer, those that a norm mixes, and those that are concatenated or split.
Heads stay unless asked for. Where a network's own code states the sizes that change, it refuses.

## Reference
Chen, Ding, Tiwari, Zhu et al. OTOv3: Automatic Architecture-Agnostic Neural Network Training and Compression from Structured
Pruning to Erasing Operators, arXiv 2312.09411 (2023). Every layer loses the same share here, where the paper ranks groups
over the whole network; whole operators are not erased.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.modules.channel_graph import groups, narrowed
from narrows.step import Step
from narrows.technique import Card, Claim, Example, No, Rewrites, Stage, Verdict, choice

if TYPE_CHECKING:
    import torch

    from narrows.modules.channels import Family, Forgetting


@dataclass(frozen=True)
class OTOv3(Rewrites):
    """Take out the channels that training has driven to zero, or else the least salient ones."""

    card: ClassVar[Card] = Card(
        "otov3",
        relieves=(Limit.COMPUTE, Limit.BANDWIDTH, Limit.CAPACITY),
        phases=("prefill", "decode", "forward"),
        exact=False,
        price="half the channels cost most of the quality unless the network is trained through it or tuned afterwards",
        stage=Stage.REMOVE,
        touches=("channels",),
        claims=(
            Claim("zero_groups_error", "relative", None,
                  "half of the groups zero: EfficientNet-Lite0, MiniLM and a grouped-query Llama with heads, a digits network",
                  "method: zero-invariant groups", "checked", "sums in another order: fp32 rounding over at most 1,280 inputs",
                  at_most=1e-4),
            Claim("accuracy_lost", "points", None, "a network for 8,000 digits, half of its channels; 2,000 other digits",
                  "abstract: competitive without fine-tuning", "run", "three points is what the field calls recovered",
                  at_most=3.0),
            Claim("speed_within_three_points", "x", None, "the same network, forward, one thread; 1 if it loses more", "abstract",
                  "run", "a quarter of the FLOP is left in its largest layers; first and last keep a side", at_least=2.0),
        ),
    )  # fmt: skip

    share: float = choice(0.5, 0.25, 0.75, help="of the channels of every layer that go")
    heads: bool = choice(False, help="attention heads go too, by the key-value head")
    by: str = choice("saliency", help="saliency, or random: as many by chance")

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.by not in ("saliency", "random"):
            raise NarrowsError(f"{self} is not possible.", where="otov3", remedy="Give a share above 0 and below 1, by=saliency.")

    def baseline(self) -> "OTOv3":
        return replace(self, by="random")

    def left(self, count: int) -> int:
        """How many of so many groups stay."""
        return max(1, round(count * (1 - self.share)))

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        if any(made > self.left(made) for _, made in groups(graph, self.heads)):
            return True
        return No("none of its channels can go: they are of a residual stream or of its answer, or split, mixed or quantized")

    def rewrite(self, graph: Graph) -> Graph:
        return narrowed(graph, self.left, self.heads)

    def chosen(self, model: "torch.nn.Module", data: Sequence[Mapping[str, Any]] = ()) -> "list[tuple[Family, int]]":
        """The families of channels that `rewrite` cuts, each with how many of its groups stay.

        Raises NarrowsError where the network binds channels that its graph shows apart, or the other way round.
        """
        from narrows.capture.assemble import starred
        from narrows.capture.torch import from_module
        from narrows.modules.channels import families

        inputs = _inputs(model, data)
        graph = from_module(model, Step.forward(), inputs=inputs)
        wanted: Counter[tuple[str, int, int]] = Counter()  # weights by name, numbers and groups of channels
        for op, (_, made) in zip(graph.ops, groups(graph, self.heads), strict=True):
            if op.kind in ("linear", "conv") and made:
                wanted[op.name, int(op.spec.matrix(dict(op.dims))), made] += op.repeat
        found = []
        for family in families(model, inputs):
            weights = [(name.rpartition(".")[0], model.get_parameter(name).numel()) for name in family.made_by]
            own = [(starred(path), numbers, family.count) for path, numbers in weights]
            if all(one in wanted for one in own):
                wanted.subtract(own)
                found.append((family, self.left(family.count)))
        if not found:
            raise NarrowsError("none of its channels can go.", where="otov3", remedy="Use another technique for this network.")
        if any(wanted.values()):
            name = next(name for (name, *_), n in wanted.items() if n)
            problem = "its channels are bound to others than its graph shows, or its code states their number."
            raise NarrowsError(problem, where=f"otov3: {name}", remedy="Use another technique for this network.")
        return found

    def forgetting(self, model: "torch.nn.Module", data: Sequence[Mapping[str, Any]], start: int, steps: int) -> "Forgetting":
        """What to call after each step of an optimizer: from step `start` on, over `steps` of them, groups fade to zero."""
        from narrows.modules.channels import Forgetting

        return Forgetting(model, self.chosen(model, data), start, steps)

    def apply(self, model: "torch.nn.Module", data: Sequence[Mapping[str, "torch.Tensor"]] = ()) -> "torch.nn.Module":
        import torch

        from narrows.modules.channels import most_salient, remove

        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise NarrowsError("weights are NaN or infinite.", where=f"otov3: {name}", remedy="Repair the model first.")
        generator = torch.Generator().manual_seed(0)
        cuts = []
        for family, count in self.chosen(model, data):
            chance = torch.randperm(family.count, generator=generator) < count
            cuts.append((family, most_salient(model, family, count) if self.by == "saliency" else chance))
        remove(model, cuts)
        try:
            with torch.no_grad():
                model(**_inputs(model, data))
        except (RuntimeError, ValueError, IndexError) as error:
            problem = f"its code states sizes that change ({error})."
            raise NarrowsError(problem, where="otov3", remedy="Use another technique for this network.") from error
        return model

    def restructure(self, model: "torch.nn.Module") -> "torch.nn.Module":
        import torch

        from narrows.modules.channels import remove

        remove(model, [(family, torch.arange(family.count, device="cpu") < count) for family, count in self.chosen(model)])
        return model

    @classmethod
    def example(cls) -> Example:
        import torch
        from torch import nn

        torch.manual_seed(0)
        convolutions = (nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU())
        pooled = (nn.Conv2d(16, 24, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 30), nn.GELU(), nn.Linear(30, 7))
        model = nn.Sequential(*convolutions, *pooled).eval()
        images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        return Example(model, [{"input": images}], Step.forward(2))


def _inputs(model: "torch.nn.Module", data: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Keyword arguments to run a model on: the first batch of data, or what a transformers model gives for itself."""
    given = data[0] if data else getattr(model, "dummy_inputs", None)
    if given is None:
        raise NarrowsError("there is nothing to run the network on.", where="otov3", remedy="Pass a batch of data.")
    device = next(model.parameters()).device
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in given.items()}
