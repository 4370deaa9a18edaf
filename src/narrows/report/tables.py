"""What the reports say: sentences and tables of plain cells. Terminal and page only draw them, so they cannot disagree."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from narrows.claims import status
from narrows.cost import CAUSES, Limit
from narrows.diagnose import Diagnosis, OpDiagnosis
from narrows.free import FREE
from narrows.own import OWN
from narrows.papers import paper
from narrows.prescribe import Option, Prescription
from narrows.step import Step
from narrows.technique import Trains, built
from narrows.units import format_bytes, format_flop, format_seconds
from narrows.verify import Verification

_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_DOES = {
    "weights": "reads weights",
    "cache": "reads the cache",
    "activations": "moves activations",
    "communication": "communicates",
    "optimizer states": "updates the optimizer",
    "launch": "starts kernels",
}
_TWICE = {
    Limit.COMPUTE: "twice the compute",
    Limit.BANDWIDTH: "twice the bandwidth",
    Limit.COMMUNICATION: "twice the link",
    Limit.LAUNCH: "half the launch time",
}
_BOTTLENECK = {
    Limit.BANDWIDTH: "memory-bandwidth",
    Limit.CAPACITY: "memory-capacity",
    Limit.STORAGE: "storage-io",
    Limit.LAUNCH: "latency-scheduling",
    Limit.SCHEDULING: "latency-scheduling",
}
MEMORY = {
    "weights": "weights_bytes",
    "keys, values, state": "kv_bytes",
    "activations": "activation_bytes",
    "gradients": "gradient_bytes",
    "optimizer": "optimizer_bytes",
    "temporary": "temporary_bytes",
}


@dataclass(frozen=True, slots=True)
class Span:
    """A predicted ratio with its interval, and what was measured (None: nothing yet)."""

    low: float
    mid: float
    high: float
    measured: float | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """Text, what it sorts by, a share from 0 to 1 drawn as a bar or a span drawn as a whisker, and a second, quieter line.

    `tone` colours it: the name of a limit, or good, bad, quiet.
    """

    text: str = ""
    value: float | None = None
    share: float | None = None
    span: Span | None = None
    tone: str = ""
    under: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A heading and how its cells are drawn: text, number, name (cut from the left), prose (wraps), bar or span.

    A terminal narrower than `least` columns leaves it out.
    """

    title: str
    kind: str = "text"
    least: int = 0


def columns(*heads: str) -> tuple[Column, ...]:
    """From 'title', 'title:kind' or 'title:kind:least'."""
    return tuple(
        Column(title, kind or "text", int(least or 0)) for title, kind, least in ((h + "::").split(":")[:3] for h in heads)
    )


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under columns; `total` is the last row, set apart, and `note` a sentence below."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    total: tuple[Cell, ...] = ()
    note: str = ""

    @property
    def reach(self) -> tuple[float, float]:
        """What every whisker is drawn on: from the lowest to the highest of them, and 1 (no change)."""
        spans = [cell.span for row in self.rows for cell in row if cell.span]
        ends = [1.0, *(x for s in spans for x in (s.low, s.high, s.mid if s.measured is None else s.measured))]
        return min(ends), max(ends)


def clean(text: object) -> str:
    """Text with each character that is not printable (terminal escapes, bidirectional marks, line ends) replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def apportion(parts: Sequence[float], digits: int) -> list[str]:
    """The parts rounded to `digits` decimals such that what is printed adds up to their sum, rounded alike."""
    scaled = [part * 10**digits for part in parts]
    floors = [math.floor(part) for part in scaled]
    short = round(math.fsum(scaled)) - sum(floors)
    for i in sorted(range(len(parts)), key=lambda i: floors[i] - scaled[i])[:short]:
        floors[i] += 1
    return [f"{count / 10**digits:.{digits}f}" for count in floors]


def short_name(name: str) -> str:
    """The part of a module path that tells an op from the others: what follows the layer's index."""
    parts = name.split(".")
    index = max((i for i, part in enumerate(parts) if part == "*" or part.isdecimal()), default=-1)
    return ".".join(parts[index + 1 :][-2:]) or name


def times(ratio: float) -> str:
    """1.834 as '1.83 x'."""
    return f"{_ratio(ratio)} x"


def percent(share: float) -> str:
    """0.9134 as '91 %', and what would round to nothing as '< 1 %'."""
    return "< 1 %" if 0 < share < 0.005 else f"{share:,.0%}".replace("%", " %")


def _figure(value: float) -> str:
    """Three significant digits, padded with zeros, without an exponent."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 6)}f}" if math.isfinite(value) else str(value)


def _ratio(value: float) -> str:
    return f"{value:.2f}" if 0.095 <= value < 9.995 else _figure(value)


def ratios(low: float, high: float) -> str:
    """The interval of a ratio: '1.52 to 2.14'."""
    return f"{_ratio(low)} to {_ratio(high)}"


def commas(value: float) -> str:
    return f"{value:,.0f}"


def share_of(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _unit(seconds: float) -> tuple[float, str]:
    unit = format_seconds(seconds).split()[1]
    return _UNITS[unit], unit


def between(low: float, seconds: float, high: float) -> str:
    """An interval in the unit of the figure that it belongs to: '20.3 to 29.8'."""
    factor, _ = _unit(seconds)
    return f"{_figure(low / factor)} to {_figure(high / factor)}"


# --- a diagnosis


def place(d: Diagnosis) -> str:
    return d.machine.name if d.devices == 1 else f"{d.devices} x {d.machine.name}"


def describe(step: Step) -> str:
    """What one step does: '16 sequences, each with 4,096 tokens of context'."""
    n = float(step["sequences"])
    who = f"{commas(n)} sequence{'s' * (n != 1)}"
    even = step.batch.size == step.new.size == step.past.size == 1
    new, past = (float(step.new.item()), float(step.past.item())) if even else (float(step["tokens"]), float(step["context"]))
    each, over = ("each " if n != 1 else "", "") if even else ("", " in all")
    if step.phase == "decode":
        return f"{who}, {each}with {commas(past)} tokens of context{over}"
    return f"{who}, {each}of {commas(new)} token{'s' * (new != 1)}{over}"


def shares(d: Diagnosis) -> dict[Limit, float]:
    """The share of the time that each limit takes, largest first."""
    found: dict[Limit, float] = {}
    whole = d.seconds
    for cause, seconds in d.ledger.items():
        found[CAUSES[cause]] = found.get(CAUSES[cause], 0.0) + share_of(seconds, whole)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def throughput(d: Diagnosis) -> str:
    """What comes out per second: tokens, or sequences (images) of a plain forward."""
    what, field = ("sequences", "sequences") if d.step.phase == "forward" else ("tokens", "tokens")
    return f"{_figure(share_of(float(d.step[field]), d.seconds))} {what}/s"


def headline(d: Diagnosis) -> str:
    """The answer in one sentence: how long, how sure, what limits it, and what twice as much of that would give."""
    who = f"{d.model} {d.step.phase} on {place(d)}"
    if not d.seconds:
        return f"{who}: nothing to do, it takes no time"
    limit, share = next(iter(shares(d).items()))
    causes = [(c, share_of(s, d.seconds)) for c, s in d.ledger.items() if CAUSES[c] == limit]
    said = [f"{percent(share)} of the time computes"] if limit == Limit.COMPUTE else []
    said = said or [
        f"{percent(s)} {'of the time ' * (not i)}{_DOES[c]}" for i, (c, s) in enumerate(causes[:2]) if not i or s >= 0.1
    ]
    time = f"{format_seconds(d.seconds)} a step ({between(d.interval[0], d.seconds, d.interval[1])})"
    more = f"; {_TWICE[limit]} would give {times(d.what_if[limit][1])}" if limit in d.what_if else ""
    why = f"limited by {limit}: {', '.join(said)}{more}"
    if d.fits:
        return f"{who}: {time}, {why}"
    return f"{who} does not fit: {memory_sentence(d)}. With room for it, {time}, {why}"


def memory_sentence(d: Diagnosis) -> str:
    needed, there = float(d.footprint.total_bytes), d.machine.memory.capacity_bytes
    each = " on each device" if d.devices > 1 else ""
    verb = "takes" if d.fits else "needs"
    return f"it {verb} {format_bytes(needed)} of {format_bytes(there)}{each} ({percent(share_of(needed, there))})"


def work_sentence(d: Diagnosis) -> str:
    """Throughput, the amount of work, and how far the step is from the datasheet's roofline."""
    read, written = format_bytes(float(d.cost.read_bytes)), format_bytes(float(d.cost.write_bytes))
    done = f"{format_flop(float(d.cost.flop))}, {read} read, {written} written"
    sent = f", {format_bytes(float(d.cost.link_bytes))} sent" if d.cost.link_bytes else ""
    bound = f"at the datasheet's peaks it could not take less than {format_seconds(d.bound_seconds)}"
    gap = f" ({times(d.seconds / d.bound_seconds)} away)" if d.bound_seconds else ""
    return f"{throughput(d)}; {done}{sent}; {bound}{gap}"


def provenance(d: Diagnosis) -> str:
    """Where the figures come from, and what the interval means."""
    if d.machine.provenance == "calibrated":
        return f"{d.machine.title}: measured on this machine. Intervals are 80 %: from the spread of what was measured."
    how = "its own achieved fractions" if d.machine.efficiency else "fractions of peak fitted for its kind of machine"
    return f"{d.machine.title}: datasheet figures, times {how}. Predicted, not measured; intervals are 80 %."


def ledger_table(d: Diagnosis) -> Table:
    """Seconds by cause; the printed rows add up to the printed total, digit for digit."""
    ledger, whole = d.ledger, d.seconds
    factor, unit = _unit(whole)
    digits = max(0, 3 - math.floor(math.log10(whole / factor))) if whole else 0
    texts = apportion([s / factor for s in ledger.values()], digits)
    parts = apportion([share_of(s, whole) * 100 for s in ledger.values()], 1)
    rows = tuple(
        (
            Cell(cause),
            Cell(text, s),
            Cell(f"{part} %", s),
            Cell(CAUSES[cause].value, tone=CAUSES[cause].value),
            Cell(share=share_of(s, whole), tone=CAUSES[cause].value),
        )
        for (cause, s), text, part in zip(ledger.items(), texts, parts, strict=True)
    )
    heads = columns("cause", f"{unit}:number", "share:number", "counts towards", ":bar")
    added = sum(map(Decimal, texts), Decimal())  # not the time rounded on its own: the two may differ at a tie
    total = (Cell("step"), Cell(str(added)), Cell("100.0 %" if whole else ""), Cell(), Cell())
    return Table("Where the time goes", heads, rows, total)


def memory_parts(d: Diagnosis) -> dict[str, float]:
    """Bytes at the peak of the step by what they hold, without what holds nothing."""
    found = {name: float(getattr(d.footprint, field)) for name, field in MEMORY.items()}
    return {name: count for name, count in found.items() if count}


def memory_table(d: Diagnosis) -> Table:
    """What fills the memory of one device, against its capacity."""
    there, parts = d.machine.memory.capacity_bytes, memory_parts(d)
    whole, tone = sum(parts.values()), "good" if d.fits else "bad"

    def row(name: str, count: float, tone: str) -> tuple[Cell, ...]:
        return (
            Cell(name),
            Cell(format_bytes(count), count),
            Cell(percent(count / there), count),
            Cell(share=count / there, tone=tone),
        )

    heads = columns("holds", "bytes:number", f"of {format_bytes(there)}:number", ":bar")
    spare = f"{format_bytes(there - whole)} to spare" if d.fits else f"{format_bytes(whole - there)} too much"
    title = f"Memory: {'it fits' if d.fits else 'it does not fit'}, {spare}"
    return Table(title, heads, tuple(row(n, c, "capacity") for n, c in parts.items()), row("total", whole, tone))


def what_if_table(d: Diagnosis) -> Table:
    """What more of each resource would give."""
    part = shares(d)
    order = sorted(d.what_if.items(), key=lambda item: -item[1][1])
    best = max((v[1] - 1 for v in d.what_if.values()), default=0.0) or 1.0
    rows = tuple(
        (
            Cell(limit.value, tone=limit.value),
            Cell(percent(part.get(limit, 0.0)), part.get(limit, 0.0)),
            Cell(times(little), little),
            Cell(times(twice), twice),
            Cell(share=max(twice - 1, 0.0) / best if twice > 1.005 else 0.0, tone=limit.value),
        )
        for limit, (little, twice) in order
    )
    heads = columns("resource", "of the time:number", "10 % more:number", "twice:number", ":bar")
    return Table("What more of a resource would give", heads, rows)


def op_label(entry: OpDiagnosis) -> str:
    phase = "" if entry.op.phase == "forward" else f" ({entry.op.phase})"
    return short_name(entry.op.name) + phase


def op_table(d: Diagnosis, count: int) -> Table:
    """The slowest ops: time, limit, intensity, and how many times longer than the datasheet's roofline allows."""
    found = sorted(d.ops, key=lambda o: -o.seconds)
    whole = d.seconds  # a sum over all ops: once, not once a row
    phases = len({o.op.phase for o in d.ops}) > 1
    rows = tuple(
        (
            Cell(o.op.name),
            *([Cell(o.op.phase)] if phases else []),
            Cell(o.op.kind),
            Cell(commas(o.op.repeat), o.op.repeat),
            Cell(format_seconds(o.seconds), o.seconds),
            Cell(percent(share_of(o.seconds, whole)), o.seconds),
            Cell(o.limit.value, tone=o.limit.value),
            Cell(_figure(o.intensity), o.intensity),
            Cell(times(o.seconds / o.bound_seconds), o.seconds / o.bound_seconds) if o.bound_seconds else Cell("", 0.0),
        )
        for o in found[:count]
    )
    heads = columns(
        "op:name",
        *(["phase"] if phases else []),
        "kind::95",
        "n:number",
        "time:number",
        "share:number",
        "limit",
        "FLOP/B:number",
        "of bound:number",
    )
    rest = math.fsum(o.seconds for o in found[count:])
    note = f"and {len(found) - count} more, {percent(share_of(rest, whole))} of the time" if len(found) > count else ""
    title = "The slowest ops" if len(found) > count else "Ops, slowest first"
    return Table(title, heads, rows, note=note)


# --- a prescription


def plan_status(option: Option) -> str:
    """free, works or built: the least of what its techniques are."""
    known = [status(t.card.slug) for t in option.plan if t.card.slug not in FREE]
    return "free" if not known else "works" if set(known) == {"works"} else "built"


def option_table(title: str, options: Sequence[Option]) -> Table:
    """What each plan is predicted to give, and what it costs."""

    def row(option: Option) -> tuple[Cell, ...]:
        low, high = option.interval
        kept = plan_status(option)
        price = "; ".join(
            part
            for part in (option.quality or option.price, f"needs {' and '.join(option.needs)}" if option.needs else "")
            if part
        )
        saved = format_bytes(abs(option.bytes_saved))
        sign = "" if not option.bytes_saved else "-" if option.bytes_saved > 0 else "+"
        return (
            Cell(str(option.plan), under=price),
            Cell(times(option.gain), option.gain, under=ratios(low, high)),
            Cell(span=Span(low, option.gain, high)),
            Cell(times(option.over_free), option.over_free),
            Cell(
                f"{sign}{saved}",
                -option.bytes_saved,
                under="fits" if option.fits else "does not fit",
                tone="" if option.fits else "bad",
            ),
            Cell(kept, tone="good" if kept == "works" else "", under="exact" if option.exact else "approximate"),
        )

    heads = columns("plan:prose", "gain:number", ":span:110", "over free:number", "memory:number", "status")
    return Table(title, heads, tuple(row(o) for o in options))


def helps(option: Option) -> bool:
    """Whether an option is faster or smaller than what there is."""
    return option.gain > 1 or option.bytes_saved > 0


def prescription_sentence(p: Prescription) -> str:
    """The best plan in one sentence, or that there is none."""
    best, d = p.best, p.before
    what = f"{d.model} {d.step.phase} on {place(d)}"
    if best is None or not helps(best):
        return f"Nothing that narrows can apply here would help {what}, which is limited by {d.limit}"
    low, high = best.interval
    fits = " and fits" if best.fits and not d.fits else "" if best.fits else ", and still does not fit"
    now = f"{format_seconds(d.seconds)} becomes {format_seconds(best.seconds)}"
    return f"{best.plan} would make {what} {times(best.gain)} as fast ({ratios(low, high)}): {now}{fits}"


def next_command(p: Prescription) -> str:
    """What to type next for the best plan; '' where no plan helps, or where it is a way to train and not a change to apply."""
    best = p.best
    if best is None or not helps(best) or any(isinstance(t, Trains) for t in best.plan):
        return ""
    text = " --text FILE" if "calibration" in best.needs else ""
    plan = str(best.plan).replace('"', "")  # options are numbers and words: nothing that a quoted shell word would expand
    return f'narrows apply {shlex.quote(clean(p.before.model))} --plan "{plan}"{text}'


def why_not_table(p: Prescription) -> Table:
    """The built techniques that were not taken, with the reason; the described ones are counted, not listed."""
    known = {*built(), *FREE, *OWN}
    rows = tuple((Cell(slug), Cell(reason, tone="quiet")) for slug, reason in p.why_not.items() if slug in known)
    described = [slug for slug in p.why_not if slug not in known]
    kind = _BOTTLENECK.get(p.before.limit, p.before.limit.value)
    near = sum(paper(slug).bottleneck == kind for slug in described)
    note = f"Described but not built: {len(described)}, of which {near} would relieve {p.before.limit}" if described else ""
    return Table("Why not", columns("technique", "reason:prose"), rows, note=note)


# --- a verification


def verdict(v: Verification) -> str:
    """Whether it came true, in one sentence with the figures."""

    def speed(step: str) -> str:
        s = v.speed[step]
        return f"{step} {times(s.ratio)} as fast (predicted {times(s.predicted)}, {ratios(*s.interval)})"

    quality = f"{v.quality} {v.quality_before:.4g} before, {v.quality_after:.4g} after"
    held = "passed" if v.passed else f"refused: {'; '.join(v.failures)}"
    return f"{v.plan} on {v.model} {held}. " + "; ".join([*(speed(s) for s in v.speed), quality])


def speed_table(v: Verification) -> Table:
    """Each timed step before and after: measured, predicted, and the original against itself (the noise)."""
    rows = tuple(
        (
            Cell(step),
            Cell(format_seconds(s.before_seconds), s.before_seconds),
            Cell(format_seconds(s.after_seconds), s.after_seconds),
            Cell(times(s.ratio), s.ratio),
            Cell(times(s.predicted), s.predicted, under=ratios(*s.interval)),
            Cell(span=Span(s.interval[0], s.predicted, s.interval[1], s.ratio)),
            Cell(times(s.aa_ratio), s.aa_ratio),
        )
        for step, s in v.speed.items()
    )
    heads = columns("step", "before:number", "after:number", "measured:number", "predicted:number", ":span:100", "A/A:number")
    return Table("Speed, timed in turns", heads, rows, note="A/A is the original against itself: what noise alone gives")


def kept_table(v: Verification) -> Table:
    """Quality and bytes before and after."""
    after, before = v.bytes_after, v.bytes_before
    small = (
        Cell("bytes of the weights"),
        Cell(format_bytes(before)),
        Cell(format_bytes(after)),
        Cell(times(share_of(after, before))),
        Cell(format_bytes(v.predicted_bytes)),
    )
    ratio = times(share_of(v.quality_after, v.quality_before))
    rows = (
        (Cell(v.quality), Cell(f"{v.quality_before:.4g}"), Cell(f"{v.quality_after:.4g}"), Cell(ratio), Cell()),
        (Cell("same first choice"), Cell(), Cell(f"{v.agreement:.1%}".replace("%", " %")), Cell(), Cell()),
        small,
    )
    heads = columns("kept", "before:number", "after:number", "ratio:number", "predicted:number")
    return Table("Quality and size", heads, rows, note=f"on {v.text}" if v.text else "")
