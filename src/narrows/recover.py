"""A step of a plan that gives back what those before it have cost: the changed model is trained to answer as it did before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from narrows.errors import NarrowsError
from narrows.progress import Tell
from narrows.step import Step
from narrows.technique import Card, Example, Lessons, Recovers, Stage, choice

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Recover(Recovers):
    """Distil the model that a plan was given into what its steps have made of it, on unlabelled batches.

    The teacher answers each batch once, before it is changed: what is kept is how likely its likeliest classes are, a few
    hundred bytes a token and not a vocabulary of logits, so that no second model is held.
    """

    card: ClassVar[Card] = Card(
        "recover",
        (),
        ("prefill", "decode", "forward"),
        exact=False,
        claims=(),
        price="minutes of training for a language model of 135 M parameters, seconds for a small convolutional network",
        stage=Stage.RECOVER,
        needs=("calibration", "training"),
    )

    steps: int = choice(64, 256, 16, help="batches that it trains on, some of them again where there are fewer")
    rate: float = choice(1e-3, 1e-2, help="share of a weight's size that a step moves it by; small networks bear 1e-2")
    classes: int = choice(64, help="likeliest classes, or tokens, of which the teacher's answer is kept")

    def __post_init__(self) -> None:
        if self.steps < 0 or not 0 < self.rate < 1 or self.classes < 1:
            remedy = "Give steps from 0 on, a rate between 0 and 1, and at least one class."
            raise NarrowsError(f"{self} is not possible.", where="recover", remedy=remedy)

    def baseline(self) -> "Recover":
        return replace(self, steps=0)

    def remember(self, teacher: "torch.nn.Module", data: "Sequence[Mapping[str, torch.Tensor]]", tell: Tell) -> Lessons:
        from narrows.modules.calibration import require_data
        from narrows.modules.distillation import answers, turn

        require_data(data, "it needs", "recover")
        batches = data[: self.steps]
        said = []
        for i, batch in enumerate(batches):
            tell("asking the teacher", i, len(batches))
            said.append(answers(teacher, batch, self.classes))

        def lesson(step: int) -> object:
            at = turn(step, len(batches))
            return batches[at], said[at]

        return lesson

    def recover(self, model: "torch.nn.Module", lessons: Lessons, tell: Tell) -> "torch.nn.Module":
        from narrows.modules.distillation import train

        return train(model, lessons, self.steps, self.rate, tell)

    @classmethod
    def example(cls) -> Example:
        from narrows.samples import tiny_llama

        model, data = tiny_llama(2, tokens=16)
        return Example(model.eval(), data, Step.decode(1, 16))

    @classmethod
    def example_instance(cls) -> "Recover":
        return cls(steps=2)
