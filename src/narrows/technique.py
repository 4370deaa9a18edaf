"""What a technique is: a card that says what a paper claims, and a face that says what narrows can do with it.

One technique is one frozen dataclass in `techniques/<family>/<slug>.py`; its fields are its options, its search
space and its command line at once. The registry is a listing of that folder.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import IntEnum
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.papers import Paper, module_name, paper, papers
from narrows.progress import Tell, silent
from narrows.step import Step

if TYPE_CHECKING:
    import torch

    from narrows.simulate.demand import Demand, Deployment
    from narrows.simulate.pipeline import Order, Work
    from narrows.simulate.timeline import Timeline


@dataclass(frozen=True, slots=True)
class No:
    """A refusal: false in a condition, with the reason and its figure."""

    reason: str

    def __bool__(self) -> bool:
        return False


Verdict = bool | No


class Stage(IntEnum):
    """Where in a composition a technique comes: what removes work first, what changes number formats after."""

    REMOVE = 10
    FACTOR = 20
    RECOVER = 22
    CAST = 25
    QUANTIZE = 30
    CACHE = 40
    TRAIN = 50
    RUN = 60


@dataclass(frozen=True, slots=True)
class Claim:
    """One figure of a paper as data, and what ours must be for the claim to count as reproduced.

    name       identifies it within the technique, and names the experiment function that measures it
    paper      the paper's figure in `unit`, None where it states a direction alone; `setting` and `where` say under
               what conditions, and its place
    at_least, at_most   the tolerance on our figure, with `why` it is that
    how        run (on a real small model), simulated, or checked (against a closed form or a table)
    """

    name: str
    unit: str
    paper: float | None
    setting: str
    where: str
    how: str
    why: str
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, ours: float) -> bool:
        """Whether a measured figure reproduces the claim (NaN never does)."""
        if self.at_least is None and self.at_most is None:
            raise NarrowsError("the claim has no tolerance.", where=self.name, remedy="Give at_least, at_most or both.")
        return (self.at_least is None or ours >= self.at_least) and (self.at_most is None or ours <= self.at_most)

    @property
    def tolerance(self) -> str:
        bounds = [
            f">= {self.at_least:g}" if self.at_least is not None else "",
            f"<= {self.at_most:g}" if self.at_most is not None else "",
        ]
        return " and ".join(b for b in bounds if b)


@dataclass(frozen=True, slots=True)
class Card:
    """What is known of a technique without running it.

    relieves   the limits it widens;  phases  the kinds of step it helps
    exact      it leaves the function unchanged;  price  one sentence: what it costs in quality or training
    touches    the parts it changes: two techniques of one stage that touch the same part exclude each other
    needs      what `apply` must be given besides the model: "calibration" data, "training"
    blockwise  `apply` works on one block after another as on the whole model: it can be streamed (see `streaming`)
    """

    slug: str
    relieves: tuple[Limit, ...]
    phases: tuple[str, ...]
    exact: bool
    claims: tuple[Claim, ...]
    price: str = ""
    stage: Stage = Stage.REMOVE
    touches: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    blockwise: bool = False


def choice(first: Any, *others: Any, help: str = "") -> Any:
    """A field of a technique with its default and the other values worth trying; docs, search and CLI read it."""
    return field(default=first, metadata={"choices": (first, *others), "help": help})


class Technique(ABC):
    """One published idea. Final classes are frozen dataclasses with a `card`."""

    card: ClassVar[Card]

    @abstractmethod
    def baseline(self) -> "Technique":
        """The same face without the idea: what the claims must beat (rounding to nearest, random choice, plain Adam)."""

    @property
    def paper(self) -> Paper:
        return paper(self.card.slug)

    @classmethod
    def space(cls) -> list["Technique"]:
        """Its instances that a search tries: every combination of the choices of its fields, defaults first."""
        found: list[dict[str, Any]] = [{}]
        for f in fields(cls):  # type: ignore[arg-type]
            values = f.metadata.get("choices", () if f.default is MISSING else (f.default,))
            found = [{**one, f.name: value} for value in values for one in found]
        return [cls(**one) for one in found]


@dataclass(frozen=True)
class Example:
    """The smallest model a technique applies to, with data and the step it helps; every contract test runs on it.

    data: batches of keyword arguments of the model's forward, used to calibrate and to compare before and after.
    """

    model: "torch.nn.Module"
    data: Sequence[Mapping[str, "torch.Tensor"]]
    step: Step


class Rewrites(Technique):
    """A change of the model, told twice: on the Graph and on the module. The two must agree (the square commutes)."""

    @abstractmethod
    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        """True, or No with the reason it does not apply here."""

    @abstractmethod
    def rewrite(self, graph: Graph) -> Graph:
        """The graph as it will be after `apply`."""

    @abstractmethod
    def apply(self, model: "torch.nn.Module", data: Sequence[Mapping[str, "torch.Tensor"]]) -> "torch.nn.Module":
        """The changed model; the one given is spent. `data` calibrates (batches of forward's keyword arguments)."""

    def restructure(self, model: "torch.nn.Module") -> "torch.nn.Module":
        """The structure that `apply` leaves, from the original one and without data: saved weights are loaded into it."""
        return model

    @classmethod
    @abstractmethod
    def example(cls) -> Example:
        """The smallest model this applies to."""

    @classmethod
    def example_instance(cls) -> "Rewrites":
        """The instance that fits `example()`; the defaults, unless the example is too small for them."""
        return cls()


Lessons = Callable[[int], Any]  # from the number of a step of training: what a model is given in it, and its teacher's answers


class Recovers(Rewrites):
    """Training that gives back what the steps of a plan before it have cost: the teacher is the model that the plan was given.

    What must be known of the teacher is kept before the first step spends it. The graph's work stays as it is.
    """

    @abstractmethod
    def remember(self, teacher: "torch.nn.Module", data: Sequence[Mapping[str, "torch.Tensor"]], tell: Tell) -> Lessons:
        """What is kept of the teacher; it holds none of its weights, unless the technique says so."""

    @abstractmethod
    def recover(self, model: "torch.nn.Module", lessons: Lessons, tell: Tell) -> "torch.nn.Module":
        """The model after training on what was kept; the one given is spent."""

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        layers = [op for op in graph if op.weight is not None]
        for op in layers:
            if op.weight and (op.weight.scale_bits or op.weight.bits < 16):
                return No(f"{op.name} keeps its weights as {op.weight.name}, which cannot be trained: recover before packing")
        return True if layers else No("it has no weights to train")

    def rewrite(self, graph: Graph) -> Graph:
        return graph

    def apply(self, model: "torch.nn.Module", data: Sequence[Mapping[str, "torch.Tensor"]]) -> "torch.nn.Module":
        """With itself as the teacher: what it can give back alone. In a plan, `Plan.apply` names the teacher."""
        return self.recover(model, self.remember(model, data, silent), silent)


class Trains(Technique):
    """A way to train: an optimizer, a gradient compression, a loss. Its effect on communication shows in `rewrite`."""

    @abstractmethod
    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict: ...

    @abstractmethod
    def rewrite(self, graph: Graph) -> Graph:
        """The training graph (with its collectives and optimizer) under this technique, in its steady state."""

    @abstractmethod
    def attach(self, model: "torch.nn.Module", **options: Any) -> "torch.optim.Optimizer":
        """Set the model up to train this way (DDP hooks included) and give the optimizer to step with."""


@dataclass(frozen=True)
class Reading:
    """What an analysis found: headline values by name with their unit, and rows for a table or a plot."""

    values: Mapping[str, float]
    units: Mapping[str, str] = field(default_factory=dict)
    rows: tuple[Mapping[str, Any], ...] = ()


class Measures(Technique):
    """An analysis: it changes nothing and tells something."""

    @abstractmethod
    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """What the analysis says of this graph on this machine."""


class Schedules(Technique):
    """An order in which the ranks of a pipeline do their work; it is simulated, and runtimes that take orders run it.

    `Work` holds the seconds and bytes of each stage: measured ones, or those of `narrows.simulate.stages.cut`.
    """

    @abstractmethod
    def check(self, work: "Work") -> Verdict:
        """True, or No with the reason it does not apply to this work."""

    def adapt(self, work: "Work") -> "Work":
        """The work as it becomes: recomputed, split finer, spread more evenly. The same, unless the technique changes it."""
        return work

    @abstractmethod
    def order(self, work: "Work") -> "Order":
        """Which passes each rank runs, in turn; its `to_actions` gives it to `torch.distributed.pipelining`."""

    def play(self, work: "Work") -> "Timeline":
        """What runs when, with the bubble and the memory it takes."""
        return self.order(work).play(self.adapt(work))


class Serves(Technique):
    """A policy of serving: what to run where for a load, and by which rules. The serving simulator plays it."""

    @abstractmethod
    def baseline(self) -> "Serves":
        """The policy that its paper compares it with."""

    @abstractmethod
    def check(self, demand: "Demand") -> Verdict:
        """True, or No with the reason it does not apply to this load on these devices."""

    @abstractmethod
    def deploy(self, demand: "Demand") -> "Deployment":
        """What to run in place of `demand.group`, on devices of the same number or cost."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate that was tried, with its score; infinite where it cannot run."""

    candidate: Mapping[str, Any]
    score: float


class Searches(Technique):
    """A way to find the best of many candidates when trying one is dear: it learns from the scores it has seen."""

    @abstractmethod
    def search(
        self,
        candidates: Sequence[Mapping[str, Any]],
        score: Callable[[Mapping[str, Any]], float],
        budget: int,
        seed: int = 0,
        known: Sequence[Trial] = (),
    ) -> tuple[Trial, ...]:
        """At most `budget` new trials, in the order tried, each of another candidate; the least score is best.

        candidates: every allowed combination of choices, all with the same names. score: what a candidate costs, in
        any unit, infinite where it fails. known: trials of earlier jobs, which cost no budget.
        """


@dataclass(frozen=True)
class Described:
    """A paper that is known and not built: its catalogue row alone."""

    paper: Paper


def _module_path(row: Paper) -> str:
    return f"{module_name(row.family)}.{module_name(row.slug)}"


@cache
def built() -> tuple[str, ...]:
    """Slugs that have a file in `techniques/`, in catalogue order (nothing is imported)."""
    root = files("narrows.techniques")
    return tuple(
        p.slug
        for p in papers()
        if root.joinpath(*_module_path(p).split(".")[:1], _module_path(p).split(".")[1] + ".py").is_file()
    )


@cache
def technique(slug: str) -> type[Technique] | Described:
    """The technique of a catalogue row; a file that is broken raises, a row without a file is Described."""
    row = paper(slug)
    if slug not in built():
        return Described(row)
    module = importlib.import_module(f"narrows.techniques.{_module_path(row)}")
    return technique_class(module, slug)


def technique_class(module: Any, slug: str) -> type[Technique]:
    """The one class in a technique's file that carries its card."""
    found = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Technique) and getattr(getattr(c, "card", None), "slug", None) == slug
    ]
    if len(found) != 1:
        raise NarrowsError(
            f"{len(found)} classes carry a card for {slug!r}.",
            where=module.__name__,
            remedy="A technique file defines exactly one.",
        )
    return found[0]


def face(found: type[Technique] | Described) -> str:
    """What narrows can do with a paper: Rewrites, Recovers, Trains, Measures, Schedules, Serves, Searches, or Described."""
    if isinstance(found, Described):
        return "Described"
    return next(base.__name__ for base in found.__mro__[1:] if base.__module__ == __name__)


def techniques() -> dict[str, type[Technique]]:
    """Every built technique by slug."""
    return {slug: t for slug in built() if not isinstance(t := technique(slug), Described)}
