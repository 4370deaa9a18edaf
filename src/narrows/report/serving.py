"""Words and tables on serving: what a load saw beyond its latencies, and the best deployments of a plan with their cost."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from narrows.report.tables import Cell, Table, columns, percent
from narrows.search.serve import Choice, ServePlan
from narrows.simulate.fleet import Group, Groups, several
from narrows.simulate.outcome import Outcome
from narrows.units import format_seconds


def place(model: str, group: Groups, prefill: Groups | None, engine: str) -> str:
    """What serves, in words."""
    where, aside = (" and ".join(one.name for one in several(groups)) if groups else "" for groups in (group, prefill))
    return f"{model} on {where}{f', prompts on {aside}' if aside else ''}, {engine}"


def load_notes(o: Outcome, group: Group, more: Mapping[str, Any]) -> list[str]:
    """Sentences on a load that was served: what `more` holds, as `narrows simulate serve --json` gives it, replicas and tiers."""
    found = []
    if steady := more["steady"]:
        spans = ", ".join(f"{name} {_span(steady[f'{name}_s'])}" for name in ("ttft", "tpot", "e2e"))
        found.append(f"Means after a warm-up of {steady['warm_up_requests']:,} requests, 95 %: {spans}.")
    elif o.requests:
        found.append("No steady state shows: means depend on how long the load lasts.")
    over = dict(more.get("over_seeds", {}))
    seeds = over.pop("seeds", 0)
    found += [
        f"{name[:-2]} over {seeds} seeds, 95 %: mean {_span(by['mean'])}, p99 {_span(by['p99'])}." for name, by in over.items()
    ]
    if group.scaling:
        found.append(f"{o.starts:,} replicas were started; all were there for {o.replica_seconds:,.0f} s together.")
    if tiers := group.tiers():
        places = ("device", *(tier.name for tier in tiers))
        shares = (f"{name} {hits / max(o.prompts, 1):.1%}" for name, hits in zip(places, o.hits, strict=True))
        found.append(f"Of the prompts' tokens were found: {', '.join(shares)}.")
    if "saturation_requests_per_s" in more:
        found.append(f"It saturates at {more['saturation_requests_per_s']:.3g} requests a second.")
    for resource, ratios in more.get("what_if", {}).items():
        found.append(f"With 10 % more {resource}: {', '.join(f'{key} {value - 1:+.1%}' for key, value in ratios.items())}.")
    return found


def _span(ends: Sequence[float]) -> str:
    return " to ".join(format_seconds(max(end, 0.0)) for end in ends)


def plan_sentence(p: ServePlan) -> str:
    """The answer, or that there is none."""
    job = p.job
    load = "all requests at once" if math.isinf(job.rate) else f"{job.rate:.3g} requests a second"
    where = f"{job.graph.name} with {load}, {job.engine}"
    best = next((c for c in p.best if c.keeps), None)
    if best is None:
        return f"{where}: nothing that was simulated keeps the limits for {percent(job.share)} of the requests."
    cost = "" if best.dollars_per_mtoken is None else f", ${best.dollars_per_mtoken:.2f} a million tokens"
    kept = f"{percent(best.attained or 0.0)} of the requests within the limits"
    return f"{where}: {best.config}: {kept}, {best.goodput:.3g} good ones a second{cost}."


def effort_sentence(p: ServePlan) -> str:
    """How much was searched."""
    return f"{p.evaluated:,} deployments screened, the best ones simulated, in {format_seconds(p.seconds)}"


def deployment_table(p: ServePlan) -> Table:
    """Deployments, one a row; a dash where nothing was simulated or the machine's file does not say."""

    def row(c: Choice) -> tuple[Cell, ...]:
        seen = c.outcome
        first = seen.ttft.quantile(p.job.share) if seen else c.point.ttft
        each = seen.tpot.mean if seen else c.point.tpot
        return (
            Cell(str(c.config)),
            Cell(str(c.config.devices), c.config.devices),
            Cell(f"{c.goodput:.3g}/s", c.goodput),
            Cell("-" if c.attained is None else percent(c.attained), c.attained),
            Cell(format_seconds(first), first),
            Cell(format_seconds(each), each),
            Cell(" to ".join(format_seconds(end) for end in c.interval["tpot_s"]) if c.interval else "-"),
            Cell("-" if c.dollars_per_mtoken is None else f"${c.dollars_per_mtoken:.2f}", c.dollars_per_mtoken),
            Cell("-" if c.joules_per_token is None else f"{c.joules_per_token:.2g} J", c.joules_per_token),
        )

    heads = columns(
        "deployment:prose",
        "devices:number",
        "good:number",
        "within:number",
        f"TTFT p{100 * p.job.share:.0f}:number",
        "TPOT:number",
        "80 %:number:130",
        "a million tokens:number:110",
        "a token:number:110",
    )
    return Table("Cheapest first of those that keep the limits", heads, tuple(row(c) for c in p.best))
