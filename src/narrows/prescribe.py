"""Which techniques would make a step faster or smaller here, by how much, and why the others would not."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

from narrows.diagnose import Diagnosis, diagnose, prepared, timed
from narrows.footprint import footprint
from narrows.free import FREE
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.papers import papers
from narrows.plan import Plan, Prepare
from narrows.step import Step
from narrows.technique import Described, No, Rewrites, Technique, Trains, technique

WORTHWHILE = 1.02  # a predicted gain below this is within what no measurement here could tell from noise
COMBINED = 6  # so many of the best single techniques are tried together


@dataclass(frozen=True)
class Option:
    """A plan and what it is predicted to do to the step: times as fast as now, with the interval of that ratio.

    over_free   times as fast as the best of what is free (bf16, compile)
    bytes_saved of the step's peak memory;  fits  whether the rest fits the machine
    """

    plan: Plan
    seconds: float
    gain: float
    interval: tuple[float, float]
    over_free: float
    bytes_saved: float
    fits: bool
    exact: bool
    price: str
    needs: tuple[str, ...]


@dataclass(frozen=True)
class Prescription:
    """Free plans first, then techniques and their combinations by predicted gain, then why not the rest, by slug."""

    before: Diagnosis
    free: tuple[Option, ...]
    options: tuple[Option, ...]
    why_not: dict[str, str]

    @property
    def best(self) -> Option | None:
        return max((*self.free, *self.options), key=lambda o: (o.fits, o.gain), default=None)


def prescribe(
    graph: Graph, machine: Machine, step: Step, devices: int = 1, replicas: int = 1, progress: Callable[[str], None] = lambda _: None
) -> Prescription:
    """Rank every built technique, and pairs of the best, for a model on a machine at a step.

    The first instance in a technique's space that its check accepts is taken: the defaults, unless the model rules
    them out. Gains are ratios of two predictions of one cost model, so what it gets wrong on both sides cancels.
    """
    before = diagnose(graph, machine, step, devices, replicas)

    def ready(changed: Graph) -> Graph:
        return prepared(changed, step, machine, devices, replicas)

    base = tuple(float(t) for t in timed(ready(graph), machine, step))  # type: ignore[arg-type]
    held = float(before.footprint.total_bytes)

    def predict(plan: Plan, free: float) -> Option:
        changed = plan.rewrite(graph, ready)
        times = tuple(float(t) for t in timed(changed, machine, step))  # type: ignore[arg-type]
        ratios = [a / b for a, b in zip(base, times, strict=True)]
        peak = footprint(changed, step)
        return Option(plan, times[0], ratios[0], (min(ratios), max(ratios)), free / times[0], held - float(peak.total_bytes), bool(peak.fits(machine)),
                      all(t.card.exact for t in plan), "; ".join(t.card.price for t in plan if t.card.price),
                      tuple(dict.fromkeys(n for t in plan for n in t.card.needs)))  # fmt: skip

    why_not: dict[str, str] = {}
    singles: list[Rewrites | Trains] = []
    free_steps: list[Rewrites | Trains] = []
    for slug in [*FREE, *(p.slug for p in papers())]:
        progress(slug)
        found = _fitting(FREE.get(slug) or technique(slug), graph, ready, machine, step)
        if isinstance(found, No):
            why_not[slug] = found.reason
        else:
            (free_steps if slug in FREE else singles).append(found)

    free = _ranked([predict(Plan(tuple(c)), base[0]) for n in (1, 2) for c in combinations(free_steps, n) if Plan(tuple(c)).check(graph, machine, step, ready)])
    best_free = min([base[0], *(o.seconds for o in free)])
    ranked = _ranked([predict(Plan((one,)), best_free) for one in singles])
    for option in ranked:
        if not _helps(option, before):
            slug = option.plan.steps[0].card.slug
            relieved = ", ".join(option.plan.steps[0].card.relieves)
            why_not[slug] = f"predicted {option.gain:.2f} x and {option.bytes_saved / 1e6:+.0f} MB: it relieves {relieved}; this step is limited by {before.limit}"
    useful = [o for o in ranked if _helps(o, before)]
    parts = [o.plan.steps[0] for o in useful[:COMBINED]] + free_steps
    pairs = [Plan(pair) for pair in combinations(parts, 2) if not all(t in free_steps for t in pair)]
    combined = [predict(plan, best_free) for plan in pairs if plan.check(graph, machine, step, ready)]
    gains = {o.plan.steps[0]: o.gain for o in (*useful, *free) if len(o.plan.steps) == 1}
    better = [o for o in combined if o.gain > max(gains.get(t, 1.0) for t in o.plan) * WORTHWHILE]
    return Prescription(before, tuple(free), tuple(_ranked([*useful, *better])), why_not)


def _ranked(options: list[Option]) -> list[Option]:
    return sorted(options, key=lambda o: (-o.fits, -o.gain, -o.bytes_saved))


def _helps(option: Option, before: Diagnosis) -> bool:
    """It is faster, or it makes a step fit that does not, or frees a tenth of its memory at no loss of speed."""
    smaller = option.bytes_saved > 0.1 * float(before.footprint.total_bytes) and option.gain > 1 / WORTHWHILE
    return option.gain >= WORTHWHILE or (option.fits and not before.fits) or smaller


def _fitting(
    found: type[Technique] | Described, graph: Graph, ready: Prepare, machine: Machine, step: Step
) -> Rewrites | Trains | No:
    """The first instance of a technique that accepts this graph, or why none does."""
    if isinstance(found, Described):
        return No("described only: it has no code here yet")
    if not issubclass(found, Rewrites | Trains):
        return No("an analysis: it changes nothing")
    if step.phase not in found.card.phases:
        return No(f"it helps {' and '.join(found.card.phases)}, not {step.phase}")
    reason = No("")
    for instance in found.space():
        verdict = Plan((instance,)).check(graph, machine, step, ready)  # type: ignore[arg-type]
        if verdict:
            return instance  # type: ignore[return-value]
        reason = reason if reason.reason or not isinstance(verdict, No) else verdict
    return reason


def as_json(found: Prescription) -> dict[str, Any]:
    """A prescription as plain data."""

    def plain(option: Option) -> dict[str, Any]:
        return {**{f.name: getattr(option, f.name) for f in fields(option)}, "plan": str(option.plan)}

    return {
        "model": found.before.model,
        "machine": found.before.machine.name,
        "step_seconds": found.before.seconds,
        "limit": found.before.limit.value,
        "free": [plain(o) for o in found.free],
        "options": [plain(o) for o in found.options],
        "why_not": [{"slug": slug, "reason": reason} for slug, reason in found.why_not.items()],
    }
