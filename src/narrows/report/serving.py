"""The table of a serving plan: the best deployments, what their clients see and what they cost."""

import math

from narrows.report.tables import Cell, Table, columns, percent
from narrows.search.serve import Choice, ServePlan
from narrows.units import format_seconds


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
