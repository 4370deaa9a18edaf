"""One HTML file that says it all: no library, no request, readable on a phone, on paper and without scripts."""

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from narrows.report import svg
from narrows.report.tables import Cell, Column, Table, clean

_UNIT = re.compile(r"(?<=[0-9]) (?=(?:%|x|[kMGTPE]?(?:B|FLOP|s)|[mun]s)\b|%)")


def page(title: str, panels: Sequence[tuple[str, str]], stamp: str = "") -> str:
    """The page of panels (name, HTML); more than one are tabs, without scripts below each other.

    The same arguments give the same bytes. Names of models and ops are shown as text, whatever they hold, if `esc` made them
    so; a content security policy allows the page's own script and nothing else.
    """
    name = esc(title)
    style, script = _asset("page.css"), _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    tabs = "".join(f'<a href="#p{i}">{esc(label)}</a>' for i, (label, _) in enumerate(panels)) if len(panels) > 1 else ""
    body = "\n".join(f'<section id="p{i}">{content}</section>' for i, (_, content) in enumerate(panels))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}"><link rel="icon" href="data:,">
<title>{name} · narrows</title><style>{style}</style></head><body>
<header><h1>{name}</h1>{f"<nav>{tabs}</nav>" if tabs else ""}</header>
<main>{body}</main>
<footer><p>narrows: what limits a network here, what widens it, and whether it did. {esc(stamp)}</p></footer>
<script>{script}</script></body></html>
"""


def _asset(name: str) -> str:
    return files("narrows.report").joinpath(name).read_text("utf-8")


def esc(text: object) -> str:
    """Text for the page: nothing in it is markup, and no line ends between a figure and its unit."""
    return _UNIT.sub("&nbsp;", escape(clean(text)))


def hero(figure: str, beside: str, says: str) -> str:
    """The answer as a large figure, with what stands beside it and a sentence."""
    answer = f'<span class="big">{esc(figure)}</span><span class="range">{esc(beside)}</span>'
    return f'<p class="answer">{answer}</p><p class="says">{esc(says)}.</p>'


def plot(title: str, caption: str, drawing: str) -> str:
    """A drawing under its heading and a caption that says how to read it; nothing where nothing was drawn."""
    return kept(title, f'<p class="note">{caption}</p>{drawing}') if drawing else ""


def kept(title: str, content: str) -> str:
    """A heading with what must stay on one sheet with it."""
    return f'<div class="kept"><h2>{esc(title)}</h2>{content}</div>'


def shades(limits: Sequence[str]) -> list[str]:
    """CSS classes of parts: colour says which limit a part counts towards, a paler shade tells parts of one limit apart."""
    return [f"c-{limit} shade{limits[:i].count(limit)}" for i, limit in enumerate(limits)]


def stack(parts: Sequence[tuple[str, str, float, str]], wall: str = "", more: str = "") -> str:
    """A bar of (name, words, share of its length, CSS classes), words inside where there is room, and its key."""

    def piece(name: str, words: str, share: float, css: str) -> str:
        said = next((w for w in (words, name) if share * 100 > len(w)), "")
        narrow = " narrow" if share < 0.3 else ""
        return f'<span class="{css}{narrow}" style="width:{share * 100:.3f}%" data-tip="{esc(words)}">{esc(said)}</span>'

    out = "".join(piece(*part) for part in parts)
    key = " ".join(f'<span><i class="chip {css}"></i>{esc(name)}</span>' for name, _, _, css in parts)
    return f'<div class="stack">{out}{wall}</div><p class="key">{key}{more}</p>'


def table(content: Table, heading: bool = True, sort: bool = False) -> str:
    """A table, its bars and whiskers drawn; with `sort`, a click on a head orders it."""
    if not content.rows and not content.note:
        return ""
    low, high = content.reach
    margin = (high - low or 1.0) * 0.06
    low, high = low - margin, high + margin

    def head(column: Column) -> str:
        return f'<th class="{column.kind}">{svg.scale(low, high) if column.kind == "span" else esc(column.title)}</th>'

    def cell(c: Cell, column: Column) -> str:
        value = "" if c.value is None else f' data-v="{c.value:.9g}"'
        tone = f" {c.tone}" if c.tone in ("good", "bad", "quiet") else ""
        if column.kind == "bar":
            inner = f'<i class="c-{c.tone}" style="width:{min(c.share, 1) * 100:.2f}%"></i>' if c.share else ""
        elif column.kind == "span":
            inner = svg.whisker(c.span, low, high) if c.span else ""
        else:
            chip = f'<i class="chip c-{c.tone}"></i>' if c.tone and not tone else ""
            inner = chip + esc(c.text) + (f'<span class="under">{esc(c.under)}</span>' if c.under else "")
        return f'<td class="{column.kind}{tone}"{value}>{inner}</td>'

    def row(cells: Sequence[Cell], css: str = "") -> str:
        return f"<tr{css}>{''.join(cell(c, k) for c, k in zip(cells, content.columns, strict=True))}</tr>"

    title = f"<h2>{esc(content.title)}</h2>" if heading and content.title else ""
    body = "".join(row(r) for r in content.rows) + (row(content.total, ' class="total"') if content.total else "")
    note = f'<p class="note">{esc(content.note)}</p>' if content.note else ""
    heads = "".join(map(head, content.columns))
    grid = f"<table{' class=sort' if sort else ''}><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    return title + (f'<div class="scroll">{grid}</div>' if content.rows else "") + note
