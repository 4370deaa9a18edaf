"""What a served load looked like, as one HTML page: who was where over time, how latencies spread, why the slowest were slow."""

import math
from collections.abc import Sequence
from html import escape

from narrows.report.listings import WHERE, latency_table, outcome_sentence, request_table
from narrows.report.page import esc, hero, kept, page, plot, shades, stack, table
from narrows.report.svg import WIDTH, Axis, as_percent, axes, drawing, line, plain, text
from narrows.report.tables import commas, percent
from narrows.simulate.outcome import Outcome
from narrows.simulate.requests import PARTS, Answer
from narrows.simulate.step_times import PS
from narrows.simulate.watch import Watch
from narrows.units import format_seconds

_LEFT, _RIGHT, _TOP, _BOTTOM = 92.0, 22.0, 20.0, 56.0
_COLOURS = {"waiting": "scheduling", "being read": "compute", "being answered": "bandwidth"}
_CURVES = (("to the first token", "ttft", "compute"), ("per further token", "tpot", "bandwidth"), ("in all", "e2e", "launch"))
_ROW = 26.0


def served(o: Outcome, watch: Watch, title: str, notes: Sequence[str] = (), stamp: str = "") -> str:
    """The page of a load that was served; `notes` are further sentences on it. The same arguments give the same bytes."""
    if not o.requests:
        return page(title, [("", hero("0", "requests served", outcome_sentence(o, title).rstrip(".")))], stamp)
    limited = min(o.ttft_limit, o.tpot_limit) < math.inf
    tiles = [
        (f"{o.requests / max(o.seconds, 1e-12):.3g} requests/s", f"{commas(o.tokens / max(o.seconds, 1e-12))} tokens a second"),
        (format_seconds(o.tpot.quantile(0.99)), "per further token, 99 % are below"),
        (format_seconds(o.e2e.quantile(0.99)), "in all, 99 % are below"),
        (percent(o.good / o.requests), "within the limits") if limited else (commas(o.preemptions), "evictions"),
    ]
    grid = "".join(f"<div><b>{esc(figure)}</b><span>{esc(what)}</span></div>" for figure, what in tiles)
    body = [
        hero(format_seconds(o.ttft.quantile(0.99)), "to the first token, 99 % are below", outcome_sentence(o, title).rstrip(".")),
        f'<div class="tiles">{grid}</div>',
        plot("Requests inside", "How many wait, are read and are answered, on top of each other.", inside(watch)),
        plot("Latencies", "The share of the requests that took no longer. Dashed: what they must keep.", spread(o)),
        kept("Why", _parts_bar(o) + table(request_table(o), heading=False)),
        plot("The slowest requests", "Where the time of each went; the uppermost is the mean of all.", slowest(o, watch)),
        table(latency_table(o)),
        *(f'<p class="note">{esc(note)}</p>' for note in (*o.notes(), *notes)),
    ]
    return page(title, [("", "\n".join(body))], stamp)


def _spent(o: Outcome) -> list[tuple[str, float]]:
    """Parts of the mean latency that are not nothing, the largest first."""
    return [(part, seconds) for part, seconds in o.ledger().items() if seconds]


def _parts_bar(o: Outcome) -> str:
    parts = _spent(o)
    whole = sum(seconds for _, seconds in parts)
    css = shades([WHERE[part][1] for part, _ in parts])
    return stack([(WHERE[part][0], f"{WHERE[part][0]} {percent(seconds / whole)}", seconds / whole, c)
                  for (part, seconds), c in zip(parts, css, strict=True)])  # fmt: skip


def inside(watch: Watch, height: float = 260.0) -> str:
    """Requests in each state over time, stacked."""
    rows, each = watch.inside(), watch.bin_seconds
    sums = [sum(at) for at in zip(*rows.values(), strict=True)]
    x = Axis(0.0, len(sums) * each, _LEFT, WIDTH - _RIGHT)
    y = Axis(0.0, max(sums) * 1.06, height - _BOTTOM, _TOP)
    out, below = axes(x, y, "time", format_seconds, plain), [0.0] * len(sums)
    for state, row in rows.items():
        above = [a + b for a, b in zip(below, row, strict=True)]
        edge = "".join(f"L{x(i * each):.1f} {y(n):.1f}H{x((i + 1) * each):.1f}" for i, n in enumerate(above))
        back = "".join(f"L{x((i + 1) * each):.1f} {y(below[i]):.1f}H{x(i * each):.1f}" for i in reversed(range(len(below))))
        tip = f"{state}: {sum(row) / len(row):.3g} in the mean, {max(row):.3g} at most"
        out.append(f'<path d="M{edge[1:]}{back}Z" class="part c-{_COLOURS[state]}" data-tip="{escape(tip)}"/>')
        below = above
    return drawing("Requests inside over time", out, height) + _key([(state, _COLOURS[state]) for state in rows])


def spread(o: Outcome, height: float = 300.0) -> str:
    """How latencies spread: the share of the requests below each, on a logarithmic axis."""
    curves = [(name, getattr(o, field).curve(), limit, css)
              for (name, field, css), limit in zip(_CURVES, (o.ttft_limit, o.tpot_limit, math.inf), strict=True)
              if getattr(o, field).count]  # fmt: skip
    limits = [limit for *_, limit, _ in curves if limit < math.inf]
    low = min([curve[0][0] for _, curve, _, _ in curves] + limits)
    high = max([curve[-1][0] for _, curve, _, _ in curves] + limits)
    x = Axis(max(low, 1e-6) / 1.3, max(high, 2e-6) * 1.3, _LEFT, WIDTH - _RIGHT, log=True)
    y = Axis(0.0, 1.0, height - _BOTTOM, _TOP)
    out = axes(x, y, "seconds", format_seconds, as_percent)
    for _, curve, limit, css in curves:
        steps = "".join(f"H{x(max(value, x.low)):.1f}V{y(share):.1f}" for value, share in curve)
        out.append(f'<path d="M{x.start:.1f} {y.start:.1f}{steps}H{x.end:.1f}" class="curve c-{css}"/>')
        if limit < math.inf:
            out.append(line(x(limit), y.start, x(limit), y.end, f"limit c-{css}"))
    return drawing("How latencies spread", out, height) + _key([(name, css) for name, _, _, css in curves])


def slowest(o: Outcome, watch: Watch) -> str:
    """A bar for each of the slowest requests, split by where its time went, below one for the mean of all."""
    parts = [part for part, _ in _spent(o)]
    css = dict(zip(parts, shades([WHERE[part][1] for part in parts]), strict=True))
    rows = [("mean of all", o.ledger())] + [
        (_label(one), {part: getattr(one, part) / PS for part in PARTS}) for one in watch.slowest
    ]
    base = _TOP + _ROW * len(rows)
    x = Axis(0.0, max(sum(row.values()) for _, row in rows) * 1.02, 270.0, WIDTH - _RIGHT)
    out = []
    for at in x.ticks():
        out += [line(x(at), _TOP, x(at), base, "grid"), text(x(at), base + 18, format_seconds(at), "muted", "middle")]
    for i, (label, row) in enumerate(rows):
        top, done = _TOP + i * _ROW, 0.0
        out.append(text(x.start - 10, top + 17, label, "" if i == 0 else "muted", "end"))
        for part in parts:
            if row[part]:
                tip = f"{WHERE[part][0]}: {format_seconds(row[part])} of {format_seconds(sum(row.values()))}"
                wide = max(x(done + row[part]) - x(done), 0.2)
                out.append(f'<rect x="{x(done):.1f}" y="{top + 3:.1f}" width="{wide:.2f}" height="{_ROW - 6:.1f}" '
                           f'class="part {css[part]}" data-tip="{escape(tip)}"/>')  # fmt: skip
                done += row[part]
    return drawing("Where the time of the slowest requests went", out, base + 30) + _key(
        [(WHERE[p][0], css[p][2:]) for p in parts]
    )


def _label(one: Answer) -> str:
    return f"{commas(one.request.prompt)} + {commas(one.request.tokens)} tokens, at {format_seconds(one.request.arrival / PS)}"


def _key(named: Sequence[tuple[str, str]]) -> str:
    return '<p class="key">' + " ".join(f'<span><i class="chip c-{css}"></i>{esc(name)}</span>' for name, css in named) + "</p>"
