"""What capture from a config writes ops on: it knows the layer, the rows and the dtypes, and who keeps which tensor."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from narrows.graph import BF16, Dim, DType, Op, Size

TOKENS = Size.of(tokens=1)
OUTPUTS = Size.of(outputs=1)
SEQUENCES = Size.of(sequences=1)

# The dtype that a module's weights are stored in, and the arithmetic where that differs.
Format = tuple[DType, str]
# For a module's name (with a `*` for the layer), its kind and the layers: how many of them have which format (None: plain).
Formats = Callable[[str, str, Sequence[int]], Mapping[Format | None, int]]


def _plain(_name: str, _kind: str, layers: Sequence[int]) -> Mapping[Format | None, int]:
    return {None: len(layers)}


@dataclass
class Tape:
    """Ops in the making. `rows` and `width` are those of the stream that the current part works on.

    act      dtype of activations and of weights that no format claims
    formats  weight formats of modules
    cache    dtype of keys and values, where it is not `act`
    """

    act: DType = BF16
    formats: Formats = _plain
    cache: DType | None = None
    rows: Size = TOKENS
    width: int = 0
    ops: list[Op] = field(default_factory=list)
    _layer: str = ""
    _indices: tuple[int, ...] = (0,)
    _kept: set[str] = field(default_factory=set)

    @contextmanager
    def layer(self, name: str, indices: tuple[int, ...]) -> Iterator[None]:
        """Within it, names are relative to `name` (a path with a `*`), and ops are repeated once per index."""
        before = self._layer, self._indices, self._kept
        self._layer, self._indices, self._kept = f"{name}.", indices, set()
        yield
        self._layer, self._indices, self._kept = before

    def keep(self, tensor: str, elements: Dim) -> Dim:
        """Elements that the backward pass has to keep for `tensor`: none if another op has kept it already."""
        if tensor in self._kept:
            return 0
        self._kept.add(tensor)
        return elements

    def add(self, name: str, kind: str, dims: dict[str, Dim], *inputs: str, plain: bool = False, **rest: Any) -> str:
        """Write one op (or two, where a weight format leaves some of the layers out) and return its full name.

        `inputs` are full names. `plain` marks weights that no format compresses (embeddings, heads, routers).
        """
        full = self._layer + name
        weight = self.act if _has_weights(kind, dims) else None
        op = Op(full, kind, dims, act=self.act, weight=weight, inputs=tuple(i for i in inputs if i), **rest)
        formats = _plain if plain or weight is None else self.formats
        for chosen, repeat in formats(full, kind, self._indices).items():
            self.ops.append(op.but(repeat=repeat, **({"weight": chosen[0], "compute": chosen[1]} if chosen else {})))
        return full

    def linear(
        self,
        name: str,
        x: str,
        inputs: int,
        outputs: int,
        bias: bool = False,
        split: str = "",
        plain: bool = False,
        rows: Size | None = None,
        saves: bool = True,
        **rest: Any,
    ) -> str:
        """A linear layer on `rows` (by default those of the stream); its backward needs its input."""
        rows = rows or self.rows
        saved = self.keep(x, rows * inputs) if saves else 0
        dims: dict[str, Dim] = {"rows": rows, "inputs": inputs, "outputs": outputs, "bias": int(bias)}
        return self.add(name, "linear", dims, x, split=split, plain=plain, saved=saved, **rest)

    def elementwise(
        self, name: str, inputs: tuple[str, ...], elements: Dim, flop: float, kernels: int, reads: Dim | None = None, **rest: Any
    ) -> str:
        """Number by number: `flop` per element of the result."""
        weights = rest.pop("weights", 0)
        dims: dict[str, Dim] = {
            "elements": elements,
            "reads": elements if reads is None else reads,
            "flop_per_element": flop,
            "weights": weights,
        }
        return self.add(name, "elementwise", dims, *inputs, kernels=kernels, **rest)


def _has_weights(kind: str, dims: dict[str, Dim]) -> bool:
    if kind == "elementwise":
        return bool(dims["weights"])
    if kind == "norm":
        return bool(dims.get("weights", 1))
    return kind in ("linear", "expert", "conv", "embedding", "latent_attention")
