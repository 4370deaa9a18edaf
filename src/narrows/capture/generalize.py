"""From graphs captured at a few concrete steps to one graph whose sizes follow the step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from narrows.errors import NarrowsError
from narrows.graph import Dim, Graph, Op, Size
from narrows.step import Step

# In order of preference: of fields that the probes cannot tell apart, the first is taken.
FIELDS = ("sequences", "tokens", "outputs", "source", "pairs[full]", "pairs", "pairs[source]", "source_pairs", "context")
_OWN = {"context": ("context",), "held": ("held",), "pairs": ("pairs[full]", "pairs")}  # a dim may prefer its own field
_TERMS = 3  # of a sum, at most
_NEAR = 1e-9
SHARED = "Work that the sequences of a batch share (position rows, masks) is counted once per sequence."


def generalize(build: Callable[[Step], Graph], steps: Sequence[Step], windows: Sequence[int] = ()) -> Graph:
    """One graph for every step out of those that `build` gives for some: each dim becomes a number or a `Size`.

    A dim that differs between the steps is written as a sum of at most three step fields with constant factors,
    of fewer terms than there are steps, so that one step always checks the fit; what `build` gives as a `Size` stays.
    T position rows that a batch shares grow with no field: they count for each sequence, and the notes say so.
    A matmul whose inner or outer size grows with the step (scores, and scores times values) becomes half an
    `attention`, since query-key pairs are a field and a product of two fields is not. `windows` are the sliding
    windows that an attention may have; some steps must be longer than them.
    `steps` should differ in batch and tokens, in sizes that no width of the model equals.
    Raises NarrowsError naming the first op that differs in more than its sizes, or whose size is no such sum.
    """
    if len(steps) < 2:
        raise NarrowsError("one step does not show how sizes grow.", where="generalize", remedy="Give two or more.")
    graphs = [build(step) for step in steps]
    _agree(graphs, steps)
    fit = _Fit(steps, windows)
    columns = (half for column in zip(*graphs, strict=True) for half in _halves(column, steps))
    ops = tuple(fit.op(column) for column in columns)
    notes = graphs[0].notes + ((SHARED,) if fit.shared else ())
    return replace(graphs[0], ops=ops, notes=tuple(dict.fromkeys(notes)))


def _agree(graphs: Sequence[Graph], steps: Sequence[Step]) -> None:
    """Refuse graphs that differ in more than sizes."""
    compared = [f.name for f in fields(Op) if f.name not in ("dims", "saved")]
    for graph, step in zip(graphs[1:], steps[1:], strict=True):
        where = f"{graph.name} at {steps[0]} and {step}"
        for one, other in zip(graphs[0], graph, strict=False):
            for name in compared:
                a, b = getattr(one, name), getattr(other, name)
                if a != b:
                    problem = f"{one.name} has {name} {a!r} in one step and {b!r} in another."
                    raise NarrowsError(problem, where=where, remedy="Capture a model whose ops do not depend on sizes.")
        if len(graph.ops) != len(graphs[0].ops):
            longer = max(graphs[0], graph, key=lambda g: len(g.ops))
            extra = longer.ops[min(len(graph.ops), len(graphs[0].ops))]
            remedy = "Capture a model whose ops do not depend on sizes."
            raise NarrowsError(f"{extra.name} is there in one step only.", where=where, remedy=remedy)


def _halves(column: tuple[Op, ...], steps: Sequence[Step]) -> Iterator[tuple[Op, ...]]:
    """A matmul as half an attention where its inner or outer size grows with the step, and any other op as it is.

    Scores are Q K^T (values of no width), and scores times values are an attention whose keys have none. The scores
    that a fused attention never writes are an elementwise op of no work and no launch beside it.
    """
    sides = [side for side in ("inputs", "outputs") if column[0].kind == "matmul" and len({op[side] for op in column}) > 1]
    if len(sides) != 1 or any(isinstance(value, Size) for op in column for value in dict(op.dims).values()):
        yield column
        return
    attends, moves = [], []
    for op, step in zip(column, steps, strict=True):
        d = op.sized(step)
        heads, scores = d["matrices"] / step["sequences"], d["rows"] * d[sides[0]]
        width = {"head_dim": d["inputs"], "value_dim": 0} if sides == ["outputs"] else {"head_dim": 0, "value_dim": d["outputs"]}
        dims = {"heads": heads, "kv_heads": heads, **width, "queries": d["rows"] / heads, "pairs": scores / heads,
                "context": d["matrices"] * d[sides[0]] / heads}  # fmt: skip
        attends.append(replace(op, kind="attention", dims=dims))
        written, read = (scores, 0) if sides == ["outputs"] else (0, scores)
        traffic = {"elements": written, "reads": read, "flop_per_element": 0}
        name = f"{op.name}.scores"
        moves.append(replace(op, name=name, kind="elementwise", dims=traffic, inputs=(op.name,), kernels=0, saved=0))
    yield tuple(attends)
    yield tuple(moves)


class _Fit:
    """Linear forms in the fields of some steps; `shared` tells whether one counts shared work per sequence."""

    def __init__(self, steps: Sequence[Step], windows: Sequence[int] = ()) -> None:
        self.shared = False
        self._own = {dim: (*own, *(f"{dim}[window={w}]" for w in windows)) for dim, own in _OWN.items()}
        self._known: dict[tuple[str, tuple[float, ...]], Dim | None] = {}
        names = (*FIELDS, "one", *(name for own in self._own.values() for name in own))
        self._columns = {name: np.array([float(step[name]) for step in steps]) for name in names}
        self._sequences = self._columns["sequences"]

    def op(self, column: tuple[Op, ...]) -> Op:
        """The op that has the sizes of each of the column's at its step."""
        first = column[0]
        dims = {name: self._dim(first, name, [op[name] for op in column]) for name in dict(first.dims)}
        return replace(first, dims=dims, saved=self._dim(first, "saved", [op.saved for op in column]))

    def _dim(self, op: Op, dim: str, values: list[Dim]) -> Dim:
        if all(value == values[0] for value in values):
            return values[0]
        numbers = tuple(float(v) for v in values if not isinstance(v, Size))
        key = (dim if dim in _OWN else "", numbers)
        if len(numbers) == len(values) and key not in self._known:
            self._known[key] = self._form(key[0], np.array(numbers))
        form = self._known.get(key)
        if form is None:
            problem = f"{dim} is {', '.join(str(v) for v in values)} at the probed steps, linear in none of their fields."
            raise NarrowsError(problem, where=op.name, remedy="Capture it with that size fixed.")
        return form

    def _form(self, dim: str, values: NDArray[np.float64]) -> Size | None:
        distinct: dict[str, NDArray[np.float64]] = {}
        for name in (*self._own.get(dim, ()), *FIELDS, "one"):
            if np.any(self._columns[name]) and not any(np.array_equal(self._columns[name], c) for c in distinct.values()):
                distinct[name] = self._columns[name]
        # what the batch shares: the same fields for one sequence of it
        grows = {name: column for name, column in distinct.items() if name not in ("sequences", "one")}
        per_sequence = {f"{name}/": column / self._sequences for name, column in grows.items()}
        for terms in range(1, min(_TERMS, len(values) - 1) + 1):
            for features in (distinct, {**distinct, **per_sequence}):
                for chosen in combinations(features, terms):
                    matrix = np.stack([features[name] for name in chosen], axis=1)
                    factors, _, rank, _ = np.linalg.lstsq(matrix, values, rcond=None)
                    if rank == terms and np.allclose(matrix @ factors, values, rtol=_NEAR, atol=_NEAR):
                        self.shared |= any(name.endswith("/") for name in chosen)
                        return _sum(chosen, factors)
        return None


def _sum(names: Sequence[str], factors: NDArray[np.float64]) -> Size:
    """The form with factors freed of rounding: whole where they are whole to nine digits."""
    total = Size.of()
    for name, factor in zip(names, factors.tolist(), strict=True):
        clean = float(round(factor)) if abs(factor - round(factor)) < _NEAR * max(1.0, abs(factor)) else float(f"{factor:.12g}")
        total = total + Size.of({name.removesuffix("/"): clean})
    return total
