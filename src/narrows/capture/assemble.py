"""From the operators that ran (`Event`s) to the ops of a Graph: fusing, naming, owners of parameters, folding."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from narrows.capture import aten
from narrows.capture.events import Basis, Event, View
from narrows.graph import DType, Op
from narrows.kinds import KINDS

_ROWS = {"linear": ("rows",), "matmul": ("rows",), "expert": ("rows",), "conv": ("positions", "in_positions")}


@dataclass(frozen=True)
class Parameter:
    """What assembling must know of a parameter: elements, storage format, dimensions."""

    count: int
    dtype: DType
    rank: int


@dataclass
class Run:
    """Events that a compiler would make one kernel of (all but arithmetic: one event each), and their indices."""

    events: list[Event]
    indices: list[int]
    name: str = ""


def assemble(
    events: Sequence[Event], parameters: Mapping[str, Parameter], outputs: Iterable[int], saved: Mapping[int, float],
    backward: Mapping[int, float], described: Iterable[str] = (), attention: Callable[[Event, Event], Event] | None = None,
) -> tuple[Op, ...]:  # fmt: skip
    """The ops of some events; layers that differ in their index alone are joined.

    `outputs` are storages that outlive the step, `saved` bytes kept for the backward pass by storage, `backward` the
    FLOP of each event's gradient. Parameters that no event reads, outside `described` modules, get an op of no work.
    `attention` makes one event of the two products of an attention that is written out; without it they stay.
    """
    live = _Live(events, outputs, saved)
    runs = _fuse(events, live, attention)
    _name(runs)
    of_event = {i: run for run in runs for i in run.indices}
    owners = _Owners(parameters)
    kept = _saved_by(runs, of_event, saved)
    ops: list[Op] = []
    gradients: list[tuple[int, Op]] = []
    for run in runs:
        inputs = tuple(dict.fromkeys(of_event[s].name for e in run.events for s in e.sources if of_event[s] is not run))
        op = _op(run, inputs, owners, live, parameters)
        if op is None:
            continue
        op = replace(op, saved=_whole(kept.get(run.indices[0], 0.0) * 8 / op.act.bits))
        ops.append(op)
        hit = [i for i in run.indices if i in backward]
        if hit:
            whole = sum(events[i].backward_flop for i in hit)
            share = sum(backward[i] for i in hit) / whole if whole else 1.0
            gradients.append((hit[0], _shared(replace(op, phase="backward", saved=0, tied=""), share)))
    ops += [op for _, op in sorted(gradients, key=lambda g: -g[0])]
    ops += owners.rest(set(described))
    return fold(ops)


def _fuse(events: Sequence[Event], live: "_Live", attention: Callable[[Event, Event], Event] | None) -> list[Run]:
    """Arithmetic in one module as runs: what follows each other, and what only a later run of the module reads."""
    runs: list[Run] = []
    done = 0
    for i, event in enumerate(events):
        end = _attention_end(events, i) if attention else 0
        if attention and end:
            runs.append(Run([attention(event, events[end])], list(range(i, end + 1))))
            done = end + 1
        if i < done:
            continue
        last = runs[-1].events[-1] if runs else None
        if last is not None and not (event.kind or last.kind) and _place(event) == _place(last):
            runs[-1].events.append(event)
            runs[-1].indices.append(i)
        else:
            runs.append(Run([event], [i]))
    home = {i: n for n, run in enumerate(runs) for i in run.indices}
    for n, run in enumerate(runs):
        readers = {home[i] for e in run.events for v in e.writes for i in live.readers.get(v[0], ())} - {n}
        if run.events[0].kind or len(readers) != 1 or any(v[0] in live.outputs for e in run.events for v in e.writes):
            continue
        later = runs[readers.pop()]
        if not later.events[0].kind and later.indices[0] > run.indices[0] and _place(later.events[0]) == _place(run.events[0]):
            later.events[:0], later.indices[:0] = run.events, run.indices
            home.update(dict.fromkeys(run.indices, runs.index(later)))
            run.events, run.indices = [], []
    return [run for run in runs if run.events]


def _attention_end(events: Sequence[Event], start: int) -> int:
    """Where the second product of an attention is whose first is at `start`, or 0: scores, arithmetic with a softmax, values."""
    if events[start].kind != "matmul":
        return 0
    for i in range(start + 1, len(events)):
        if _place(events[i]) != _place(events[start]) and events[i].leaf == "":
            return 0
        if events[i].kind:
            softmax = any(e.label == "softmax" for e in events[start + 1 : i])
            return i if softmax and events[i].kind == "matmul" and i - 1 in events[i].sources else 0
    return 0


def _place(event: Event) -> tuple[str, str, bool]:
    """Events of one place may become one kernel. What no input changes stays apart, but for a norm's own scale."""
    return event.path, event.phase, event.basis + bool(event.leaf) < Basis.INPUTS


def _name(runs: Sequence[Run]) -> None:
    """Names: the module path where that says it all, else with the parameter's or the operator's name behind."""
    used: dict[tuple[str, str], int] = {}
    for run in sorted(runs, key=lambda r: (not r.events[0].kind, -r.events[0].basis)):  # a layer's own op has its name
        first, last = run.events[0], run.events[-1]
        leaf = next((e.leaf for e in run.events if e.leaf), "")
        if first.op is not None and first.op.name:
            name = first.op.name
        elif first.kind and _owned_by(first):
            holder, _, own = first.params[0][0].rpartition(".")
            inside = not first.path or f"{holder}.".startswith(f"{first.path}.")  # else: tied to another module's
            name = holder if inside else first.path
            name = name if own == "weight" else f"{name}.{re.sub('_?weight$', '', own)}"
        else:
            name = leaf if leaf and (first.phase, leaf) not in used else f"{leaf or first.path}.{last.label}".lstrip(".")
        name = name or first.label
        count = used[first.phase, name] = used.get((first.phase, name), 0) + 1
        run.name = name if count == 1 else f"{name}_{count}"


def _owned_by(event: Event) -> bool:
    """Whether the op of an event has parameters of its own."""
    kind = KINDS[event.kind]
    return bool(event.params) and bool(kind.parameters({**kind.defaults, **event.dims}))


class _Live:
    """Which storages are read by whom, and which outlive the step."""

    def __init__(self, events: Sequence[Event], outputs: Iterable[int], saved: Iterable[int]) -> None:
        self.outputs, self.saved = set(outputs), set(saved)
        self.readers: dict[int, list[int]] = {}
        for i, event in enumerate(events):
            for view in event.reads:
                self.readers.setdefault(view[0], []).append(i)

    def after(self, storage: int, run: Run) -> bool:
        """Whether a storage that a run writes is needed outside it."""
        return storage in self.outputs or storage in self.saved or not set(self.readers.get(storage, ())) <= set(run.indices)


class _Owners:
    """Counts every parameter once: the first op to read it owns it, later ones are tied to that op."""

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self.parameters = parameters
        self.left = {name: p.count for name, p in parameters.items()}
        self.owner: dict[str, str] = {}

    def take(self, name: str, count: int, op: str) -> bool:
        """Whether `op` becomes the owner of `count` elements of a parameter."""
        if self.left[name] < count:
            return False
        self.left[name] -= count
        self.owner.setdefault(name, op)
        return True

    def rest(self, described: set[str]) -> list[Op]:
        """Ops of no work that hold what nothing owns, one per parameter."""
        out = []
        for name, count in self.left.items():
            if count and not any(name.startswith(f"{path}.") or not path for path in described):
                dtype = self.parameters[name].dtype
                dims = {"elements": 0, "reads": 0, "weights": count}
                out.append(Op(name, "elementwise", dims, act=dtype, weight=dtype, kernels=0))
        return out


def _op(run: Run, inputs: tuple[str, ...], owners: _Owners, live: _Live, parameters: Mapping[str, Parameter]) -> Op | None:
    event = run.events[0]
    weight = event.weight if event.kind and _owned_by(event) else None
    common: dict[str, Any] = {"act": event.act, "weight": weight, "inputs": inputs, "phase": event.phase}
    if event.op is not None:
        return replace(event.op, name=run.name, inputs=inputs, phase=event.phase)
    if event.kind:
        dims, tied = dict(event.dims), ""
        if event.phase == "forward" and _owned_by(event):
            for i, (name, count) in enumerate(event.params):
                if owners.take(name, count, run.name):
                    continue
                if i == 0 and event.kind != "norm":
                    tied = owners.owner[name]
                elif event.kind == "norm":
                    dims["weights"] -= 1
                else:
                    dims["bias"] = 0
            if tied and dims.get("bias"):  # a tied op owns nothing: its bias is left to `rest`
                for name, count in event.params[1:]:
                    owners.left[name] += count
        return Op(run.name, event.kind, dims, cache=event.cache, tied=tied, **common)
    return _arithmetic(run, common, owners, live, parameters)


def _arithmetic(run: Run, common: dict[str, Any], owners: _Owners, live: _Live, parameters: Mapping[str, Parameter]) -> Op | None:
    """A run of arithmetic as one op: what it reads from outside, what leaves it, and its parameters."""
    outside: dict[int, set[View]] = {}
    leaving: dict[int, float] = {}
    dtypes: dict[int, DType] = {}
    made: set[int] = set()
    for event in run.events:
        for view in event.reads:
            if view[0] not in made:
                outside.setdefault(view[0], set()).add(view)
        for view in event.writes:
            made.add(view[0])
            if live.after(view[0], run):
                leaving[view[0]] = max(leaving.get(view[0], 0.0), view[3])
                dtypes[view[0]] = event.act
    read_bytes, written_bytes = sum(_covered(views) for views in outside.values()), sum(leaving.values())
    act = max(((size, dtypes[key].name, dtypes[key]) for key, size in leaving.items()), default=(0, "", common["act"]))[2]
    last, flop = run.events[-1], sum(e.flop for e in run.events)
    first_reads = {name: count for e in run.events for name, count in e.params}
    owned = {n: c for n, c in first_reads.items() if run.events[0].phase != "forward" or owners.take(n, c, run.name)}
    if not leaving and not owned:
        return None
    elements, reads = _whole(written_bytes * 8 / act.bits), _whole(read_bytes * 8 / act.bits)
    weight = parameters[next(iter(first_reads))].dtype if owned else None
    common = {**common, "act": act, "weight": weight, "kernels": len(run.events)}
    normed = _normed(run, first_reads, parameters)
    if normed:
        tied = "" if len(owned) == len(first_reads) else owners.owner[next(iter(first_reads))]
        common |= {"act": last.act, "weight": parameters[next(iter(first_reads))].dtype}
        return Op(run.name, "norm", {**normed, "weights": len(first_reads)}, tied=tied, **common)
    each = flop / elements if elements else 0
    dims = {"elements": elements, "reads": reads, "flop_per_element": each, "weights": sum(owned.values())}
    return Op(run.name, "elementwise", dims, **common)


def _normed(run: Run, params: Mapping[str, int], parameters: Mapping[str, Parameter]) -> dict[str, float]:
    """The dims of a norm, if that is what a run writes out: a mean of squares or a variance, and vectors of one width."""
    written, width = int(run.events[-1].writes[0][3] * 8 / run.events[-1].act.bits), next(iter(params.values()), 0)
    if not width or written % width or any(count != width or parameters[name].rank != 1 for name, count in params.items()):
        return {}
    if not any(e.label in aten.REDUCES_TO_NORM for e in run.events):
        return {}
    return {"rows": written // width, "width": width, "flop_per_element": sum(e.flop for e in run.events) / written}


def _covered(views: set[View]) -> float:
    """Bytes that some views of one storage read, those inside a larger one left out."""
    taken: list[View] = []
    for view in sorted(views, key=lambda v: -v[3]):
        if not any(t[1] <= view[1] and view[2] <= t[2] for t in taken):
            taken.append(view)
    return sum(t[3] for t in taken)


def _saved_by(runs: Sequence[Run], of_event: Mapping[int, Run], saved: Mapping[int, float]) -> dict[int, float]:
    """Saved bytes by the run that made them, or that reads them first where they came from outside."""
    makers: dict[int, int] = {}
    for run in runs:
        for event in run.events:
            if event.phase == "forward":
                for view in event.writes:
                    makers[view[0]] = run.indices[0]
                for view in event.reads:
                    makers.setdefault(view[0], run.indices[0])
    total: dict[int, float] = {}
    for storage, size in saved.items():
        if storage in makers:
            total[makers[storage]] = total.get(makers[storage], 0.0) + size
    return total


def _shared(op: Op, share: float) -> Op:
    """A gradient op that does a share of the full gradient (frozen weights, or an input that wants none)."""
    if abs(share - 1.0) < 1e-9 or op.kind not in _ROWS:
        return op
    return op.but(**{dim: op[dim] * share for dim in _ROWS[op.kind]})


def _whole(value: float) -> float | int:
    return round(value) if abs(value - round(value)) < 1e-6 else value


def starred(name: str) -> str:
    """`layers.0.q` as `layers.*.q`."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def fold(ops: Iterable[Op]) -> tuple[Op, ...]:
    """Join ops that differ in the index of their layer, and in what they read from (the first layer's own input), alone."""
    joined: dict[Op, tuple[int, dict[str, None]]] = {}
    for op in ops:
        key = replace(op, name=starred(op.name), inputs=(), repeat=1, tied=starred(op.tied))
        count, inputs = joined.get(key, (0, {}))
        joined[key] = count + op.repeat, {**inputs, **dict.fromkeys(starred(i) for i in op.inputs)}
    return tuple(replace(op, repeat=n, inputs=tuple(inputs)) for op, (n, inputs) in joined.items())
