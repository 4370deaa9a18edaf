"""Recover a network by matching functions: student and teacher see the very same mixed images, for as long as it pays.

Each step mixes the images of a batch with one another by a share of its own, asks the teacher about the mixtures, and
trains the student towards those answers alone: no labels, and no answers kept from before. Mixtures never repeat, so a
small set of images lasts for a long training.

## What it does
As a step of a plan, behind those that cut the network, it trains what they left against a copy of the network as it was.

## When it helps
Few unlabelled images and time for many steps: a convolutional network for digits that lost most of its channels.

## When it does not
Tokens cannot be mixed: use `recover` for language models. The teacher stays in memory and answers anew in every step; where
images are plenty, `recover` asks it once about each.

## Reference
Beyer, Zhai, Royer, Markeeva, Anil, Kolesnikov: Knowledge distillation: A good teacher is patient and consistent, arXiv
2106.05237 (2021). Shares are uniform, as theirs; crops are left to those who make the batches, and batch norms
keep their statistics, so that the network is trained as it will run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.progress import Tell
from narrows.step import Step
from narrows.technique import Card, Claim, Example, Lessons, No, Recovers, Stage, Verdict, choice

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VIEWS = ("shared", "fixed", "independent")


@dataclass(frozen=True)
class FunMatch(Recovers):
    """Train a changed network to give the answers that it gave before, on mixtures of images that both see."""

    card: ClassVar[Card] = Card(
        "patient-consistent-kd-funmatch",
        relieves=(),
        phases=("forward",),
        exact=False,
        price="the teacher stays in memory while it trains; many steps",
        stage=Stage.RECOVER,
        needs=("calibration", "training"),
        claims=(
            Claim("points_over_other_views", "points", None, "100 images, 100 steps, a quarter of the channels; three sets",
                  "abstract: design choices that drastically affect it", "run",
                  "of 2,000 digits: less than half a point would be chance; the gap to independent views is tens of points",
                  at_least=0.4),
            Claim("speed_when_recovered", "x", None,
                  "200 images, 400 steps, a quarter of the channels; 1 if 2.25 points are lost",
                  "abstract: affordable without compromising performance", "run",
                  "a sixteenth of the FLOP is left in its largest layers; with fixed views it loses more", at_least=3.0),
        ),
    )  # fmt: skip

    steps: int = choice(256, 1024, 64, help="batches of mixtures that it trains on")
    rate: float = choice(3e-2, 1e-2, help="share of a weight's size that a step moves it by")
    views: str = choice("shared", help="shared; fixed: both see the images as they are; independent: each its own mixture")

    def __post_init__(self) -> None:
        if self.steps < 0 or not 0 < self.rate < 1 or self.views not in VIEWS:
            remedy = f"Give steps from 0 on, a rate between 0 and 1, and views={'|'.join(VIEWS)}."
            raise NarrowsError(f"{self} is not possible.", where=self.card.slug, remedy=remedy)

    def baseline(self) -> "FunMatch":
        return replace(self, views="fixed")

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        if words := graph.find("embedding"):
            return No(f"{words[0].name} reads numbers of tokens, which cannot be mixed: use recover")
        return super().check(graph, machine, step)

    def remember(self, teacher: "torch.nn.Module", data: "Sequence[Mapping[str, Tensor]]", tell: Tell) -> Lessons:
        """A copy of the teacher, and the batches."""
        from copy import deepcopy

        import torch

        from narrows.modules.calibration import require_data
        from narrows.modules.distillation import answers, turn

        require_data(data, "it needs", self.card.slug)
        for name, value in data[0].items():
            if not value.is_floating_point():
                raise NarrowsError("it holds no images.", where=f"{self.card.slug}: {name}", remedy="Use recover.")
        teacher = deepcopy(teacher)

        def view(batch: "Mapping[str, Tensor]", generator: torch.Generator) -> "dict[str, Tensor]":
            """Each sample mixed with another of its batch, all by one share."""
            share, other = float(torch.rand(1, generator=generator)), torch.randperm(_samples(batch), generator=generator)
            return {name: share * value + (1 - share) * value[other.to(value.device)] for name, value in batch.items()}

        def lesson(step: int) -> object:
            batch, generator = data[turn(step, len(data))], torch.Generator().manual_seed(step)
            seen = batch if self.views == "fixed" else view(batch, generator)
            shown = view(batch, generator) if self.views == "independent" else seen
            return seen, answers(teacher, shown)

        return lesson

    def recover(self, model: "torch.nn.Module", lessons: Lessons, tell: Tell) -> "torch.nn.Module":
        from narrows.modules.distillation import train

        return train(model, lessons, self.steps, self.rate, tell)

    @classmethod
    def example(cls) -> Example:
        import torch
        from torch import nn

        torch.manual_seed(0)
        seen = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model = nn.Sequential(*seen, nn.Linear(16, 10)).eval()
        return Example(model, [{"input": torch.randn(4, 3, 16, 16)}], Step.forward(4))

    @classmethod
    def example_instance(cls) -> "FunMatch":
        return cls(steps=2)


def _samples(batch: "Mapping[str, Tensor]") -> int:
    return len(next(iter(batch.values())))
