"""What a diagnosis, a prescription and a verification say, as panels of one HTML page."""

from collections.abc import Sequence

from narrows.diagnose import Diagnosis
from narrows.explain import findings
from narrows.machine import Machine
from narrows.prescribe import Prescription
from narrows.report import listings, svg, tables
from narrows.report.page import esc, hero, kept, page, plot, shades, stack, table
from narrows.report.tables import Cell, Table
from narrows.units import format_bytes, format_seconds
from narrows.verify import Verification

_MOST_OPS = 200


def report(
    diagnoses: Sequence[Diagnosis],
    prescription: Prescription | None = None,
    verification: Verification | None = None,
    title: str = "",
    stamp: str = "",
) -> str:
    """The page for one or more diagnoses, with what to do about them and whether that came true.

    The same arguments give the same bytes: what dates it goes into `stamp`, a line of the footer.
    """
    several = len({d.model for d in diagnoses}) > 1
    panels = [("did it help", _verification(verification))] if verification else []
    panels += [(f"{d.model} " * several + f"{d.step.phase} on {tables.place(d)}", _diagnosis(d)) for d in diagnoses]
    panels += [("what to do", _prescription(prescription))] if prescription else []
    models = dict.fromkeys(
        [d.model for d in diagnoses]
        or [prescription.before.model if prescription else verification.model if verification else "narrows"]
    )
    return page(title or ", ".join(models), panels, stamp)


def _diagnosis(d: Diagnosis) -> str:
    low, high = d.interval
    room = f"of {format_bytes(d.machine.memory.capacity_bytes)}: {'fits' if d.fits else 'does not fit'}"
    tiles = [(tables.throughput(d), tables.describe(d.step)), (format_bytes(float(d.footprint.total_bytes)), room)]
    if d.seconds and d.bound_seconds:
        limit, share = next(iter(tables.shares(d).items()))
        away, bound = tables.times(d.seconds / d.bound_seconds), format_seconds(d.bound_seconds)
        tiles[1:1] = [(f"{tables.percent(share)} {limit}", "of the time"), (away, f"the datasheet's roofline, {bound}")]
    grid = "".join(f"<div><b>{esc(figure)}</b><span>{esc(what)}</span></div>" for figure, what in tiles)
    notes = "".join(f'<p class="note">{esc(note)}</p>' for note in (*d.notes, tables.provenance(d)))
    beside = f"a step, {tables.between(low, d.seconds, high)} with 80 % confidence"
    parts = [
        hero(format_seconds(d.seconds), beside, tables.headline(d)),
        f'<div class="tiles">{grid}</div>',
        kept(tables.ledger_table(d).title, _ledger_bar(d) + table(tables.ledger_table(d), heading=False)),
        plot(
            "Roofline",
            "An op under the slanted roof waits for memory, one under the flat roof for arithmetic. "
            "Its area is its share of the time.",
            svg.roofline(d),
        ),
        plot(
            "Waterline",
            "The line is the best that each op could reach at its intensity, the bar what it reaches, the grey between them "
            "the efficiency gap. The area of the bars is the share of peak that the step reaches.",
            svg.waterline(d),
        ),
        kept(tables.memory_table(d).title, _memory_bar(d) + table(tables.memory_table(d), heading=False)),
        table(listings.finding_table(findings(d))),
        table(tables.what_if_table(d)),
        table(tables.op_table(d, _MOST_OPS), sort=True),
        notes,
        _sources(d.machine),
    ]
    return "\n".join(parts)


def _ledger_bar(d: Diagnosis) -> str:
    rows = tables.ledger_table(d).rows
    css = shades([limit.text for _, _, _, limit, _ in rows])
    return stack([(cause.text, f"{cause.text} {share.text}", bar.share or 0.0, c)
                  for (cause, _, share, _, bar), c in zip(rows, css, strict=True)])  # fmt: skip


def _memory_bar(d: Diagnosis) -> str:
    """One bar as long as the capacity, or as what is needed where that is more, with the capacity as a wall."""
    parts, there = tables.memory_parts(d), d.machine.memory.capacity_bytes
    whole = max(there, sum(parts.values()))
    named = enumerate(parts.items())
    said = [(name, f"{name} {format_bytes(held)}", held / whole, f"c-capacity shade{i}") for i, (name, held) in named]
    wall = f'<b class="wall" style="left:calc({there / whole * 100:.3f}% - 3px)" data-tip="capacity {format_bytes(there)}"></b>'
    return stack(said, wall, f" <span>upright line: capacity, {format_bytes(there)}</span>")


def _sources(machine: Machine) -> str:
    """Where each figure of the machine comes from."""
    figures = {n: " x ".join(map(str, v)) if isinstance(v, tuple) else f"{v:.6g}" for n, v in machine.figures().items()}
    rows = tuple((Cell(name), Cell(value), Cell(machine.sources.get(name, ""))) for name, value in figures.items())
    figures_table = table(Table("", tables.columns("figure", "SI units:number", "source:prose"), rows))
    return f"<details><summary>Figures of {esc(machine.title)} and their sources</summary>{figures_table}</details>"


def _prescription(p: Prescription) -> str:
    best = p.best
    helped = best if best and tables.helps(best) else None
    beside = f"as fast, {tables.ratios(*helped.interval)}" if helped else "nothing found"
    command = tables.next_command(p)
    parts = [hero(tables.times(helped.gain if helped else 1.0), beside, tables.prescription_sentence(p))]
    parts += [f"<h2>Next</h2><pre>{esc(command)}</pre>"] if command else []
    parts += [
        table(tables.option_table(title, options))
        for title, options in (("Free", p.free), ("Techniques, best first", p.options))
        if options
    ]
    parts.append(table(tables.why_not_table(p)))
    return "\n".join(parts)


def _verification(v: Verification) -> str:
    first = next(iter(sorted(v.speed.items(), key=lambda item: -item[1].ratio)), None)
    figure = tables.times(first[1].ratio) if first else ("passed" if v.passed else "refused")
    beside = f"{first[0]}, predicted {tables.times(first[1].predicted)} ({tables.ratios(*first[1].interval)})" if first else ""
    state = f'<p class="badge c-{"good" if v.passed else "bad"}">{"Passed" if v.passed else "Refused"}</p>'
    key = '<p class="note">Dot and whiskers: predicted, with its interval. Diamond: measured. Dotted line: no change.</p>'
    tables_ = (tables.speed_table(v), tables.kept_table(v))
    return "\n".join([state + hero(figure, beside, tables.verdict(v)), table(tables_[0]), key, table(tables_[1])])
