"""What became of a training run that failed and went on: its goodput, its checkpoints, and where its time went."""

from narrows.report.tables import Cell, Table, apportion, columns
from narrows.simulate.failures import Goodput, daly_interval, young_interval
from narrows.units import format_seconds

# What each cause is, and the limit whose colour it has.
_CAUSES = {
    "useful": ("useful steps", "compute"),
    "checkpoint": ("stopped to write checkpoints", "storage"),
    "lost": ("work that failures undid", "scheduling"),
    "restart": ("finding failures and starting again", "launch"),
    "waiting": ("waiting for a node", "scheduling"),
    "smaller": ("going on with fewer devices", "scheduling"),
    "straggler": ("waiting for the straggler", "communication"),
}


def run_sentence(g: Goodput, where: str) -> str:
    """The answer; of a run that makes no progress, why not."""
    run, often = g.run, format_seconds(g.run.mtbf_seconds)
    if g.stuck:
        again = run.restart_seconds + g.every_seconds + run.writes.stall_seconds + run.writes.lag_seconds
        cause = max(g.ledger, key=lambda one: g.ledger[one])
        return (f"{where}: no progress. It fails every {often}, and needs {format_seconds(again)} from a failure until something "
                f"is safe; {_CAUSES[cause][0]} takes {100 * g.ledger[cause] / g.seconds:.1f} % of the time.")  # fmt: skip
    low, high = g.interval
    return (f"{where}, {format_seconds(g.seconds)}: {100 * g.share:.1f} % of the time is useful steps "
            f"({100 * low:.1f} to {100 * high:.1f} %), {g.steps:,.0f} of {format_seconds(run.step_seconds / run.slowdown)} each; "
            f"{g.failures:,.1f} failures, one every {often}")  # fmt: skip


def notes(g: Goodput, held: str) -> list[str]:
    """How often a checkpoint is written and what it takes, and what a straggler costs."""
    writes, count = g.run.writes, round(g.every_seconds / g.run.step_seconds)
    known = ""
    if writes.stall_seconds and g.failures:
        one, two = (format_seconds(f(writes.stall_seconds, g.run.mtbf_seconds)) for f in (young_interval, daly_interval))
        known = f" (Young: {one}, Daly: {two})"
    safe = f", and is safe {format_seconds(writes.lag_seconds)} later" if writes.lag_seconds else ""
    stops = f"stops them for {format_seconds(writes.stall_seconds)}" if writes.stall_seconds else "does not stop them"
    often = f"every {count:,} steps" if count > 1 else "every step"
    found = [f"A checkpoint of {held} {often}, {format_seconds(g.every_seconds)}{known}; it {stops}{safe}."]
    if g.expected["waiting"] > 0.01 and g.run.parts == 1:
        found.append(
            f"It would wait for less than 1 % of the time with {g.run.enough_spares():,} spare nodes, not {g.run.spares}."
        )
    if g.run.slowdown > 1:
        each = format_seconds(g.run.step_seconds / g.run.slowdown)
        found.append(f"With the straggler a step takes {format_seconds(g.run.step_seconds)}, not {each}.")
    return found


def run_table(g: Goodput) -> Table:
    """Where the time of a run goes, and of an endless one in closed form; the rows add up to it."""
    ranked = sorted(((cause, s) for cause, s in g.ledger.items() if s > 0), key=lambda item: -item[1])
    shown = apportion([100 * s / g.seconds for _, s in ranked], 1)
    rows = tuple(
        (
            Cell(_CAUSES[cause][0], tone=_CAUSES[cause][1]),
            Cell(format_seconds(s), s),
            Cell(f"{share} %", s),
            Cell(f"{100 * g.expected[cause]:.1f} %", g.expected[cause]),
            Cell(share=s / g.seconds, tone=_CAUSES[cause][1]),
        )
        for (cause, s), share in zip(ranked, shown, strict=True)
    )
    total = (Cell("the run"), Cell(format_seconds(g.seconds)), Cell("100 %"), Cell("100 %"), Cell())
    heads = columns("cause", "time:number", "share:number", "closed form:number", "of it:bar")
    return Table(f"Where the time goes, mean of {g.seeds} runs" if g.seeds else "Where the time goes", heads, rows, total)
