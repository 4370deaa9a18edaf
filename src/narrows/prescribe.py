"""Which techniques would make a step faster or smaller here, by how much, and why the others would not."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any

from narrows.diagnose import Diagnosis, diagnose, prepared
from narrows.footprint import footprint
from narrows.free import FREE
from narrows.gain import gain, parts
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.own import OWN
from narrows.papers import papers
from narrows.plan import Plan, Prepare, named
from narrows.progress import Tell, silent
from narrows.step import Step
from narrows.technique import Described, No, Recovers, Rewrites, Technique, Trains
from narrows.verify import known_quality

WORTHWHILE = 1.02  # a predicted gain below this is within what no measurement here could tell from noise
COMBINED = 6  # so many of the best single techniques are tried together


@dataclass(frozen=True)
class Option:
    """A plan and what it is predicted to do to the step: times as fast as now, with the interval of that ratio.

    over_free   times as fast as the best of what is free (bf16, compile)
    bytes_saved of the step's peak memory;  fits  whether the rest fits the machine
    quality     what a kept verification of this plan measured, on which model; its ratio after to before
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
    quality: str = ""
    quality_ratio: float | None = None


@dataclass(frozen=True)
class Prescription:
    """Free plans first, then techniques and their combinations by predicted gain, then why not the rest, by slug."""

    before: Diagnosis
    free: tuple[Option, ...]
    options: tuple[Option, ...]
    why_not: dict[str, str]

    @property
    def best(self) -> Option | None:
        """The fastest that fits."""
        return max((*self.free, *self.options), key=lambda o: (o.fits, o.gain), default=None)

    def within(self, ratio: float) -> "Prescription":
        """Only plans that are exact, or whose measured perplexity is at most `ratio` times the original's (other measures: at
        least its inverse)."""

        def kept(option: Option) -> bool:
            if option.exact or option.quality_ratio is None:
                return option.exact
            return option.quality_ratio <= ratio if option.quality.startswith("perplexity") else option.quality_ratio >= 1 / ratio

        return replace(self, free=tuple(filter(kept, self.free)), options=tuple(filter(kept, self.options)))


def prescribe(
    graph: Graph,
    machine: Machine,
    step: Step,
    devices: int = 1,
    replicas: int = 1,
    tell: Tell = silent,
) -> Prescription:
    """Rank every built technique, and pairs of the best, for a model on a machine at a step.

    Each is tried as it is and on top of what is free; the variant is shown that is best.

    The first instance in a technique's space that its check accepts is taken: the defaults, unless the model rules
    them out. Gains are ratios of two predictions of one cost model, so what it gets wrong on both sides cancels.
    """
    before = diagnose(graph, machine, step, devices, replicas)

    def ready(changed: Graph) -> Graph:
        return prepared(changed, step, machine, devices, replicas)

    base = parts(ready(graph), machine, step)
    held = float(before.footprint.total_bytes)

    def predict(plan: Plan, free: float) -> Option:
        changed = plan.rewrite(graph, ready)
        times = parts(changed, machine, step)
        ratio, *ends = gain(base, times)
        peak, known = footprint(changed, step), known_quality(plan)
        return Option(
            plan,
            times.seconds,
            ratio,
            (ends[0], ends[1]),
            free / times.seconds,
            held - float(peak.total_bytes),
            bool(peak.fits(machine)),
            all(t.card.exact for t in plan),
            "; ".join(t.card.price for t in plan if t.card.price),
            tuple(dict.fromkeys(n for t in plan for n in t.card.needs)),
            f"{known[0]} {known[1]:.3g} x on {known[2]}, measured" if known else "",
            known[1] if known else None,
        )

    why_not: dict[str, str] = {}
    singles: list[Rewrites | Trains] = []
    free_steps: list[Rewrites | Trains] = []
    slugs = [*FREE, *OWN, *(p.slug for p in papers())]
    for at, slug in enumerate(slugs):
        tell(slug, at, len(slugs))
        found = _fitting(named(slug), graph, ready, machine, step)
        if isinstance(found, No):
            why_not[slug] = found.reason
        else:
            (free_steps if slug in FREE else singles).append(found)

    def allowed(steps: Sequence[Rewrites | Trains]) -> bool:
        return bool(Plan(tuple(steps)).check(graph, machine, step, ready))

    frees = [(), *(c for n in (1, 2) for c in combinations(free_steps, n) if allowed(c))]
    free = _ranked([predict(Plan(steps), base.seconds) for steps in frees if steps])
    best_free = min([base.seconds, *(o.seconds for o in free)])

    def best(*parts: Rewrites | Trains) -> Option | None:
        """The techniques together, with whatever is free if that makes them better."""
        found = [predict(Plan((*parts, *steps)), best_free) for steps in frees if allowed((*parts, *steps))]
        plain = next((o for o in found if len(o.plan.steps) == len(parts)), None)
        better = [o for o in found if plain is None or (o.fits, o.gain) > (plain.fits, plain.gain * WORTHWHILE)]
        return max(better, key=lambda o: (o.fits, o.gain), default=plain)

    useful: dict[Rewrites | Trains, Option] = {}
    for one in singles:
        option = best(one)
        if option is not None and _helps(option, before):
            useful[one] = option
        elif option is not None:
            relieved = ", ".join(one.card.relieves)
            why_not[one.card.slug] = (
                f"predicted {option.gain:.2f} x, {option.over_free:.2f} x of what is free, {-option.bytes_saved / 1e6:+.0f} MB: "
                f"it relieves {relieved}; this step is limited by {before.limit}"
            )
    top = sorted(useful, key=lambda one: -useful[one].gain)[:COMBINED]
    pairs = [option for pair in combinations(top, 2) if (option := best(*pair)) is not None]
    together = [o for o in pairs if o.gain > max(useful[t].gain for t in o.plan if t in useful) * WORTHWHILE]
    return Prescription(before, tuple(free), tuple(_ranked([*useful.values(), *together])), why_not)


def _ranked(options: list[Option]) -> list[Option]:
    return sorted(options, key=lambda o: (-o.fits, -o.gain, -o.bytes_saved))


def _helps(option: Option, before: Diagnosis) -> bool:
    """It beats what is free, or makes a step fit that does not, or frees a tenth of its memory at no loss of speed."""
    smaller = option.bytes_saved > 0.1 * float(before.footprint.total_bytes) and option.gain > 1 / WORTHWHILE
    return option.over_free >= WORTHWHILE or (option.fits and not before.fits) or smaller


def _fitting(
    found: type[Technique] | Described | None, graph: Graph, ready: Prepare, machine: Machine, step: Step
) -> Rewrites | Trains | No:
    """The first instance of a technique that accepts this graph, or why none does."""
    if found is None or isinstance(found, Described):
        return No("described only: it has no code here yet")
    if not issubclass(found, Rewrites | Trains):
        return No("an analysis: it changes nothing")
    if issubclass(found, Recovers):
        return No("it speeds nothing up: written behind steps of a plan, it gives back quality that they cost")
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
        known = {f.name: getattr(option, f.name) for f in fields(option)}
        return {**known, "plan": str(option.plan), "interval": list(option.interval), "needs": list(option.needs)}

    return {
        "model": found.before.model,
        "machine": found.before.machine.name,
        "step_seconds": found.before.seconds,
        "limit": found.before.limit.value,
        "free": [plain(o) for o in found.free],
        "options": [plain(o) for o in found.options],
        "best": str(found.best.plan) if found.best else None,
        "why_not": [{"slug": slug, "reason": reason} for slug, reason in found.why_not.items()],
    }
