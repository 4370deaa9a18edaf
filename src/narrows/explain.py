"""A diagnosis that teaches: what the shapes of a network cost on a machine, and the arithmetic behind any of its ops.

Every figure of a finding is a what-if: the cost model is asked again, for the same op with another shape.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from narrows.costmodel import achieved, constants, op_time, peak, useful
from narrows.diagnose import Diagnosis, OpDiagnosis
from narrows.errors import NarrowsError, closest
from narrows.formulas import formulas, with_values
from narrows.graph import Op, Size
from narrows.units import format_bytes, format_flop, format_rate, format_seconds

LEAST = 0.02  # of a step: what costs less is not worth a change of shape
WASTE = 0.10  # of a step that partial tiles must take before a change of the rows is proposed
_ROUND = (8, 16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class Finding:
    """A shape that costs time: the costliest op that has it, the problem, and the remedy with its figures.

    loss_seconds    of the step, by which the problem exceeds the same work in the shape of the remedy
    gain            speed-up of the step, at equal work, that the remedy is predicted to give
    """

    op: str
    problem: str
    loss_seconds: float
    remedy: str
    gain: float


@dataclass(frozen=True)
class _Axis:
    """A size that can be chosen otherwise: `value` of an op or None, sizes to try, the op with another size.

    `same` makes the work comparable: at equal work a step with twice the rows is done half as often (True); padding
    is work that was not there before, and is charged (False).
    """

    value: Callable[[Op, dict[str, Any], Diagnosis], float | None]
    tried: Callable[[float, Diagnosis], Iterable[float]]
    reshaped: Callable[[Op, dict[str, Any], float], Op]
    problem: str
    remedy: str
    same: bool = False
    partial: float = 0.0  # share of the step that partial tiles of these ops must take


def _around(size: float, _: Diagnosis) -> list[float]:
    near = {to * math.floor(size / to) for to in _ROUND[:-1]} | {to * math.ceil(size / to) for to in _ROUND[:-1]}
    return sorted(v for v in near if size / 1.5 <= v <= size * 1.5 and v != size)


def _padded(size: float, d: Diagnosis) -> list[float]:
    return sorted({to * math.ceil(size / to) for to in (*_ROUND, d.machine.tile[1])} - {size})


def _tiled(rows: float, d: Diagnosis) -> list[float]:
    tile = d.machine.tile[0]
    counts = {f(rows / tile / many) * many for many in (1, 2, 4, 8, 16) for f in (math.floor, math.ceil)}
    return sorted(n * tile for n in counts if rows / 2 <= n * tile <= rows * 2 and n * tile != rows)


def _head_size(op: Op, dims: dict[str, Any]) -> float | None:
    """The size of an attention head: of fused attention, or the shorter fixed side of a batch of products."""
    if op.kind == "attention":
        return float(dims["head_dim"]) if dims["head_dim"] == dims["value_dim"] else None
    if op.kind != "matmul" or dims["matrices"] <= 1:
        return None
    return min((float(dims[side]) for side in ("inputs", "outputs") if not isinstance(op[side], Size)), default=None)


def _head(op: Op, dims: dict[str, Any], _: Diagnosis) -> float | None:
    size = _head_size(op, dims)
    return size if size and size % 64 else None


def _other_heads(op: Op, dims: dict[str, Any], size: float) -> Op:
    """Heads of another size that are together as wide as before: equal FLOP, and equal bytes of keys and values."""
    if op.kind == "attention":
        many = dims["head_dim"] / size
        return op.but(head_dim=size, value_dim=size, heads=dims["heads"] * many, kv_heads=dims["kv_heads"] * many)
    old = _head_size(op, dims) or size
    side, many = ("inputs" if dims["inputs"] == old else "outputs"), old / size
    return op.but(**{side: size, "rows": dims["rows"] * many, "matrices": dims["matrices"] * many})


def _side(name: str) -> Callable[[Op, dict[str, Any], Diagnosis], float | None]:
    """The inputs or outputs of a product, unless they are the size of an attention head."""
    return lambda op, dims, _: (
        float(dims[name]) if op.kind in ("linear", "matmul", "expert") and dims[name] != _head_size(op, dims) else None
    )


def _rows(op: Op, dims: dict[str, Any], _: Diagnosis) -> float | None:
    name = "positions" if op.kind == "conv" else "rows"
    return dims[name] if op.kind in ("linear", "conv") or (op.kind == "matmul" and dims["matrices"] == 1) else None


def _tokens_of_expert(op: Op, dims: dict[str, Any], d: Diagnosis) -> float | None:
    if op.kind != "expert":
        return None
    each = dims["rows"] * dims["top_k"] / max(float(op.spec.touched(dims)) * dims["experts"], 1.0)
    return each if each < d.machine.tile[0] else None


_AXES = (
    _Axis(
        _head,
        _around,
        _other_heads,
        "head size {value:,.6g} is not a multiple of 64: this costs {ops} {lost:.0%}",
        "head size {best:,.6g}, and so many heads that together they stay as wide",
    ),
    _Axis(
        _side("outputs"),
        _padded,
        lambda op, dims, size: op.but(outputs=size),
        "{value:,.6g} outputs do not fill tiles or vector loads: this costs {ops} {lost:.0%}",
        "pad to {best:,.6g} outputs (a vocabulary: rows that no token uses)",
    ),
    _Axis(
        _side("inputs"),
        _padded,
        lambda op, dims, size: op.but(inputs=size),
        "{value:,.6g} inputs do not fill vector loads: this costs {ops} {lost:.0%}",
        "pad to {best:,.6g} inputs",
    ),
    _Axis(
        _rows,
        _tiled,
        lambda op, dims, size: op.but(**{"positions" if op.kind == "conv" else "rows": size}),
        "{value:,.6g} rows leave partial tiles or a partial last wave: this costs {ops} {lost:.0%}",
        "{best:,.6g} rows a step (batch x tokens), figures per row",
        same=True,
        partial=WASTE,
    ),
    _Axis(
        _tokens_of_expert,
        lambda each, d: [float(d.machine.tile[0])],
        lambda op, dims, each: op.but(rows=each * dims["experts"] / dims["top_k"]),
        "{value:,.3g} tokens per expert that is read: this costs {ops} {lost:.0%}",
        "batches that give an expert {best:,.6g} tokens (or fewer, larger experts), figures per token",
        same=True,
    ),
    _Axis(
        lambda op, dims, d: dims["pairs"] / max(dims["queries"], 1.0) if op.kind == "attention" else None,
        lambda met, d: [2 * met],
        lambda op, dims, met: op.but(pairs=2 * dims["pairs"], context=2 * dims["context"]),
        "a query meets {value:,.6g} keys, too few to hide the start of a row: this costs {ops} {lost:.0%}",
        "a window or sequence that gives {best:,.6g} keys a query (longer or packed sequences), figures per pair",
        same=True,
    ),
)


def findings(diagnosis: Diagnosis) -> list[Finding]:
    """What the shapes of a network cost, largest gain first: only what costs at least 2 % of the step.

    Ops that share a size are judged together, as they would change together. Findings overlap: their losses do not add.
    """
    found = [f for axis in _AXES for f in _along(axis, diagnosis)]
    found += _small_kernels(diagnosis)
    return sorted((f for f in found if f.loss_seconds >= LEAST * diagnosis.seconds), key=lambda f: -f.gain)


def _along(axis: _Axis, d: Diagnosis) -> Iterable[Finding]:
    alike: dict[float, list[tuple[OpDiagnosis, dict[str, Any]]]] = {}
    for entry in d.ops:
        dims = entry.op.sized(d.step)
        value = axis.value(entry.op, dims, d)
        if value:
            alike.setdefault(float(value), []).append((entry, dims))

    def spent(causes: Mapping[str, Any]) -> float:
        return math.fsum(float(s) for cause, s in causes.items() if cause != "launch")

    def changed(entry: OpDiagnosis, dims: dict[str, Any], size: float) -> float:
        op = axis.reshaped(entry.op, dims, size)
        seconds = spent(op_time(op, d.step, d.machine, d.eager).causes)
        if not axis.same:
            return seconds
        return seconds * float(entry.op.spec.flop(dims)) / max(float(op.spec.flop(op.sized(d.step))), 1e-300)

    for value, entries in alike.items():
        now = math.fsum(spent(entry.causes) for entry, _ in entries)
        padding = math.fsum(entry.causes.get("partial tiles", 0.0) for entry, _ in entries)
        if now < LEAST * d.seconds or padding < axis.partial * d.seconds:
            continue
        tried = {size: math.fsum(changed(entry, dims, size) for entry, dims in entries) for size in axis.tried(value, d)}
        best = min(tried, key=lambda size: tried[size], default=value)
        loss = now - tried.get(best, now)
        if loss <= 0:
            continue
        slowest = max(entries, key=lambda pair: pair[0].seconds)[0]
        names = {entry.op.name for entry, _ in entries}
        ops = slowest.op.name + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        figures = ", ".join(f"{size:,.6g}: {seconds / now - 1:+.0%}" for size, seconds in sorted(tried.items()))
        filled = {"value": value, "best": best, "ops": ops, "lost": loss / now}
        problem = axis.problem.format(**filled).replace("%", " %")
        remedy = f"{axis.remedy.format(**filled)} (time at {figures})".replace("%", " %") + _basis(value, slowest.op, d)
        yield Finding(slowest.op.name, problem, loss, remedy, d.seconds / (d.seconds - loss))


def _basis(size: float, op: Op, d: Diagnosis) -> str:
    """Where the model has it from that an unaligned size is slow: one constant decides such a finding."""
    if not size % 8 or op.kind not in ("linear", "matmul") or d.machine.kind != "gpu":
        return ""
    kept = achieved(d.machine, "unaligned")
    return f"; unaligned keeps {kept.median:.3g} of the speed ({kept.source})"


def _small_kernels(d: Diagnosis) -> list[Finding]:
    """Launches: what a compiler or a captured graph would save in eager mode; else what half as many kernels would."""
    loss = d.ledger.get("launch", 0.0)
    if not loss:
        return []
    slowest = max(d.ops, key=lambda entry: entry.causes.get("launch", 0.0)).op.name
    count = float(d.cost.launches)
    each = format_seconds(d.seconds / max(count, 1.0))
    problem = f"{count:,.0f} kernels of {each} each: starting them takes {loss / d.seconds:.0%} of the step"
    if d.eager:
        left = math.fsum(float(op_time(e.op, d.step, d.machine).seconds) for e in d.ops)
        remedy = f"compile it, or record it as one graph: {format_seconds(left)} a step"
    else:
        left, remedy = d.seconds - loss / 2, "fuse neighbours, or give each more work: half as many kernels would save half of it"
    return [Finding(slowest, problem.replace("%", " %"), loss, remedy, d.seconds / left)] if left < d.seconds else []


def explain(diagnosis: Diagnosis, name: str) -> str:
    """The arithmetic behind each op that `name` means, with the values put in (see `explanations`)."""
    return "\n\n".join(explanations(diagnosis, name))


def explanations(diagnosis: Diagnosis, name: str) -> list[str]:
    """One text per op: its formulas with the values put in, the peaks, the constants and where they come from, time by cause.

    `name` is an op's whole name, else the end of one (`q_proj`), else a glob; `layers.3.q_proj` finds `layers.*.q_proj`.
    Raises NarrowsError where there is none.
    """
    ways: tuple[Callable[[str], bool], ...] = (
        lambda own: own == name,
        lambda own: own.endswith(f".{name}"),
        lambda own: fnmatchcase(own, name) or fnmatchcase(name, own),
    )
    for way in ways:
        if chosen := [entry for entry in diagnosis.ops if way(entry.op.name)]:
            return [_explained(entry, diagnosis) for entry in chosen]
    known = {entry.op.name for entry in diagnosis.ops}
    near = closest(name, sorted(known | {own.rsplit(".", 1)[-1] for own in known}))
    raise NarrowsError(f"no op is called {name!r}.", where=f"{diagnosis.model} {diagnosis.step.phase}", remedy=near)


def _explained(entry: OpDiagnosis, d: Diagnosis) -> str:
    op, work, machine = entry.op, entry.cost, d.machine
    lines: list[tuple[str, str]] = []
    for part, text in formulas(op, d.step, d.eager).items():
        amount = float(getattr(work, part))
        shown = format_flop(amount) if part == "flop" else format_bytes(amount)
        lines += [
            ("FLOP" if part == "flop" else part.removesuffix("_bytes"), f"= {text}"),
            ("", f"= {with_values(text, op, d.step)} = {amount:,.6g} ({shown})"),
        ]
    moved, wire = float(work.read_bytes + work.write_bytes), machine.link or machine.host_link
    rates = {
        "arithmetic": (float(work.flop), peak(op, machine), "FLOP"),
        "memory": (moved, machine.memory.bandwidth_bytes_per_s, "B"),
        "link": (float(work.link_bytes), wire.bandwidth_bytes_per_s if wire else 1.0, "B"),
    }
    shares = constants(op, machine, op.sized(d.step), work, d.eager)
    for (what, (amount, rate, unit)), reached in zip(rates.items(), shares, strict=True):
        if amount:
            shown = format_flop(amount) if unit == "FLOP" else format_bytes(amount)
            lines.append((what, f"{shown} / {format_rate(rate, unit)} = {format_seconds(amount / rate)} at the datasheet's peak"))
            spread = f"{reached.low:.3g} to {reached.high:.3g}"
            lines.append(("", f"of which {reached.median:.3g} is reached ({spread}; {reached.source})"))
    if op.spec.matmul:
        share = float(useful(op, op.sized(d.step), machine))
        lines.append(("shape", f"{share:.1%} of the matrix units' work is useful: full tiles, full waves, aligned rows"))
    if work.launches:
        each = f"{format_seconds(machine.launch_seconds)} by the host, {format_seconds(machine.kernel_seconds)} on the device"
        lines.append(("launches", f"{float(work.launches):,.0f}, at {each}"))
    causes = " + ".join(f"{cause} {format_seconds(s)}" for cause, s in entry.causes.items())
    lines.append(("time", f"= {causes or '0 s'} = {format_seconds(entry.seconds)}, limited by {entry.limit}"))
    ends = f"{format_seconds(entry.low_seconds)} to {format_seconds(entry.high_seconds)}"
    domain = "" if entry.inside else "; not measured on this generation of hardware"
    lines.append(("interval", f"80 %: {ends}{domain}; no kernel can take less than {format_seconds(entry.bound_seconds)}"))
    share = entry.seconds / d.seconds if d.seconds else 0.0
    head = f"{op.name} ({op.kind}, {op.phase}, {op.repeat} x): {format_seconds(entry.seconds)}, {share:.1%} of the step"
    return "\n".join([head, *(f"  {label:<11}{text}" for label, text in lines)]).replace("% ", " % ")
