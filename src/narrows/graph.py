"""What a network does in one step: an immutable tuple of ops whose sizes may be symbolic in the Step."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from narrows.errors import NarrowsError, closest
from narrows.kinds import KINDS, Kind
from narrows.step import Amount, Step


@dataclass(frozen=True, slots=True)
class DType:
    """How numbers are stored: bits each, and for grouped formats the scale and zero kept per `group` inputs.

    `group=0` means one scale per output row when `scale_bits` is set.
    """

    name: str
    bits: float
    group: int = 0
    scale_bits: int = 0
    zero_bits: int = 0

    def __post_init__(self) -> None:
        sizes = (self.bits, self.group, self.scale_bits, self.zero_bits)
        if not all(isinstance(size, int | float) and 0 <= size <= 128 * 2**20 for size in sizes) or not self.bits:
            raise NarrowsError(
                f"{self.name} has sizes {sizes}.", where="dtype", remedy="Give bits, group, scale_bits, zero_bits as numbers."
            )

    def bytes(self, count: float, inputs: float = 0) -> float:
        """Stored bytes of `count` numbers that lie in rows of `inputs` (scales and zeros included)."""
        overhead = self.scale_bits + self.zero_bits
        if not overhead or not count:
            return count * self.bits / 8
        groups = math.ceil(inputs / self.group) if self.group and inputs else 1
        return (count * self.bits + count / max(inputs, 1) * groups * overhead) / 8


FP32, TF32, BF16, FP16 = DType("fp32", 32), DType("tf32", 32), DType("bf16", 16), DType("fp16", 16)
FP8, INT8 = DType("fp8", 8), DType("int8", 8)
DTYPES = {d.name: d for d in (FP32, TF32, BF16, FP16, FP8, INT8, DType("fp64", 64), DType("int4", 4), DType("fp4", 4))}


@dataclass(frozen=True, slots=True)
class Size:
    """A linear form in the quantities of a Step, like 197 per sequence: `Size.of(sequences=197)`."""

    terms: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, terms: Mapping[str, float] | None = None, /, **named: float) -> "Size":
        merged = {**(terms or {}), **named}
        return cls(tuple(sorted((k, v) for k, v in merged.items() if v)))

    def __mul__(self, factor: float) -> "Size":
        return Size.of({k: v * factor for k, v in self.terms})

    __rmul__ = __mul__

    def __bool__(self) -> bool:
        return bool(self.terms)

    def __add__(self, other: "Size | float") -> "Size":
        total = dict(self.terms)
        for k, v in other.terms if isinstance(other, Size) else (("one", other),):
            total[k] = total.get(k, 0) + v
        return Size.of(total)

    def at(self, step: Step) -> Amount:
        """Its value for a step: a float, or an array over the step's points."""
        return sum((step[k] * v for k, v in self.terms), 0.0)

    def __str__(self) -> str:
        return " + ".join(k if v == 1 else f"{v:g} {k}" for k, v in self.terms) or "0"


Dim = int | float | Size


def at(dim: Dim, step: Step) -> Amount:
    """The value of a dim for a step."""
    return dim.at(step) if isinstance(dim, Size) else float(dim)


@dataclass(frozen=True)
class Op:
    """One operation, done `repeat` times: its kind says which dims it has and what it costs (see `kinds`).

    name      module path; a `*` stands for the index of repeated layers
    dims      named sizes; plain numbers, or `Size` where they depend on the step
    act       dtype of the activations it reads and writes; `compute` names the arithmetic if it differs
    weight    dtype its parameters are stored in (None: it has none); `tied` names the op that owns them
    cache     dtype of the keys, values or state that it keeps from step to step
    inputs    names of the ops it reads from
    phase     forward, backward, recompute or update
    kernels   launches when every operator is its own kernel (eager); a compiler fuses them into one
    saved     elements of `act` kept for the backward pass that no other op has kept already
    segments  > 0: its saved elements are recomputed in the backward pass, in that many segments
    split     how tensor parallelism cuts it: column, row, heads, vocabulary, experts, sum (adds partial results) or none
    """

    name: str
    kind: str
    dims: Mapping[str, Dim] | tuple[tuple[str, Dim], ...]
    act: DType = BF16
    weight: DType | None = None
    cache: DType | None = None
    inputs: tuple[str, ...] = ()
    repeat: int = 1
    phase: str = "forward"
    kernels: int = 1
    saved: Dim = 0
    segments: int = 0
    tied: str = ""
    compute: str = ""
    split: str = ""

    def __post_init__(self) -> None:
        given = dict(self.dims)
        if self.kind not in KINDS:
            raise NarrowsError(f"{self.kind!r} is not a kind of op.", where=self.name, remedy=closest(self.kind, list(KINDS)))
        spec = self.spec
        missing = [d for d in spec.dims if d not in given and d not in spec.defaults]
        unknown = [d for d in given if d not in spec.dims]
        if missing or unknown:
            problem = f"A {self.kind} lacks {missing}." if missing else f"A {self.kind} has no {unknown}."
            raise NarrowsError(problem, where=self.name, remedy=f"Its dims are {', '.join(spec.dims)}.")
        for key, value in given.items():
            sizes = [v for _, v in value.terms] if isinstance(value, Size) else [value]
            if not all(isinstance(v, int | float | np.number) and math.isfinite(v) for v in sizes) or (
                key in _DIVISORS and not value
            ):
                raise NarrowsError(
                    f"{key} is {sizes}.", where=self.name, remedy="Sizes are finite numbers; a number of parts is above 0."
                )
            if not isinstance(value, Size) and value < 0:
                raise NarrowsError(f"{key} is {value}.", where=self.name, remedy="Sizes are not negative.")
        if not (isinstance(self.repeat, int) and self.repeat > 0):
            raise NarrowsError(f"repeat is {self.repeat!r}.", where=self.name, remedy="Give a whole number above 0.")
        object.__setattr__(self, "dims", tuple((d, given.get(d, spec.defaults.get(d, 0))) for d in spec.dims))

    @property
    def spec(self) -> Kind:
        return KINDS[self.kind]

    def __getitem__(self, dim: str) -> Dim:
        found = dict(self.dims)
        if dim in found:
            return found[dim]
        raise NarrowsError(f"A {self.kind} has no dim {dim!r}.", where=self.name, remedy=f"It has {found}.")

    def sized(self, step: Step) -> dict[str, Any]:
        """All dims as numbers for a step."""
        return {name: at(value, step) for name, value in dict(self.dims).items()}

    def runs(self, step: Step) -> bool:
        """Whether it has anything to do at a step: the ops of an encoder have nothing in decode."""
        sizes = [dim.at(step) for dim in dict(self.dims).values() if isinstance(dim, Size) and dim]
        return not sizes or any(bool(np.any(size)) for size in sizes)

    def but(self, **changes: Any) -> "Op":
        """The same op with other fields or dims: `op.but(outputs=64, weight=INT8)`.

        `inputs` as a tuple are ops, as a number the dim.
        """
        own = {k: v for k, v in changes.items() if k in _FIELDS and not (k == "inputs" and not isinstance(v, tuple))}
        dims = {**dict(self.dims), **{k: v for k, v in changes.items() if k not in own}}
        return replace(self, **{"dims": dims, **own})

    @property
    def parameters(self) -> float:
        """Parameters that this op owns, over all repeats (a tied op owns none)."""
        return 0 if self.tied or self.phase != "forward" else self.spec.parameters(dict(self.dims)) * self.repeat

    @property
    def weight_bytes(self) -> float:
        """Stored bytes of the parameters that this op owns, over all repeats."""
        return 0 if self.tied or self.phase != "forward" else self.stored_bytes * self.repeat

    @property
    def stored_bytes(self) -> float:
        """Stored bytes of the parameters that one repeat of this op reads, tied or not."""
        if self.weight is None:
            return 0
        dims = dict(self.dims)
        matrix = self.spec.matrix(dims)
        rest = self.spec.parameters(dims) - matrix  # biases and the like stay in the activations' dtype
        plain = self.act if self.weight.scale_bits or self.weight.bits < 16 else self.weight
        row: Any = next((dims[d] for d in ("inputs", "rank", "outputs") if d in dims), 0)  # what a group of a row is cut from
        return float(self.weight.bytes(matrix, float(row)) + rest * plain.bits / 8)


_FIELDS = {f.name for f in fields(Op)}
_DIVISORS = {"matrices", "experts", "groups", "vocabulary", "ranks"}  # dims that a formula divides by


@dataclass(frozen=True)
class Graph:
    """The ops of one step of a network, in order; `notes` say what a reader of its numbers must know.

    `eager`: every operator is launched by the host as its own kernel, as plain PyTorch does. Otherwise ops run as
    a serving engine or a compiler runs them: fused, and launched as one recorded graph.
    """

    name: str
    ops: tuple[Op, ...]
    source: str = ""
    notes: tuple[str, ...] = ()
    eager: bool = False

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # once: a graph is the key of many caches
        return hash((self.name, self.ops, self.source, self.notes, self.eager))

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # a hash of strings holds in its own process only

    @cached_property
    def forward(self) -> tuple[Op, ...]:
        """Its ops without those of the backward pass and the optimizer."""
        return tuple(op for op in self.ops if op.phase == "forward")

    @property
    def parameters(self) -> int:
        return round(sum(op.parameters for op in self.ops))

    @property
    def weight_bytes(self) -> float:
        return sum(op.weight_bytes for op in self.ops)

    @property
    def fields(self) -> set[str]:
        """The quantities of a Step that its sizes depend on (none for a graph traced at one step)."""
        return {name for op in self.ops for dim in dict(op.dims).values() if isinstance(dim, Size) for name, _ in dim.terms}

    def find(self, *kinds: str) -> tuple[Op, ...]:
        """Its forward ops of these kinds."""
        return tuple(op for op in self.forward if op.kind in kinds)

    def map(self, change: Callable[[Op], Op | Iterable[Op] | None]) -> "Graph":
        """The graph with each op replaced by what `change` gives: an op, several, or None to drop it."""
        out: list[Op] = []
        for op in self.ops:
            new = change(op)
            out.extend(() if new is None else (new,) if isinstance(new, Op) else new)
        return replace(self, ops=tuple(out))

    def fold(self) -> "Graph":
        """Join layers that differ in their index alone: `layers.0.q` and `layers.1.q` become `layers.*.q` twice."""
        joined: dict[Op, int] = {}
        for op in self.ops:
            key = replace(
                op, name=_starred(op.name), inputs=tuple(_starred(i) for i in op.inputs), repeat=1, tied=_starred(op.tied)
            )
            joined[key] = joined.get(key, 0) + op.repeat
        return replace(self, ops=tuple(replace(op, repeat=n) for op, n in joined.items()))

    def to_json(self) -> str:
        """As text that `from_json` reads back, for graphs that are shipped or kept."""
        own = {"name": self.name, "source": self.source, "notes": self.notes, "eager": self.eager}
        data = {"format": "narrows-graph-1", **own, "ops": [_dump(op) for op in self.ops]}
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, where: str = "graph") -> "Graph":
        """Read back what `to_json` wrote; raises NarrowsError naming the op that is wrong."""
        try:
            data = json.loads(text)
            if data["format"] != "narrows-graph-1":
                raise NarrowsError(f"format is {data['format']!r}.", where=where, remedy="This version reads narrows-graph-1.")
            ops = tuple(_load(entry) for entry in data["ops"])
            if not ops:
                raise NarrowsError("it has no ops.", where=where, remedy="Write one with `narrows capture --out`.")
            return cls(str(data["name"]), ops, str(data["source"]), tuple(map(str, data["notes"])), bool(data["eager"]))
        except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
            raise NarrowsError(
                f"not a graph file ({error!r}).", where=where, remedy="Write one with `narrows capture --out`."
            ) from error


def _starred(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _dump(op: Op) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Size):
            return dict(value.terms)
        if isinstance(value, DType):
            return [value.name, value.bits, value.group, value.scale_bits, value.zero_bits]
        return value

    rest = {
        f.name: plain(getattr(op, f.name))
        for f in fields(op)
        if f.name not in ("name", "kind", "dims") and getattr(op, f.name) != f.default
    }
    return {"name": op.name, "kind": op.kind, "dims": {k: plain(v) for k, v in dict(op.dims).items()}, **rest}


def _load(entry: dict[str, Any]) -> Op:
    def full(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return Size.of(value)
        if key in ("act", "weight", "cache"):
            return DType(*value)
        return tuple(value) if isinstance(value, list) else value

    dims = {k: full(k, v) for k, v in entry["dims"].items()}
    return Op(
        entry["name"], entry["kind"], dims, **{k: full(k, v) for k, v in entry.items() if k not in ("name", "kind", "dims")}
    )
