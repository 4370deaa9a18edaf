"""From the operators that ran (`Event`s) to the ops of a Graph: fusing, naming, owners of parameters, folding. No torch."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from narrows.capture import aten
from narrows.graph import DType, Op

if TYPE_CHECKING:
    from narrows.capture.tracer import Event, View

_ROWS = {"linear": ("rows",), "matmul": ("rows",), "expert": ("rows",), "conv": ("positions", "in_positions")}


@dataclass(frozen=True)
class Parameter:
    """What assembling must know of a parameter: elements, storage format, dimensions."""

    count: int
    dtype: DType
    rank: int


@dataclass
class Run:
    """Consecutive events that a compiler would make one kernel of (all but arithmetic: one event each)."""

    events: list["Event"]
    first: int  # index of its first event
    name: str = ""
    dims: dict[str, Any] = field(default_factory=dict)

    @property
    def indices(self) -> range:
        return range(self.first, self.first + len(self.events))


def assemble(
    events: Sequence["Event"], parameters: Mapping[str, Parameter], outputs: Iterable[int], saved: Mapping[int, float],
    backward: Mapping[int, float], described: Iterable[str] = (),
) -> tuple[Op, ...]:  # fmt: skip
    """The ops of some events; layers that differ in their index alone are joined.

    `outputs` are storages that outlive the step, `saved` bytes kept for the backward pass by storage, `backward` the
    FLOP of each event's gradient. Parameters that no event reads, outside `described` modules, get an op of no work.
    """
    runs = _fuse(events)
    _name(runs, parameters)
    of_event = {i: run for run in runs for i in run.indices}
    owners = _Owners(parameters)
    live = _Live(events, {*outputs, *saved})
    kept = _saved_by(runs, of_event, saved)
    ops: list[Op] = []
    gradients: list[tuple[int, Op]] = []
    for run in runs:
        inputs = tuple(dict.fromkeys(of_event[s].name for e in run.events for s in e.sources if of_event[s] is not run))
        op = _op(run, inputs, owners, live, parameters)
        if op is None:
            continue
        op = replace(op, saved=_whole(kept.get(run.first, 0.0) * 8 / op.act.bits))
        ops.append(op)
        hit = [i for i in run.indices if i in backward]
        if hit:
            whole = sum(events[i].backward_flop for i in hit)
            share = sum(backward[i] for i in hit) / whole if whole else 1.0
            gradients.append((hit[0], _shared(replace(op, phase="backward", saved=0, tied=""), share)))
    ops += [op for _, op in sorted(gradients, key=lambda g: -g[0])]
    ops += owners.rest(set(described))
    return fold(ops)


def _fuse(events: Sequence["Event"]) -> list[Run]:
    runs: list[Run] = []
    for i, event in enumerate(events):
        last = runs[-1].events[-1] if runs else None
        same = last is not None and not (event.kind or last.kind) and (event.path, event.phase) == (last.path, last.phase)
        if same:
            runs[-1].events.append(event)
        else:
            runs.append(Run([event], i))
    return runs


def _name(runs: Sequence[Run], parameters: Mapping[str, Parameter]) -> None:
    """Names: the module path where that says it all, else with the parameter's or the operator's name behind."""
    used: dict[tuple[str, str], int] = {}
    for run in runs:
        first, last = run.events[0], run.events[-1]
        leaves = [e.leaf for e in run.events if e.leaf != e.path]
        weight = first.params[0][0] if first.kind and first.params else ""
        if weight:
            holder, _, own = weight.rpartition(".")
            inside = not first.path or f"{holder}.".startswith(f"{first.path}.")  # else: tied to another module's
            base = first.path if not inside or (holder == first.path and own == "weight") else holder
            name = base if own == "weight" else f"{base}.{re.sub('_?weight$', '', own)}"
        elif leaves:
            name = leaves[0]
        elif first.kind == "norm" or any(e.params for e in run.events):
            name = first.path
        else:
            name = f"{first.path}.{last.label}".lstrip(".")
        name = name or first.label
        count = used[first.phase, name] = used.get((first.phase, name), 0) + 1
        run.name = name if count == 1 else f"{name}_{count}"


class _Live:
    """Which storages are needed after a run."""

    def __init__(self, events: Sequence["Event"], kept: set[int]) -> None:
        self.kept = kept
        self.readers: dict[int, list[int]] = {}
        for i, event in enumerate(events):
            for view in event.reads:
                self.readers.setdefault(view[0], []).append(i)

    def after(self, storage: int, run: Run) -> bool:
        return storage in self.kept or self.readers.get(storage, [-1])[-1] >= run.first + len(run.events)


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
    common: dict[str, Any] = {"act": event.act, "weight": event.weight, "inputs": inputs, "phase": event.phase}
    if event.op is not None:
        return replace(event.op, name=run.name, inputs=inputs, phase=event.phase)
    if event.kind:
        dims, tied = dict(event.dims), ""
        if event.held_by is not None:
            dims["held"] = min(dims["held"], event.held_by())
        if event.phase == "forward":
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
    outside: dict[int, set["View"]] = {}
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
    flop = sum(e.flop for e in run.events)
    first_reads = {name: count for e in run.events for name, count in e.params}
    owned = {n: c for n, c in first_reads.items() if run.events[0].phase != "forward" or owners.take(n, c, run.name)}
    if not leaving and not owned:
        return None
    elements, reads = _whole(written_bytes * 8 / act.bits), _whole(read_bytes * 8 / act.bits)
    weight = parameters[next(iter(first_reads))].dtype if owned else None
    common = {**common, "act": act, "weight": weight, "kernels": len(run.events)}
    widths = {count for count in first_reads.values()}
    if (
        len(widths) == 1 and elements and elements % (width := widths.pop()) == 0 and reads >= elements
        and any(e.label in aten.REDUCES_TO_NORM for e in run.events) and all(parameters[n].rank == 1 for n in first_reads)
    ):  # fmt: skip
        dims = {"rows": elements // width, "width": width, "weights": len(first_reads), "flop_per_element": flop / elements}
        tied = "" if len(owned) == len(first_reads) else owners.owner[next(iter(first_reads))]
        return Op(run.name, "norm", dims, tied=tied, **{**common, "weight": parameters[next(iter(first_reads))].dtype})
    dims = {"elements": elements, "reads": reads, "flop_per_element": flop / elements if elements else 0, "weights": sum(owned.values())}
    return Op(run.name, "elementwise", dims, **common)


def _covered(views: set["View"]) -> float:
    """Bytes that some views of one storage read, those inside a larger one left out."""
    taken: list["View"] = []
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
                    makers[view[0]] = run.first
                for view in event.reads:
                    makers.setdefault(view[0], run.first)
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
