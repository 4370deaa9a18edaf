"""Tables of a training plan: the best layouts, where the time of the best goes, what its memory holds, the Pareto front."""

from math import inf

from narrows.report.tables import Cell, Table, columns, percent
from narrows.search.priced import Choice
from narrows.search.train import TrainPlan
from narrows.units import format_bytes, format_seconds

# What each entry of the ledger is, and the limit whose colour it has.
_CAUSES = {
    "forward": ("forward pass", "compute"),
    "backward": ("backward pass", "compute"),
    "recompute": ("forward pass, redone", "compute"),
    "ends": ("embedding, output and loss of one stage", "compute"),
    "launch": ("waiting for the host's launches", "launch"),
    "tensor": ("collectives of tensor parallelism", "communication"),
    "context": ("exchange of keys and values", "communication"),
    "expert": ("tokens to their experts and back", "communication"),
    "pipeline": ("messages between stages", "communication"),
    "gradients": ("gradients and weights between replicas", "communication"),
    "bubble": ("waiting for other stages (bubble)", "scheduling"),
    "optimizer": ("optimizer", "bandwidth"),
    "offload": ("traffic to the host's memory", "storage"),
    "host": ("fixed time of a step", "launch"),
}


def plan_sentence(p: TrainPlan) -> str:
    """The answer, or that there is none."""
    job = p.job
    devices = [f"{many} {group.machine.name}" for group, many in job.parts]
    where = f"{job.graph.name}, {job.batch} x {job.sequence} tokens on {' and '.join(devices)}"
    if not p.best:
        return f"{where}: no layout fits {format_bytes(min(map(job.room, job.site.groups)))} a device."
    best = p.best[0]
    low, high = best.interval
    span = f"{format_seconds(low)} to {format_seconds(high)}"
    return (
        f"{where}: {format_seconds(best.seconds)} a step ({span}), {best.tokens_per_second:,.0f} tokens/s, "
        f"{percent(best.mfu)} of peak, with {best.layout}"
    )


def effort_sentence(p: TrainPlan) -> str:
    """How much was searched."""
    return f"{p.evaluated:,} layouts priced in {format_seconds(p.seconds)}"


def choice_table(title: str, found: tuple[Choice, ...]) -> Table:
    """Layouts, one a row."""
    rows = tuple(
        (
            Cell(str(c.layout)),
            Cell(str(c.layout.devices), c.layout.devices),
            Cell(format_seconds(c.seconds), c.seconds),
            Cell(percent(c.mfu), c.mfu),
            Cell(format_bytes(float(c.memory.total)), float(c.memory.total)),
            Cell("" if c.joules is None else f"{c.joules / 3.6e6:.3g} kWh", c.joules),
            Cell("" if c.dollars is None else f"${c.dollars:.3g}", c.dollars),
        )
        for c in found
    )
    heads = columns(
        "layout:prose",
        "devices:number",
        "step:number",
        "of peak:number",
        "memory:number",
        "energy:number:110",
        "price:number:110",
    )
    return Table(title, heads, rows)


def front_table(p: TrainPlan) -> Table:
    """The Pareto front in steps of a tenth of the memory, for the same devices; `--json` has all of it."""
    shown: list[Choice] = []
    least: dict[tuple[object, ...], float] = {}  # bytes of the last one shown on these devices
    for one in p.pareto:
        devices, held = (one.layout.devices, *sorted(one.layout.groups.split("+"))), float(one.memory.total)
        if held <= 0.9 * least.get(devices, inf):
            shown.append(one)
            least[devices] = held
    less = f": {len(shown)} of {len(p.pareto)}, each a tenth leaner than the one before" if len(shown) < len(p.pareto) else ""
    return choice_table(f"Beaten by none in time, memory, devices, energy and price{less}", tuple(shown))


def step_table(c: Choice) -> Table:
    """Where the time of a step goes; the rows add up to it."""
    rows = tuple(
        (
            Cell(_CAUSES[cause][0], tone=_CAUSES[cause][1]),
            Cell(format_seconds(s), s),
            Cell(percent(s / c.seconds), s),
            Cell(share=s / c.seconds, tone=_CAUSES[cause][1]),
        )
        for cause, s in sorted(c.ledger.items(), key=lambda item: -item[1])
        if s > 0
    )
    total = (Cell("a step"), Cell(format_seconds(c.seconds)), Cell("100 %"), Cell())
    return Table("Where the time of the fastest goes", columns("cause", "time:number", "share:number", "of it:bar"), rows, total)


def rank_table(c: Choice) -> Table:
    """What the fullest device holds."""
    rows = tuple(
        (Cell(name), Cell(format_bytes(float(held)), float(held)), Cell(share=min(1.0, float(held) / c.room)))
        for name, held in c.memory.parts().items()
        if held > 0
    )
    total = (Cell("in all"), Cell(format_bytes(float(c.memory.total))), Cell(percent(float(c.memory.total) / c.room)))
    return Table("Memory of its fullest device", columns("held", "bytes:number", "of the device:bar"), rows, total)
