"""What the tracer writes down, and how it tells tensors and their storages apart."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from narrows.graph import BF16, DTYPES, FP16, FP32, DType, Op
from narrows.kinds import KINDS

_FORMATS = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16, torch.float64: DTYPES["fp64"],
            torch.float8_e4m3fn: DTYPES["fp8"], torch.float8_e5m2: DTYPES["fp8"], torch.int8: DTYPES["int8"]}  # fmt: skip

View = tuple[int, int, int, float]  # storage, first and last place in it, bytes


def dtype_of(tensor: Tensor) -> DType:
    """The storage format of a tensor's numbers."""
    return _FORMATS.get(tensor.dtype) or DType(str(tensor.dtype).removeprefix("torch."), tensor.element_size() * 8)


class Basis(IntEnum):
    """What an event's result is made of at most: numbers alone (positions, masks), parameters too, or the inputs."""

    NUMBERS = 0
    WEIGHTS = 1
    INPUTS = 2


@dataclass
class Event:
    """One operator that ran, or one semantic op in place of the operators inside it.

    path, label   where it ran and which operator; `leaf` is the innermost module, '' if that holds others
    kind, dims    as in an Op; '' for arithmetic number by number
    reads, writes views of activations; `sources` are the events that made what it reads
    params        parameters it reads: name and elements of the view
    basis         what it is made of, at most: what no input changes counts no FLOP
    op            the finished op, where a module describes itself
    """

    path: str
    leaf: str
    label: str
    phase: str
    kind: str = ""
    dims: dict[str, Any] = field(default_factory=dict)
    flop: float = 0.0
    reads: list[View] = field(default_factory=list)
    writes: list[View] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    params: list[tuple[str, int]] = field(default_factory=list)
    act: DType = FP32
    weight: DType | None = None
    cache: DType | None = None
    basis: Basis = Basis.INPUTS
    floats: bool = True  # its result is not whole numbers
    op: Op | None = None
    layer: int | None = None  # of the cache that it keeps keys and values in

    @property
    def product_flop(self) -> float:
        kind = KINDS.get(self.kind)
        return self.flop if kind is None else float(kind.flop({**kind.defaults, **self.dims}))

    @property
    def backward_flop(self) -> float:
        return self.product_flop * KINDS[self.kind].backward[0] if self.kind else 0.0


def storage_of(tensor: Tensor) -> int:
    """A number that two tensors share if they are views of one storage; another may get it once that is freed."""
    return int(tensor.untyped_storage()._cdata)


def is_made_of_tensors(tensor: Tensor) -> bool:
    """Tensors of tensors, that have no storage of their own."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__")


def view_of(tensor: Tensor) -> View:
    """The storage, the span of bytes in it, and the bytes that a tensor has of its own (an expanded one has fewer)."""
    if tensor.numel() == 0:
        return storage_of(tensor), 0, 0, 0.0
    first, span, count = tensor.storage_offset(), 1, 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        span += (size - 1) * stride
        count *= size if stride else 1
    width = tensor.element_size()
    return storage_of(tensor), first * width, (first + span) * width, float(count * width)


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts; those made of other tensors are left out."""
    if isinstance(tree, Tensor):
        return [] if is_made_of_tensors(tree) else [tree]
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    return [t for item in tree for t in tensors_in(item)]
