"""The deployments that serve a load within its limits at the least cost: all are screened, the best ones simulated.

A finalist that fails in the simulation gets replicas more, and one that does not gets fewer as long as it holds.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from narrows import energy
from narrows.diagnose import diagnose, seconds
from narrows.measured.table import Forecast
from narrows.plan import Plan
from narrows.search.deployments import EVERY, OWN, Config, Job, Side, Space
from narrows.search.screen import Point, Screened, screen
from narrows.simulate.closed_loop import preset
from narrows.simulate.fleet import serve
from narrows.simulate.outcome import Outcome
from narrows.step import Step
from narrows.validate import interval
from narrows.verify import known_quality

BRIEF = 4  # answers that a load must last for, or it is over before the replicas are full
TRIES = 4  # simulations of one finalist, with more or fewer replicas
STANDS_FOR = {"int4": "bf16 + awq:group=64"}  # formats of weights, and the plan whose verification tells what they cost


@dataclass(frozen=True)
class Choice:
    """A deployment with what its clients see; `outcome` is None where no simulation confirmed it.

    interval   80 %, of goodput and of the mean seconds to the first token and per further token: simulated again with every
               step as short, and as long, as the cost model's interval says; scaled so where nothing is simulated
    dollars_per_mtoken, joules_per_token   of output; None where a machine's file does not say
    """

    point: Point
    goodput: float
    attained: float | None
    ttft: dict[str, float]
    tpot: dict[str, float]
    interval: dict[str, tuple[float, float]]
    dollars_per_mtoken: float | None
    joules_per_token: float | None
    outcome: Outcome | None
    keeps: bool  # whether the simulation kept the limits

    @property
    def config(self) -> Config:
        return self.point.config


@dataclass(frozen=True)
class ServePlan:
    """The best deployments of a job, how many were looked at in how many seconds, and why others were not chosen."""

    job: Job
    evaluated: int
    seconds: float
    best: tuple[Choice, ...]
    why_not: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What else to know of the answer."""
        answer = next((c.outcome.e2e.mean for c in self.best if c.outcome and c.keeps), 0.0)
        lasts = len(self.job.requests) / self.job.rate
        brief = f"The load lasts {lasts:.1f} s and an answer takes {answer:.1f} s: give more requests for a steady state."
        known = dict.fromkeys(line for choice in self.best for line in taken_for_granted(choice.config))
        return (*([brief] if answer * BRIEF >= lasts else []), *known)


def plan_serve(job: Job, space: Space = EVERY, keep: int = 5, confirm: int = 12,
               stop: Callable[[], bool] = lambda: False) -> ServePlan:  # fmt: skip
    """The `keep` best deployments of a job, cheapest first among those that keep its limits.

    The `confirm` best ones of the screening are simulated, at most two of a family (machines, formats, together or apart).
    `stop` is asked before each: what is known by then is the answer. Of deployments in the model's own formats the best
    is among them.
    """
    begun = time.perf_counter()
    found = screen(job, space)
    chosen = [
        _unconfirmed(job, point) if at >= confirm or stop() else _confirmed(job, point)
        for at, point in enumerate(_finalists(job, found.points, confirm))
    ]
    ranked = list({str(c.config): c for c in sorted(chosen, key=lambda c: _standing(job, c))}.values())
    best = ranked[:keep]
    own = next((c for c in ranked if c.config.exact), None)
    if own is not None and own not in best:  # who does not want other formats sees what they would save
        best[-1] = own if own.outcome or not confirm or stop() else _confirmed(job, own.point)
    best = [choice if stop() else replace(choice, interval=_interval(job, choice)) for choice in best]
    return ServePlan(job, found.evaluated, time.perf_counter() - begun, tuple(best), _why_not(job, found, best))


def taken_for_granted(config: Config) -> list[str]:
    """What a deployment rests on that nobody measured here, and what its formats cost in quality where somebody did."""
    found = []
    formats = ("weights", config.precision), ("cache", config.cache)
    for what, name in ((what, name) for what, name in formats if name != OWN):
        known = known_quality(Plan.parse(STANDS_FOR[name])) if what == "weights" and name in STANDS_FOR else None
        price = "what it costs in quality was not measured"
        if known:
            measure, ratio, model = known
            price = f"{measure} times {ratio:.3f} with {STANDS_FOR[name]} on {model} (results/verified.csv), not on this model"
        found.append(f"{what}={name}: {price}.")
    if config.speculation:
        kept = config.speculation.acceptance
        found.append(f"{config.speculation}: that {kept:.0%} of the proposed tokens are kept was given, not measured.")
    if any(side.experts > 1 for side in config.sides):
        found.append("experts: all get equally many tokens, and devices that share them are in step.")
    return found


def _cost(job: Job, config: Config) -> float:
    return (config.dollars_per_hour if job.priced else None) or config.devices


def _finalists(job: Job, points: list[Point], confirm: int) -> list[Point]:
    """The best points, family by family: cheapest of those that carry the load, then those that carry most."""

    def key(point: Point) -> tuple[Any, ...]:
        short = point.rate < job.rate
        return short, -point.rate if short else _cost(job, point.config), -point.rate, str(point.config)

    families: dict[tuple[Any, ...], list[Point]] = {}
    for point in sorted(points, key=key):
        config = point.config
        names = tuple(side.machine.name for side in config.sides)
        families.setdefault((names, config.precision, config.cache, config.speculation is None), []).append(point)
    turns = [points[turn] for turn in range(2) for points in families.values() if turn < len(points)]
    return sorted(turns[: max(confirm, len(families))], key=key)


def _confirmed(job: Job, point: Point) -> Choice:
    """A finalist as simulated, with replicas more where it fails, and fewer as long as it does not."""
    tried = {str(point.config): _simulated(job, point)}
    choice = tried[str(point.config)]
    while len(tried) < TRIES and choice.outcome is not None:
        other = _neighbour(job, choice, -1 if choice.keeps else 1)
        if other is None or str(other.config) in tried:
            break
        tried[str(other.config)] = choice = _simulated(job, other)
    return min(tried.values(), key=lambda c: _standing(job, c))


def _neighbour(job: Job, choice: Choice, more: int) -> Point | None:
    """The deployment with replicas more or less: of those that read where the first token is late, else of those that answer."""
    config, late = choice.config, choice.outcome is not None and choice.outcome.ttft.quantile(job.share) > job.ttft
    reads = config.prefill if late else None
    side = reads or config.decode
    changed = replace(side, replicas=side.replicas + more * max(1, side.replicas // 20))
    new = replace(config, prefill=changed) if reads else replace(config, decode=changed)
    used: Counter[str] = Counter()
    for part in new.sides:
        used[part.machine.name] += part.devices
    there = {kind.machine.name: kind.count for kind in job.kinds}
    if changed.replicas < 1 or any(used[name] > there[name] for name in used):
        return None
    scale = changed.replicas / side.replicas
    return replace(choice.point, config=new, rate=choice.point.rate * scale, full=choice.point.full * scale)


def _simulated(job: Job, point: Point, scales: tuple[float, ...] = (1.0, 1.0)) -> Choice:
    """A deployment whose steps take `scales` times as long: those of replicas that answer, and that read for them."""
    group, reader = point.config.groups(job)
    reader = reader and replace(reader, scale=scales[1])
    seen = serve(job.requests, replace(group, scale=scales[0]), reader, ttft=job.ttft, tpot=job.tpot)
    attained = seen.good / max(seen.requests + seen.rejected, 1)
    # a load that is kept up with could go on: the time that the last answers take is not counted
    lasts = seen.seconds if attained < job.share or math.isinf(job.rate) else len(job.requests) / job.rate
    lasts = max(lasts, 1e-12)
    ttft, tpot = seen.ttft.as_json(), seen.tpot.as_json()
    return _choice(job, point, seen.good / lasts, attained, ttft, tpot, seen.tokens / lasts, seen)


def _interval(job: Job, choice: Choice) -> dict[str, tuple[float, float]]:
    """80 % intervals of a choice: the whole load once more, with steps at either end of theirs."""

    def figures(one: Choice) -> tuple[float, float, float]:
        return one.goodput, next(iter(one.ttft.values())), next(iter(one.tpot.values()))

    ends = [figures(choice)]
    for answers, reads in zip(*_scales(job, choice), strict=True):
        if choice.outcome:
            ends.append(figures(_simulated(job, choice.point, (answers, reads))))
        else:
            _, first, each = ends[0]
            ends.append((min(job.rate, choice.point.rate / max(answers, reads)), first * reads, each * answers))
    spans = [(min(values), max(values)) for values in zip(*ends, strict=True)]
    return dict(zip(("goodput", "ttft_s", "tpot_s"), spans, strict=True))


def _scales(job: Job, choice: Choice) -> list[tuple[float, float]]:
    """Factors (low, high) on the steps of replicas that answer, and on those of replicas that read for them.

    As wide as the spread of the kernels in a request's steps, and as what predictions of this engine were off where it was
    measured (`narrows validate`), whichever is wider.
    """
    config, batch = choice.config, max(choice.point.batch, 1)
    place = f"{job.graph.name} {config.decode.machine.name}"
    off = interval(Forecast("plan", math.nan, 1.0, f"tpot-{preset(job.engine.split('-')[0])}", 0.0, place))
    group, reader = config.groups(job)
    write, read = (
        [float(s) * times for s in seconds(one.share, one.machine, step, one.devices)]
        for one, step, times in ((group, Step.decode(batch, job.held), job.output / batch), (reader or group, job.typical, 1.0))
    )
    both = [a + b for a, b in zip(write, read, strict=True)]
    spans = (write, read) if reader else (both, both)
    return [(min(low / middle, off[0]), max(high / middle, off[1])) for middle, low, high in spans]


def _unconfirmed(job: Job, point: Point) -> Choice:
    carried = min(job.rate, point.rate)
    share = f"p{100 * job.share:.0f}"
    return _choice(job, point, carried, None, {share: point.ttft}, {"mean": point.tpot}, carried * job.output, None)


def _choice(job: Job, point: Point, goodput: float, attained: float | None, ttft: dict[str, float], tpot: dict[str, float],
            tokens_per_second: float, outcome: Outcome | None) -> Choice:  # fmt: skip
    config = point.config
    dollars = config.dollars_per_hour
    return Choice(
        point,
        goodput,
        attained,
        ttft,
        tpot,
        {},
        None if dollars is None else dollars / 3600 / tokens_per_second * 1e6 if tokens_per_second else math.inf,
        _joules(job, config, point.batch, tokens_per_second, min(1.0, tokens_per_second / job.output / point.full)),
        outcome,
        attained is not None and attained >= job.share,
    )


def _joules(job: Job, config: Config, batch: int, tokens_per_second: float, busy: float) -> float | None:
    """Joules for a token of output: its step, its share of reading the prompt, and of the devices while they wait."""
    draws = [energy.power(side.machine) for side in config.sides]
    if not tokens_per_second or not all(draws):
        return None
    group, reader = config.groups(job)
    drafts, many = config.speculation, max(batch, 1)
    ahead, taken = (drafts.ahead, drafts.taken) if drafts else (0, 1.0)
    steps = [(group, group.share, Step(many, 1 + ahead, job.held, phase="decode"), 1 / (many * taken)),
             ((reader or group), (reader or group).share, job.typical, 1 / job.output)]  # fmt: skip
    if drafts and drafts.draft:
        steps.append((group, drafts.draft, Step.decode(many, job.held), ahead / (many * taken)))
    work = 0.0
    for one, graph, step, share in steps:
        spent = diagnose(graph, one.machine, step, one.devices).energy
        if spent is None:
            return None
        work += spent.joules * one.devices * share
    waiting = sum(draw.idle * side.devices for draw, side in zip(draws, config.sides, strict=True) if draw)
    return work + waiting * (1 - busy) / tokens_per_second


def _standing(job: Job, choice: Choice) -> tuple[Any, ...]:
    """What sorts choices, the best first: keeps the limits, is cheap, is good."""
    good = choice.keeps
    return not good, choice.attained is None, _cost(job, choice.config) if good else 0.0, -choice.goodput, str(choice.config)


def _why_not(job: Job, found: Screened, best: list[Choice]) -> tuple[str, ...]:
    lines = [f"{reason} ({count:,})" for reason, count in found.reasons.most_common(8)]
    if best and not any(c.keeps for c in best) and any(c.outcome for c in best):
        lines.insert(0, f"none that was simulated keeps the limits for {job.share:.0%} of the requests: more devices are needed")
    return tuple(lines)


def as_json(plan: ServePlan) -> dict[str, Any]:
    """A plan as plain data: the stable contract of `narrows plan serve --json` (SI units)."""

    def side(one: Side | None) -> dict[str, Any] | None:
        if one is None:
            return None
        names = ("tensor", "pipeline", "experts", "replicas", "max_sequences", "max_tokens")
        return {"machine": one.machine.name, **{name: getattr(one, name) for name in names}}

    def plain(choice: Choice) -> dict[str, Any]:
        config = choice.config
        return {
            "config": {
                "text": str(config),
                "engine": config.engine,
                "weights": config.precision,
                "cache": config.cache,
                "devices": config.devices,
                **(side(config.decode) or {}),
                "prefill": side(config.prefill),
                "speculation": config.speculation and str(config.speculation),
            },
            "goodput": choice.goodput,
            "attained": choice.attained,
            "saturation": choice.point.full,
            "ttft_s": choice.ttft,
            "tpot_s": choice.tpot,
            "cost_per_mtoken": choice.dollars_per_mtoken,
            "energy_j_per_token": choice.joules_per_token,
            "interval": {name: list(span) for name, span in choice.interval.items()},
            "confirmed_by_simulation": choice.outcome is not None,
            "taken_for_granted": taken_for_granted(config),
        }

    job = plan.job
    return {
        "model": job.graph.name,
        "engine": job.engine,
        "requests": len(job.requests),
        "rate": None if math.isinf(job.rate) else job.rate,
        "limits": {"ttft_s": job.ttft, "tpot_s": job.tpot, "share": job.share},
        "evaluated": plan.evaluated,
        "seconds": plan.seconds,
        "best": [plain(choice) for choice in plan.best],
        "why_not": list(plan.why_not),
        "notes": list(plan.notes),
    }
