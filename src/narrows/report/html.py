"""One HTML file that says it all: no library, no request, readable on a phone, on paper and without scripts."""

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from narrows.diagnose import Diagnosis
from narrows.explain import findings
from narrows.machine import Machine
from narrows.prescribe import Prescription
from narrows.report import listings, svg, tables
from narrows.report.tables import Cell, Column, Table, clean
from narrows.units import format_bytes, format_seconds
from narrows.verify import Verification

_MOST_OPS = 200
_UNIT = re.compile(r"(?<=[0-9]) (?=(?:%|x|[kMGTPE]?(?:B|FLOP|s)|[mun]s)\b|%)")


def report(
    diagnoses: Sequence[Diagnosis],
    prescription: Prescription | None = None,
    verification: Verification | None = None,
    title: str = "",
    stamp: str = "",
) -> str:
    """The page for one or more diagnoses, with what to do about them and whether that came true.

    The same arguments give the same bytes: what dates it goes into `stamp`, a line of the footer. Names of models and
    ops are shown as text, whatever they hold; a content security policy allows the page's own script and nothing else.
    """
    several = len({d.model for d in diagnoses}) > 1
    panels = [("did it help", _verification(verification))] if verification else []
    panels += [(f"{d.model} " * several + f"{d.step.phase} on {tables.place(d)}", _diagnosis(d)) for d in diagnoses]
    panels += [("what to do", _prescription(prescription))] if prescription else []
    models = dict.fromkeys(
        [d.model for d in diagnoses]
        or [prescription.before.model if prescription else verification.model if verification else "narrows"]
    )
    name = _esc(title or ", ".join(models))
    style, script = _asset("page.css"), _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    tabs = "".join(f'<a href="#p{i}">{_esc(label)}</a>' for i, (label, _) in enumerate(panels)) if len(panels) > 1 else ""
    body = "\n".join(f'<section id="p{i}">{content}</section>' for i, (_, content) in enumerate(panels))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}"><link rel="icon" href="data:,">
<title>{name} · narrows</title><style>{style}</style></head><body>
<header><h1>{name}</h1>{f"<nav>{tabs}</nav>" if tabs else ""}</header>
<main>{body}</main>
<footer><p>narrows: what limits a network here, what widens it, and whether it did. {_esc(stamp)}</p></footer>
<script>{script}</script></body></html>
"""


def _asset(name: str) -> str:
    return files("narrows.report").joinpath(name).read_text("utf-8")


def _esc(text: object) -> str:
    """Text for the page: nothing in it is markup, and no line ends between a figure and its unit."""
    return _UNIT.sub("&nbsp;", escape(clean(text)))


def _hero(figure: str, beside: str, says: str) -> str:
    answer = f'<span class="big">{_esc(figure)}</span><span class="range">{_esc(beside)}</span>'
    return f'<p class="answer">{answer}</p><p class="says">{_esc(says)}.</p>'


def _diagnosis(d: Diagnosis) -> str:
    low, high = d.interval
    room = f"of {format_bytes(d.machine.memory.capacity_bytes)}: {'fits' if d.fits else 'does not fit'}"
    tiles = [(tables.throughput(d), tables.describe(d.step)), (format_bytes(float(d.footprint.total_bytes)), room)]
    if d.seconds and d.bound_seconds:
        limit, share = next(iter(tables.shares(d).items()))
        away, bound = tables.times(d.seconds / d.bound_seconds), format_seconds(d.bound_seconds)
        tiles[1:1] = [(f"{tables.percent(share)} {limit}", "of the time"), (away, f"the datasheet's roofline, {bound}")]
    grid = "".join(f"<div><b>{_esc(figure)}</b><span>{_esc(what)}</span></div>" for figure, what in tiles)
    notes = "".join(f'<p class="note">{_esc(note)}</p>' for note in (*d.notes, tables.provenance(d)))
    beside = f"a step, {tables.between(low, d.seconds, high)} with 80 % confidence"
    parts = [
        _hero(format_seconds(d.seconds), beside, tables.headline(d)),
        f'<div class="tiles">{grid}</div>',
        _kept(tables.ledger_table(d).title, _ledger_bar(d) + _table(tables.ledger_table(d), heading=False)),
        _plot(
            "Roofline",
            "An op under the slanted roof waits for memory, one under the flat roof for arithmetic. "
            "Its area is its share of the time.",
            svg.roofline(d),
        ),
        _plot(
            "Waterline",
            "The line is the best that each op could reach at its intensity, the bar what it reaches, the grey between them "
            "the efficiency gap. The area of the bars is the share of peak that the step reaches.",
            svg.waterline(d),
        ),
        _kept(tables.memory_table(d).title, _memory_bar(d) + _table(tables.memory_table(d), heading=False)),
        _table(listings.finding_table(findings(d))),
        _table(tables.what_if_table(d)),
        _table(tables.op_table(d, _MOST_OPS), sort=True),
        notes,
        _sources(d.machine),
    ]
    return "\n".join(parts)


def _plot(title: str, caption: str, drawing: str) -> str:
    return _kept(title, f'<p class="note">{caption}</p>{drawing}') if drawing else ""


def _kept(title: str, content: str) -> str:
    """A heading with what must stay on one sheet with it."""
    return f'<div class="kept"><h2>{_esc(title)}</h2>{content}</div>'


def _ledger_bar(d: Diagnosis) -> str:
    """One bar: colour says which limit a cause counts towards, a paler shade tells causes of one limit apart."""
    seen: dict[str, int] = {}
    said = []
    for cause, _, share, limit, bar in tables.ledger_table(d).rows:
        seen[limit.text] = seen.get(limit.text, -1) + 1
        said.append((cause.text, f"{cause.text} {share.text}", bar.share or 0.0, f"c-{limit.text} shade{seen[limit.text]}"))
    return _stack(said)


def _stack(parts: Sequence[tuple[str, str, float, str]], wall: str = "", more: str = "") -> str:
    """A bar of (name, words, share of its length, CSS classes), words inside where there is room, and its key."""

    def piece(name: str, words: str, share: float, css: str) -> str:
        said = next((w for w in (words, name) if share * 100 > len(w)), "")
        narrow = " narrow" if share < 0.3 else ""
        return f'<span class="{css}{narrow}" style="width:{share * 100:.3f}%" data-tip="{_esc(words)}">{_esc(said)}</span>'

    out = "".join(piece(*part) for part in parts)
    key = " ".join(f'<span><i class="chip {css}"></i>{_esc(name)}</span>' for name, _, _, css in parts)
    return f'<div class="stack">{out}{wall}</div><p class="key">{key}{more}</p>'


def _memory_bar(d: Diagnosis) -> str:
    """One bar as long as the capacity, or as what is needed where that is more, with the capacity as a wall."""
    parts, there = tables.memory_parts(d), d.machine.memory.capacity_bytes
    whole = max(there, sum(parts.values()))
    named = enumerate(parts.items())
    said = [(name, f"{name} {format_bytes(held)}", held / whole, f"c-capacity shade{i}") for i, (name, held) in named]
    wall = f'<b class="wall" style="left:calc({there / whole * 100:.3f}% - 3px)" data-tip="capacity {format_bytes(there)}"></b>'
    return _stack(said, wall, f" <span>upright line: capacity, {format_bytes(there)}</span>")


def _sources(machine: Machine) -> str:
    """Where each figure of the machine comes from."""
    figures = {n: " x ".join(map(str, v)) if isinstance(v, tuple) else f"{v:.6g}" for n, v in machine.figures().items()}
    rows = tuple((Cell(name), Cell(value), Cell(machine.sources.get(name, ""))) for name, value in figures.items())
    table = Table("", tables.columns("figure", "SI units:number", "source:prose"), rows)
    return f"<details><summary>Figures of {_esc(machine.title)} and their sources</summary>{_table(table)}</details>"


def _prescription(p: Prescription) -> str:
    best = p.best
    helped = best if best and tables.helps(best) else None
    beside = f"as fast, {tables.ratios(*helped.interval)}" if helped else "nothing found"
    command = tables.next_command(p)
    parts = [_hero(tables.times(helped.gain if helped else 1.0), beside, tables.prescription_sentence(p))]
    parts += [f"<h2>Next</h2><pre>{_esc(command)}</pre>"] if command else []
    parts += [
        _table(tables.option_table(title, options))
        for title, options in (("Free", p.free), ("Techniques, best first", p.options))
        if options
    ]
    parts.append(_table(tables.why_not_table(p)))
    return "\n".join(parts)


def _verification(v: Verification) -> str:
    first = next(iter(sorted(v.speed.items(), key=lambda item: -item[1].ratio)), None)
    figure = tables.times(first[1].ratio) if first else ("passed" if v.passed else "refused")
    beside = f"{first[0]}, predicted {tables.times(first[1].predicted)} ({tables.ratios(*first[1].interval)})" if first else ""
    state = f'<p class="badge c-{"good" if v.passed else "bad"}">{"Passed" if v.passed else "Refused"}</p>'
    key = '<p class="note">Dot and whiskers: predicted, with its interval. Diamond: measured. Dotted line: no change.</p>'
    tables_ = (tables.speed_table(v), tables.kept_table(v))
    return "\n".join([state + _hero(figure, beside, tables.verdict(v)), _table(tables_[0]), key, _table(tables_[1])])


def _table(table: Table, heading: bool = True, sort: bool = False) -> str:
    if not table.rows and not table.note:
        return ""
    low, high = table.reach
    margin = (high - low or 1.0) * 0.06
    low, high = low - margin, high + margin

    def head(column: Column) -> str:
        return f'<th class="{column.kind}">{svg.scale(low, high) if column.kind == "span" else _esc(column.title)}</th>'

    def cell(c: Cell, column: Column) -> str:
        value = "" if c.value is None else f' data-v="{c.value:.9g}"'
        tone = f" {c.tone}" if c.tone in ("good", "bad", "quiet") else ""
        if column.kind == "bar":
            inner = f'<i class="c-{c.tone}" style="width:{min(c.share, 1) * 100:.2f}%"></i>' if c.share else ""
        elif column.kind == "span":
            inner = svg.whisker(c.span, low, high) if c.span else ""
        else:
            chip = f'<i class="chip c-{c.tone}"></i>' if c.tone and not tone else ""
            inner = chip + _esc(c.text) + (f'<span class="under">{_esc(c.under)}</span>' if c.under else "")
        return f'<td class="{column.kind}{tone}"{value}>{inner}</td>'

    def row(cells: Sequence[Cell], css: str = "") -> str:
        return f"<tr{css}>{''.join(cell(c, k) for c, k in zip(cells, table.columns, strict=True))}</tr>"

    title = f"<h2>{_esc(table.title)}</h2>" if heading and table.title else ""
    body = "".join(row(r) for r in table.rows) + (row(table.total, ' class="total"') if table.total else "")
    note = f'<p class="note">{_esc(table.note)}</p>' if table.note else ""
    heads = "".join(map(head, table.columns))
    grid = f"<table{' class=sort' if sort else ''}><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    return title + (f'<div class="scroll">{grid}</div>' if table.rows else "") + note
