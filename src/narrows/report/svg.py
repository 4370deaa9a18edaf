"""Hand-written SVG plots of a diagnosis: roofline, waterline, and a predicted ratio. The page's CSS colours them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from narrows.diagnose import Diagnosis, OpDiagnosis
from narrows.report.tables import Span, clean, op_label, percent, short_name, times
from narrows.units import format_rate, format_seconds

WIDTH, HEIGHT = 960.0, 520.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 92.0, 22.0, 20.0, 56.0
_CHARACTER, _LINE = 6.6, 15.0  # an upper estimate of a letter's width at 12 px, and a line's height
_LABELS = 14
_LARGEST = 34.0  # the radius of an op that takes all of the time
_LIMITS = ("compute", "bandwidth", "communication", "launch")

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from `low` to `high` along the pixels from `start` to `end`, by their logarithm or as they are."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(max(v, 1e-300)) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Powers of ten of a logarithmic axis; else four to eight round values."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            every = max(1, (last - first) // 9 + 1)
            return [10.0**e for e in range(first, last + 1, every)]
        rough = (self.high - self.low) / 5
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * k for k in (1, 2, 2.5, 5, 10) if size * k >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def text(x: float, y: float, words: str, css: str = "", anchor: str = "start", turn: float = 0.0) -> str:
    """A line of text, escaped; turned about its own point by degrees."""
    rotated = f' transform="rotate({turn:.1f} {x:.1f} {y:.1f})"' if turn else ""
    named = f' class="{css}"' if css else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}{rotated}>{escape(clean(words))}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def tip(o: OpDiagnosis, step_seconds: float) -> str:
    """What hovering over an op shows, as the attribute `data-tip`."""
    away = f", {times(o.seconds / o.bound_seconds)} the bound" if o.bound_seconds else ""
    rows = (
        f"{clean(o.op.name)}{'' if o.op.phase == 'forward' else f' ({o.op.phase})'}",
        f"{o.op.kind}, {o.op.repeat} times, limited by {o.limit}",
        f"{format_seconds(o.seconds)}, {percent(o.seconds / step_seconds)} of the step{away}",
        f"{o.intensity:.3g} FLOP/byte, {format_rate(float(o.cost.flop) / o.seconds, 'FLOP')}",
    )
    return f'data-tip="{"&#10;".join(map(escape, rows))}"'


def place(
    points: Sequence[tuple[float, float, float, str]], taken: Sequence[Box], frame: Box
) -> list[tuple[float, float, str] | None]:
    """Where the label of each (x, y, radius, words) goes: (left, baseline, words), or None where there is no room.

    First come, first served. No label covers another, a box that is `taken`, another point, or the frame.
    """
    discs = [(x - r, y - r, x + r, y + r) for x, y, r, _ in points]
    used, found = list(taken), list[tuple[float, float, str] | None]()
    for i, (x, y, r, words) in enumerate(points):
        width = len(words) * _CHARACTER
        slots = [slot for gap in (r + 5, r + 20, r + 38, r + 60) for slot in _around(x, y, gap, width)]
        others = [disc for j, disc in enumerate(discs) if j != i]
        free = None
        for left, base in slots:
            box = (left - 2, base - _LINE + 3, left + width + 2, base + 4)
            inside = frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]
            if inside and not any(_overlap(box, other) for other in (*used, *others)):
                free = (left, base, words)
                used.append(box)
                break
        found.append(free)
    return found


def _around(x: float, y: float, gap: float, width: float) -> list[tuple[float, float]]:
    """(left, baseline) of labels around a point: right, left, above, below, then the corners."""
    side = gap * 0.75
    return [
        (x + gap, y + 4),
        (x - gap - width, y + 4),
        (x - width / 2, y - gap),
        (x - width / 2, y + gap + 10),
        (x + side, y - side),
        (x - side - width, y - side),
        (x + side, y + side + 8),
        (x - side - width, y + side + 8),
    ]


def _leader(x: float, y: float, r: float, left: float, base: float, words: str) -> list[str]:
    """A thin line from a point to its label, where they are not side by side."""
    end_x, end_y = min(max(x, left), left + len(words) * 5.6), base + 3 if base < y else base - 11
    away = math.hypot(end_x - x, end_y - y)
    return [line(x + (end_x - x) * r / away, y + (end_y - y) * r / away, end_x, end_y, "leader")] if away > r + 12 else []


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def drawing(label: str, body: Sequence[str], height: float = HEIGHT) -> str:
    """A plot as wide as the page, with what it shows for those who cannot see it."""
    head = f'viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(clean(label))}"'
    return f'<div class="scroll"><svg class="plot" {head}>' + "\n".join(body) + "</svg></div>"


def legend(limits: Sequence[str]) -> str:
    """A key to the colours."""
    return '<p class="key">' + " ".join(f'<span><i class="chip c-{name}"></i>{name}</span>' for name in limits) + "</p>"


def used_peaks(d: Diagnosis) -> dict[str, float]:
    """The machine's peaks that this step can run into, highest first: matmuls in their type, all else in fp32."""
    names = {d.machine.computes_in((o.op.compute or o.op.act.name) if o.op.spec.matmul else "fp32") for o in d.ops if o.cost.flop}
    return dict(sorted(((n, d.machine.peak(n)) for n in names), key=lambda item: (-item[1], item[0])))


def _drawn(d: Diagnosis) -> list[OpDiagnosis]:
    return sorted((o for o in d.ops if o.cost.flop and o.seconds), key=lambda o: -o.seconds)


def roofline(d: Diagnosis) -> str:
    """FLOP/s against FLOP/byte, both logarithmic: a roof per type and per memory tier, a disc per op with its time as area.

    '' where no op computes anything.
    """
    ops, peaks, whole = _drawn(d), used_peaks(d), d.seconds
    if not ops:
        return ""
    top, main = max(peaks.values()), d.machine.memory.bandwidth_bytes_per_s
    reached = [float(o.cost.flop) / o.seconds for o in ops]
    span = [o.intensity for o in ops] + [top / main]
    x = Axis(min(span) / 2.5, max(span) * 4, _LEFT, WIDTH - _RIGHT, log=True)
    y = Axis(min([*reached, min(peaks.values())]) / 3, top * 2.2, HEIGHT - _BOTTOM, _TOP, log=True)
    frame = (_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM)
    out, taken = axes(x, y, "FLOP per byte of main memory", plain, lambda v: format_rate(v, "FLOP")), list[Box]()
    for i, tier in enumerate(d.machine.memories):
        taken += _along(x, y, tier.bandwidth_bytes_per_s, top)
        out += _slope(
            x,
            y,
            tier.bandwidth_bytes_per_s,
            top,
            f"{tier.name} {format_rate(tier.bandwidth_bytes_per_s, 'B')}",
            "roof" if not i else "roof thin",
        )
    for name, peak in peaks.items():
        words = f"{name} {format_rate(peak, 'FLOP')}"
        out.append(line(x(max(peak / d.machine.memories[-1].bandwidth_bytes_per_s, x.low)), y(peak), x.end, y(peak), "roof thin"))
        out.append(line(x(max(peak / main, x.low)), y(peak), x.end, y(peak), "roof"))
        out.append(text(x.end - 4, y(peak) - 6, words, "muted", "end"))
        taken += [
            (x.end - 4 - len(words) * _CHARACTER, y(peak) - 20, x.end, y(peak)),
            (x(max(peak / main, x.low)), y(peak) - 1, x.end, y(peak) + 1),
        ]
    points = [
        (x(o.intensity), y(r), max(2.5, _LARGEST * math.sqrt(o.seconds / whole))) for o, r in zip(ops, reached, strict=True)
    ]
    out += [
        f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{r:.1f}" class="dot c-{o.limit.value}" {tip(o, whole)}/>'
        for o, (px, py, r) in zip(ops, points, strict=True)
    ]
    merged: dict[tuple[int, int], list[int]] = {}
    for i, (px, py, _) in enumerate(points):  # ops that lie on each other share a label
        merged.setdefault((round(px / 4), round(py / 4)), []).append(i)
    first, rest = list(merged.values())[: 2 * _LABELS], list(merged.values())[2 * _LABELS :]
    named = [(*points[group[0]], _joined([ops[i] for i in group])) for group in first]
    taken += [(px - r, py - r, px + r, py + r) for px, py, r in (points[group[0]] for group in rest)]
    spots = [(point, spot) for point, spot in zip(named, place(named, taken, frame), strict=True) if spot][:_LABELS]
    out += [part for point, spot in spots for part in _leader(*point[:3], *spot)]
    out += [text(*spot, css="label") for _, spot in spots]
    label = f"Roofline of {d.model} on {d.machine.name}"
    return drawing(label, out) + legend([n for n in _LIMITS if any(o.limit == n for o in ops)])


def _joined(ops: Sequence[OpDiagnosis]) -> str:
    """'mlp.gate_proj, up_proj': a common parent is said once, and the phase where all are of one that is not forward."""
    names = list(dict.fromkeys(short_name(o.op.name) for o in ops))
    parent = names[0].rpartition(".")[0] + "."
    said = [names[0], *(n.removeprefix(parent) for n in names[1:])]
    phases = {o.op.phase for o in ops}
    phase = f" ({phases.pop()})" if len(phases) == 1 and "forward" not in phases else ""
    return ", ".join(said[:3]) + (f" +{len(said) - 3}" if len(said) > 3 else "") + phase


def plain(value: float) -> str:
    return f"{value:g}" if not value or 1e-3 <= value < 1e5 else f"{value:.0e}"


def as_percent(value: float) -> str:
    return f"{value * 100:.3g} %"


def axes(x: Axis, y: Axis, below: str, across: Callable[[float], str], up: Callable[[float], str]) -> list[str]:
    """Ticks, a grid and what the horizontal axis counts."""
    out = []
    for v in x.ticks():
        out.append(line(x(v), y.start, x(v), y.end, "grid"))
        out.append(text(x(v), y.start + 18, across(v), "muted", "middle"))
    for v in y.ticks():
        out.append(line(x.start, y(v), x.end, y(v), "grid"))
        out.append(text(x.start - 8, y(v) + 4, up(v), "muted", "end"))
    out.append(line(x.start, y.start, x.end, y.start, "axis"))
    out.append(text((x.start + x.end) / 2, y.start + 42, below, "muted", "middle"))
    return out


def _slope(x: Axis, y: Axis, bandwidth: float, top: float, words: str, css: str) -> list[str]:
    """The slanted roof of a memory tier, from the frame to the ridge, with its name along it."""
    start, end = max(x.low, y.low / bandwidth), min(top / bandwidth, x.high)
    if start >= end:
        return []
    x1, y1, x2, y2 = x(start), y(start * bandwidth), x(end), y(end * bandwidth)
    turn = math.degrees(math.atan2(y2 - y1, x2 - x1))
    out = [line(x1, y1, x2, y2, css)]
    if math.hypot(x2 - x1, y2 - y1) > len(words) * _CHARACTER * 1.2:
        part = 0.5 if "thin" not in css else 0.35
        out.append(text(x1 + (x2 - x1) * part, y1 + (y2 - y1) * part - 7, words, "muted", "middle", turn))
    return out


def _along(x: Axis, y: Axis, bandwidth: float, top: float) -> list[Box]:
    """A slanted roof as small boxes, for labels to keep off."""
    first, last = x(max(x.low, y.low / bandwidth)), x(min(top / bandwidth, x.high))
    rise = (y(bandwidth) - y(10 * bandwidth)) / (x(10.0) - x(1.0))
    return [(px - 4, py - 4, px + 4, py + 4) for px in _steps(first, last, 8.0) for py in (y(bandwidth) - rise * (px - x(1.0)),)]


def _steps(first: float, last: float, by: float) -> list[float]:
    return [first + i * by for i in range(max(0, int((last - first) / by)) + 1)]


def waterline(d: Diagnosis) -> str:
    """Each op as a bar as wide as its share of the time and as high as its share of the peak, under the best it could reach.

    All heights are fractions of one peak, the highest in use, so that the area of the bars is the fraction of it that
    the whole step reaches. The waterline is the roofline at the op's intensity; the area between is the efficiency gap.
    '' where no op computes anything. After Lavin, On the Efficiency of Convolutional Neural Networks.
    """
    ops, whole = [o for o in d.ops if o.seconds], d.seconds
    peak = max(used_peaks(d).values(), default=0.0)
    if not peak or not ops:
        return ""
    height = 380.0
    best = [float(o.cost.flop) / o.bound_seconds / peak if o.bound_seconds else 0.0 for o in ops]
    mean = float(d.cost.flop) / whole / peak
    x, y = Axis(0.0, 1.0, _LEFT, WIDTH - _RIGHT), Axis(0.0, max(best) * 1.08, height - _BOTTOM, _TOP)
    out = axes(x, y, "", as_percent, as_percent)
    bars, labels, path, at = [], [], [f"M{x.start:.1f} {y(best[0]):.1f}"], 0.0
    for o, roof in zip(ops, best, strict=True):
        left, right = x(at), x(at := at + o.seconds / whole)
        got = y(float(o.cost.flop) / o.seconds / peak)
        wide = max(right - left - (0.6 if right - left > 3 else 0.0), 0.2)
        pair = _block(left, y(roof), wide, y.start, "gap") + _block(left, got, wide, y.start, f"bar c-{o.limit.value}")
        bars.append(f"<g {tip(o, whole)}>{pair}</g>")
        path.append(f"V{y(roof):.1f}H{right:.1f}")
        labels += _name(op_label(o), left, right, y, got, o.limit.value)
    out += [*bars, f'<path d="{"".join(path)}" class="water"/>', *labels, line(x.start, y(mean), x.end, y(mean), "mean")]
    out.append(
        text(
            x.end,
            height - 12,
            f"each op as wide as its share of the {format_seconds(whole)}, in the order in which they run",
            "muted",
            "end",
        )
    )
    out.append(text(x.start, height - 12, f"dashed: the whole step, {mean * 100:.2g} % of peak", "muted"))
    found = [n for n in _LIMITS if any(o.limit == n for o in ops)]
    return drawing(f"Waterline of {d.model} on {d.machine.name}", out, height) + legend(found)


def _block(left: float, top: float, wide: float, base: float, css: str) -> str:
    return f'<rect x="{left:.1f}" y="{top:.1f}" width="{wide:.2f}" height="{base - top:.1f}" class="{css}"/>'


def _name(words: str, left: float, right: float, y: Axis, top: float, limit: str) -> list[str]:
    """A bar's name in the bar, across or upright, or upright above it, or nowhere: wherever it fits."""
    middle, length = (left + right) / 2, len(words) * _CHARACTER
    if right - left > length and y.start - top > _LINE + 6:
        return [text(middle, y.start - 8, words, f"on c-{limit}", "middle")]
    if right - left < _LINE:
        return []
    if y.start - top > length + 8:
        return [text(middle + 4, y.start - 7, words, f"on c-{limit}", turn=-90.0)]
    return [text(middle + 4, top - 6, words, turn=-90.0)] if top - y.end > length else []


def whisker(span: Span, low: float, high: float, tone: str = "bandwidth") -> str:
    """A predicted ratio as a dot on its interval, drawn from `low` to `high`; what was measured as a diamond; a line at 1."""
    x = Axis(low, high, 8.0, 232.0)
    out = [line(x(1.0), 0, x(1.0), 28, "grid strong"), line(x(span.low), 14, x(span.high), 14, f"whisker c-{tone}")]
    out += [line(x(end), 9, x(end), 19, f"whisker c-{tone}") for end in (span.low, span.high)]
    out.append(f'<circle cx="{x(span.mid):.1f}" cy="14" r="4.5" class="dot c-{tone}"/>')
    if span.measured is not None:
        at = x(span.measured)
        out.append(f'<path d="M{at:.1f} 7l7 7l-7 7l-7 -7z" class="measured"/>')
    said = f"predicted {span.mid:.2f}, {span.low:.2f} to {span.high:.2f}" + (
        "" if span.measured is None else f", measured {span.measured:.2f}"
    )
    return f'<svg class="whiskers" viewBox="0 0 240 28" role="img" aria-label="{said}" data-tip="{said}">{"".join(out)}</svg>'


def scale(low: float, high: float) -> str:
    """The axis above a column of whiskers."""
    x = Axis(low, high, 8.0, 232.0)
    ticks = x.ticks()
    out = [
        text(x(v), 14, f"{v:g} x", "muted", "middle" if 20 < x(v) < 220 else "start" if x(v) <= 20 else "end")
        for v in ticks[:: max(1, len(ticks) // 5)]
    ]
    return f'<svg class="whiskers" viewBox="0 0 240 18" aria-hidden="true">{"".join(out)}</svg>'
