"""An ordered composition of techniques that is checked, rewritten and applied as one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from narrows.errors import NarrowsError, closest
from narrows.free import FREE
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.own import OWN
from narrows.papers import papers
from narrows.progress import Tell, silent
from narrows.step import Step
from narrows.technique import Described, No, Recovers, Rewrites, Stage, Technique, Trains, Verdict, built, technique

if TYPE_CHECKING:
    import torch


Prepare = Callable[[Graph], Graph]
Batches = Sequence[Mapping[str, "torch.Tensor"]]

# Why a stage comes before all later ones.
BEFORE = {
    Stage.REMOVE: "what is removed needs no further work, and what is left is judged as it was trained",
    Stage.FACTOR: "layers are split by their full weights, before these are rounded or packed",
    Stage.RECOVER: "weights that are rounded or packed can no longer be trained",
    Stage.CAST: "packed weights keep the dtype of what they are made from",
    Stage.QUANTIZE: "a cache is judged with the weights that will fill it",
    Stage.CACHE: "what is trained or compiled must be the final model",
    Stage.TRAIN: "what is compiled must be the final model",
}


def _as_it_is(graph: Graph) -> Graph:
    return graph


@dataclass(frozen=True)
class Plan:
    """Techniques in the order in which they are applied: by stage, whatever order they were given in.

    One that recovers what others cost stays behind those that it was written after, as long as weights can be trained.
    Two techniques of one stage that touch the same part exclude each other. `moved` says which pair was exchanged and why,
    '' where the order given was right. `Plan.parse(str(plan)) == plan`.
    """

    steps: tuple[Rewrites | Trains, ...] = ()
    moved: str = field(default="", init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for step in self.steps:
            if not isinstance(step, Rewrites | Trains):
                raise NarrowsError(f"{type(step).__name__} does not change a model.", where="plan", remedy="Use it on its own.")
        placed = [(self._place(i), one) for i, one in enumerate(self.steps)]
        wrong = next(((a[1], b[1]) for a, b in pairwise(placed) if a[0] > b[0]), None)
        if wrong:
            late, early = (one.card for one in wrong)
            object.__setattr__(self, "moved", f"{early.slug} is applied before {late.slug}: {BEFORE[early.stage]}")
        object.__setattr__(self, "steps", tuple(one for _, one in sorted(placed, key=lambda pair: pair[0])))

    def _place(self, i: int) -> Stage:
        """The stage in which step i is applied."""
        stage = self.steps[i].card.stage
        earlier = [one.card.stage for one in self.steps[:i] if not isinstance(one, Recovers)]
        return min(stage, max(earlier)) if isinstance(self.steps[i], Recovers) and earlier else stage

    def __iter__(self) -> Iterator[Rewrites | Trains]:
        return iter(self.steps)

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """From its command-line form: `llm-drop:attention=4 + awq:group=64`."""
        steps = [parse(part) for part in text.split("+") if part.strip()]
        return cls(tuple(steps))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return " + ".join(_written(step) for step in self.steps)

    def conflict(self) -> Verdict:
        """True, or No naming the two techniques that exclude each other."""
        for i, one in enumerate(self.steps):
            for other in self.steps[i + 1 :]:
                shared = set(one.card.touches) & set(other.card.touches)
                twice = one.card.slug == other.card.slug and not isinstance(one, Recovers)
                if twice or (shared and one.card.stage == other.card.stage):
                    return No(
                        f"{one.card.slug} and {other.card.slug} both change {' and '.join(sorted(shared)) or 'the same thing'}"
                    )
        return True

    def check(self, graph: Graph, machine: Machine | None, step: Step, prepare: Prepare = _as_it_is) -> Verdict:
        """True, or the first refusal; each technique is asked about the graph that the ones before it leave.

        `prepare` makes the training graph (see `diagnose.prepared`), which is what techniques of training look at.
        """
        verdict = self.conflict()
        for one, ready in self._in_turn(prepare):
            graph = ready(graph)
            verdict = verdict and one.check(graph, machine, step)
            if not verdict:
                return verdict
            graph = one.rewrite(graph)
        return verdict

    def rewrite(self, graph: Graph, prepare: Prepare = _as_it_is) -> Graph:
        """The graph after all of them, prepared for its step."""
        for one, ready in self._in_turn(prepare):
            graph = one.rewrite(ready(graph))
        return graph if any(isinstance(one, Trains) for one in self.steps) else prepare(graph)

    def _in_turn(self, prepare: Prepare) -> Iterator[tuple[Rewrites | Trains, Prepare]]:
        """Each technique with what is to be done to the graph before it: the first that trains sees it prepared."""
        first = next((one for one in self.steps if isinstance(one, Trains)), None)
        for one in self.steps:
            yield one, prepare if one is first else _as_it_is

    def apply(
        self, model: "torch.nn.Module", data: Batches = (), training: Batches = (), tell: Tell = silent
    ) -> "torch.nn.Module":
        """The model after all of them; the one given is spent.

        training: what steps that recover learn on, unlabelled; `data`, on which the others calibrate, if nothing is given.
        Raises NarrowsError where calibration data is missing, or a weight is NaN or infinite, before anything is changed.
        """
        for changed in self.applied(model, data, training, tell):
            model = changed
        return model

    def applied(
        self, model: "torch.nn.Module", data: Batches = (), training: Batches = (), tell: Tell = silent
    ) -> "Iterator[torch.nn.Module]":
        """The model after each step in turn, as `apply` makes it; the next step spends it."""
        steps = [one for one in self.steps if isinstance(one, Rewrites)]
        for one in self.steps:
            slug = one.card.slug
            if one not in steps:
                raise NarrowsError(f"{slug} changes how a model is trained.", where="plan", remedy="Use its attach().")
            if "calibration" in one.card.needs and not data:
                raise NarrowsError(f"{slug} needs calibration data.", where="plan", remedy="Pass a few batches, or --text FILE.")
        for name, weight in model.named_parameters():
            if weight.is_floating_point() and not weight.is_meta and not weight.isfinite().all():
                raise NarrowsError("holds NaN or infinite numbers.", where=name, remedy="Repair the model first.")
        lessons = {one: one.remember(model, training or data, tell) for one in steps if isinstance(one, Recovers)}
        for one in steps:
            tell(f"applying {one.card.slug}")
            model = one.recover(model, lessons[one], tell) if isinstance(one, Recovers) else one.apply(model, data)
            yield model


def _written(technique: Technique) -> str:
    changed: list[Any] = [
        (f.name, getattr(technique, f.name))
        for f in fields(technique)  # type: ignore[arg-type]
        if getattr(technique, f.name) != f.default
    ]
    return technique.card.slug + (":" if changed else "") + ",".join(f"{n}={v}" for n, v in changed)


_FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def named(slug: str) -> type[Technique] | Described | None:
    """The technique of a name that a plan may use: what is free, what is our own, or a row of the catalogue."""
    return FREE.get(slug) or OWN.get(slug) or (technique(slug) if slug in {p.slug for p in papers()} else None)


def parse(text: str) -> Technique:
    """A technique from its command-line form, `awq` or `awq:bits=4,group=64`; unknown options raise."""
    slug, _, options = text.strip().partition(":")
    found = named(slug)
    if found is None:
        raise NarrowsError(f"no technique is called {slug!r}.", where="plan", remedy=closest(slug, [*built(), *FREE, *OWN]))
    if isinstance(found, Described):
        raise NarrowsError(
            f"{slug} is described but not built.", where="plan", remedy="`narrows papers --status built` lists what is."
        )
    kinds: dict[str, Any] = {f.name: type(f.default) for f in fields(found)}  # type: ignore[arg-type]
    chosen: dict[str, Any] = {}
    for part in filter(None, options.split(",")):
        name, _, value = part.partition("=")
        if name not in kinds:
            raise NarrowsError(f"{slug} has no option {name!r}.", where="plan", remedy=f"It has {', '.join(kinds) or 'none'}.")
        try:
            chosen[name] = _FLAGS[value.lower()] if kinds[name] is bool else kinds[name](value)
        except (ValueError, KeyError) as error:
            raise NarrowsError(f"{value!r} is not a {kinds[name].__name__}.", where=f"plan: {slug}: {name}") from error
    return found(**chosen)
