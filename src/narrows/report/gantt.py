"""A timeline as an SVG picture: a lane for each resource, a block for each span, coloured by the kind of its pass."""

from html import escape
from itertools import groupby

from narrows.report.svg import Axis, line, text
from narrows.simulate.timeline import Span, Timeline
from narrows.units import format_seconds

WIDTH = 960.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 92.0, 22.0, 8.0, 44.0
_TALLEST, _THINNEST = 26.0, 3.0
_LETTER = 7.0  # an upper estimate of a letter's width at 11 px
_COLOURS = {"F": "#3b78d8", "B": "#d9822b", "I": "#d9822b", "W": "#3a9d5d", "steps": "#3b78d8", "lost": "#c23b3b",
            "restart": "#d9822b", "waiting": "#8c8c8c", "other": "#8a63b8"}  # fmt: skip
_NAMES = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights", "steps": "steps",
          "lost": "lost", "restart": "restart", "waiting": "waiting", "other": "other"}  # fmt: skip
_STYLE = (
    ".gantt text{font:11px system-ui,sans-serif;fill:currentColor}.gantt .in{fill:#fff}"
    ".gantt .grid{stroke:currentColor;stroke-opacity:.15}.gantt .axis{stroke:currentColor;stroke-opacity:.5}"
)


def gantt(timeline: Timeline, label: str = "", height: float = 480.0) -> str:
    """An SVG picture to save as a file or to put into a page; a block's title says what it is, and from when to when.

    Spans that are too narrow to be told apart are drawn as one block, in the colour of what takes most of it.
    """
    lanes = timeline.lanes
    tall = max(_THINNEST, min(_TALLEST, (height - _TOP - _BOTTOM) / len(lanes)))
    base = _TOP + tall * len(lanes)
    x = Axis(0.0, timeline.seconds or 1.0, _LEFT, WIDTH - _RIGHT)
    out, every = list[str](), max(1, round(14 / tall))
    for at in x.ticks():
        out += [line(x(at), _TOP, x(at), base, "grid"), text(x(at), base + 16, format_seconds(at), anchor="middle")]
    kinds = dict[str, None]()
    for row, (name, lane) in enumerate(lanes.items()):
        top = _TOP + row * tall
        if row % every == 0:
            out.append(text(_LEFT - 8, top + tall / 2 + 4, f"rank {name}" if isinstance(name, int) else name, anchor="end"))
        size = f'width="{x.end - _LEFT:.1f}" height="{tall * 0.86:.1f}"'
        out.append(f'<rect x="{_LEFT}" y="{top:.1f}" {size} fill="#808080" fill-opacity="0.12"/>')
        for block in _blocks([timeline.spans[i] for i in lane], x):
            kind = _kind(block)
            kinds[kind] = None
            out.append(_block(block, x, top, tall * 0.86, kind))
    out.append(line(_LEFT, base, x.end, base, "axis"))
    at = _LEFT
    for kind in kinds:
        out.append(f'<rect x="{at:.0f}" y="{base + 26:.1f}" width="10" height="10" fill="{_COLOURS[kind]}"/>')
        out.append(text(at + 14, base + 35, _NAMES[kind]))
        at += 30 + len(_NAMES[kind]) * _LETTER
    words = label or f"{len(lanes)} resources, {format_seconds(timeline.seconds)}"
    head = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {base + _BOTTOM:.0f}"'
    body = "\n".join(out)
    return f'<svg class="gantt" {head} role="img" aria-label="{escape(words)}"><style>{_STYLE}</style>\n{body}\n</svg>'


def _blocks(spans: list[Span], x: Axis) -> list[list[Span]]:
    """The spans of a lane as they are drawn: alone, or all that begin on the same half pixel together."""
    drawn = [span for span in spans if span.end > span.start]
    return [list(group) for _, group in groupby(drawn, key=lambda span: round(x(span.start) * 2))]


def _kind(block: list[Span]) -> str:
    """The kind that takes most of a block."""
    taken = dict[str, float]()
    for span in block:
        kind = span.kind if span.kind in _COLOURS else "other"
        taken[kind] = taken.get(kind, 0.0) + span.end - span.start
    return max(taken, key=lambda kind: taken[kind])


def _block(block: list[Span], x: Axis, top: float, tall: float, kind: str) -> str:
    left, right = x(block[0].start), x(block[-1].end)
    name = str(block[0].name) if len(block) == 1 else f"{len(block)} passes"
    tip = f"{name}: {format_seconds(block[0].start)} to {format_seconds(block[-1].end)}"
    rect = (
        f'<rect x="{left:.2f}" y="{top:.1f}" width="{max(right - left - 0.4, 0.2):.2f}" height="{tall:.1f}" '
        f'fill="{_COLOURS[kind]}"><title>{escape(tip)}</title></rect>'
    )
    if tall < 12 or right - left < len(name) * _LETTER + 4:
        return rect
    return rect + text((left + right) / 2, top + tall / 2 + 4, name, "in", "middle")
