"""Matrices kept as codes of 1 to 8 bits or as trits, with tables and scales: one description, and what multiplies by it.

W[n, k] = sum_p scale[p, n // r, k // g] x table[n // t, code[p, n, k]]: number formats have one table, codebooks one for every
t outputs, planes of signs and trits are summed over p. `CodedMatrix.rows` is the plain arithmetic that every execution equals:
a C kernel for this CPU (`coded_matrix.c`) for few rows, Triton on CUDA (`packed_triton`), and dense products of rows decoded
piece by piece, by that kernel where there is a compiler.
"""

import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from narrows.errors import NarrowsError
from narrows.modules.compiled import compiler, in_parts, library

WIDTHS = (8, 4, 2, 1)  # of the segments that codes are cut into
TRITS = 5  # in a byte
BLOCK = 64  # codes that the kernel reads at a time
# Up to so many rows of x the kernel multiplies as it decodes; more are multiplied densely. Measured on one thread of a Xeon
# with AMX, layers of 576 x 576 to 1536 x 576: dense products in bf16 run on its matrix units, in fp32 they do not.
FEW_ROWS = {torch.bfloat16: 6, torch.float16: 6, torch.float32: 14}
CUDA_ROWS = 64  # on CUDA, up to so many rows, which read fewer bytes than they could multiply: assumed, not yet measured
PIECE = 2**20  # weights decoded at a time
PART = 2**19  # weights a thread decodes: fewer are not worth waking one
MIDDLE = 64  # a power of two is kept as one byte: its sign times (exponent + MIDDLE); 0 is none


@dataclass(frozen=True, slots=True)
class CodedMatrix:
    """A matrix [N, K] as codes; the group of inputs and the rows that share a scale or a table follow from the shapes.

    codes   uint8 [P, N, bytes of a row] for each segment of the codes, the high bits in the widest; or one of trits
    bits    of a code; 0: trits (see `packed_trits`)
    table   int16 [T, 2 ** bits, or 3]: bf16 numbers as raw bits
    scales  int16 (raw bf16) [P, R, G], or int8 [terms, P, R, G]: signed powers of two that add up; None: all are 1
    """

    outputs: int
    inputs: int
    codes: tuple[Tensor, ...]
    bits: int
    table: Tensor
    scales: Tensor | None

    def __post_init__(self) -> None:
        kept = (*self.codes, self.table, *(() if self.scales is None else (self.scales,)))
        books, groups = (len(self.table), 1), (1, 1) if self.scales is None else self.scales.shape[-2:]
        divide = all(not self.outputs % down and not self.inputs % across for down, across in (books, groups))
        if not divide or any(len(part[0]) != self.outputs for part in self.codes) or not all(t.is_contiguous() for t in kept):
            problem = f"its parts {[tuple(t.shape) for t in kept]} are none of a matrix of {self.outputs} x {self.inputs}."
            raise NarrowsError(problem, where="coded matrix", remedy="Load it again from an undamaged file.")

    def scale(self) -> Tensor | None:
        """The scales as fp32 numbers [P, R, G]."""
        if self.scales is None or self.scales.dtype != torch.int8:
            return None if self.scales is None else self.scales.view(torch.bfloat16).float()
        codes = self.scales.float()
        return (torch.sign(codes) * torch.exp2(codes.abs() - MIDDLE)).sum(0)

    def rows(self, first: int = 0, last: int | None = None) -> Tensor:
        """The plain reference: outputs from first to last [n, K], as fp32."""
        here = torch.arange(self.outputs, device=self.table.device)[first:last]
        codes = self._codes(first, last).int()
        books, count = self.table.shape
        table = self.table.view(torch.bfloat16).float()
        values = table.view(-1)[codes + (here // (self.outputs // books))[:, None] * count]
        if (scale := self.scale()) is None:
            return values.sum(0)
        scale = scale[:, here // (self.outputs // scale.shape[1])]
        return (values.view(*scale.shape, -1) * scale[..., None]).sum(0).view(len(here), self.inputs)

    def _codes(self, first: int, last: int | None) -> Tensor:
        parts = [part[:, first:last] for part in self.codes]
        return joined(parts, self.bits) if self.bits else unpacked_trits(parts[0], self.inputs)

    def decoded(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Outputs from first to last [n, K] in a dtype, by the kernel where it is built."""
        if kernels_for(self.table) is None:
            return self.rows(first, last).to(dtype)
        brief = dtype == torch.bfloat16
        into = torch.empty(last - first, self.inputs, dtype=dtype if brief else torch.float32)
        _run("coded_rows", self, first, last, first, brief, into.data_ptr())
        return into.to(dtype)

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """All outputs, a few at a time: (which, [n, K])."""
        for first in range(0, self.outputs, step := max(1, PIECE // self.inputs)):
            last = min(first + step, self.outputs)
            yield slice(first, last), self.decoded(first, last, dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """x [M, K] times the matrix's transpose, [M, N] in the dtype of x. Gradients reach x, and keep no copy of the matrix."""
        if x.requires_grad and torch.is_grad_enabled():
            return _Product.apply(x, self)  # type: ignore[no-any-return]
        return self._multiplied(x)

    def _multiplied(self, x: Tensor) -> Tensor:
        if len(x) <= FEW_ROWS.get(x.dtype, 0) and kernels_for(x):
            padded = torch.nn.functional.pad(x.float(), (0, -self.inputs % BLOCK)).contiguous()
            y = x.new_empty(len(x), self.outputs, dtype=torch.float32)
            _run("coded_product", self, 0, self.outputs, len(x), padded.data_ptr(), y.data_ptr())
            return y.to(x.dtype)
        if x.is_cuda and len(x) <= CUDA_ROWS and (ours := cuda_kernels()):
            return ours.multiply_coded(x, self)  # type: ignore[no-any-return]
        return dense(x, self.outputs, self.pieces(x.dtype))


def dense(x: Tensor, outputs: int, pieces: Iterable[tuple[slice, Tensor]]) -> Tensor:
    """x [M, K] times the transpose of a matrix [N, K] that comes in pieces: [M, N]."""
    transposed = x.new_empty(outputs, len(x))  # weights on the left are not laid out anew: up to 1.6 times as fast in bf16
    for here, piece in pieces:
        torch.mm(piece, x.T, out=transposed[here])
    return transposed.T.contiguous()


class _Product(torch.autograd.Function):  # type: ignore[misc]
    """x W^T that keeps nothing for the backward pass: it decodes the matrix again."""

    @staticmethod
    def forward(context: Any, x: Tensor, matrix: CodedMatrix) -> Tensor:
        context.matrix = matrix
        return matrix._multiplied(x)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(context: Any, dy: Tensor) -> tuple[Tensor, None]:
        total = dy.new_zeros(len(dy), context.matrix.inputs)
        for here, piece in context.matrix.pieces(dy.dtype):
            total += dy[:, here] @ piece
        return total, None


def segments(codes: Tensor, bits: int) -> dict[int, Tensor]:
    """Codes [..., K] as bytes [..., K x width / 8] for each width that `bits` is a sum of, the first code in the lowest bits."""
    found, left = {}, bits
    for width in (w for w in WIDTHS if bits & w):
        left -= width
        part = (codes >> left & (2**width - 1)).unflatten(-1, (-1, 8 // width))
        shifts = torch.arange(0, 8, width, device=codes.device, dtype=torch.uint8)
        found[width] = (part << shifts).sum(-1).to(torch.uint8)
    return found


def joined(parts: "list[Tensor] | tuple[Tensor, ...]", bits: int) -> Tensor:
    """The codes that `segments` split."""
    codes: Tensor | None = None
    for width, part in zip((w for w in WIDTHS if bits & w), parts, strict=True):
        if width < 8:
            shifts = torch.arange(0, 8, width, device=part.device, dtype=torch.uint8)
            part = (part[..., None] >> shifts & (2**width - 1)).flatten(-2)
        codes = part if codes is None else codes << width | part
    assert codes is not None
    return codes


def packed_trits(codes: Tensor) -> Tensor:
    """Codes 0 to 2 [..., K] as bytes [..., ceil(K / 5)]: five of them, as a fraction of 256 in base 3, rounded up."""
    five = torch.nn.functional.pad(codes.int(), (0, -codes.shape[-1] % TRITS)).unflatten(-1, (-1, TRITS))
    whole = (five * 3 ** torch.arange(TRITS - 1, -1, -1, device=codes.device)).sum(-1)
    return ((whole * 256 + 3**TRITS - 1) // 3**TRITS).to(torch.uint8)


def unpacked_trits(packed: Tensor, inputs: int) -> Tensor:
    """The codes that `packed_trits` packed: three times a fraction carries its first digit."""
    fraction = packed.int()[..., None] * 3 ** torch.arange(TRITS, device=packed.device) & 255
    return (fraction * 3 >> 8).flatten(-2)[..., :inputs].to(torch.uint8)


class _Described(ctypes.Structure):
    """`struct coded` of the C file."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "planes", "bits")),
        ("codes", ctypes.c_void_p * len(WIDTHS)),
        ("table", ctypes.c_void_p),
        ("table_rows", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("scale_rows", "scale_group", "powers")),
    ]


@cache
def kernels(*options: str) -> ctypes.CDLL | None:
    """The C code beside this file, compiled on first use; None without a compiler."""
    if compiler() is None:
        return None
    code, whole, address = library("coded_matrix", "coded matrix", *options), ctypes.c_int64, ctypes.c_void_p
    code.room_bytes.restype = code.codes_at_once.restype = whole
    code.room_bytes.argtypes = [address]
    code.coded_product.argtypes = [address, whole, whole, whole, address, address, address]
    code.coded_rows.argtypes = [address, whole, whole, whole, whole, address, address]
    code.interleaved_rows.argtypes = [address, whole, whole, whole, address]
    code.interleaved_product.argtypes = [address, whole, whole, whole, address, address]
    return code


def kernels_for(x: Tensor) -> ctypes.CDLL | None:
    """`kernels` for tensors on the CPU; none while torch compiles or exports a model, which cannot look into them."""
    return kernels() if x.is_cpu and not torch.compiler.is_compiling() else None


@cache
def cuda_kernels() -> ModuleType | None:
    """The kernels for CUDA; None where Triton is not installed."""
    if find_spec("triton") is None:
        return None
    from narrows.modules import packed_triton

    return packed_triton


@lru_cache(maxsize=4096)
def _described(*fields: int | None) -> tuple[_Described, int]:
    """A matrix as the kernels read it, its codes given last, and the bytes of scratch that they want."""
    pointers = (ctypes.c_void_p * len(WIDTHS))(*fields[-len(WIDTHS) :])
    described = _Described(*fields[:4], pointers, *fields[4 : -len(WIDTHS)])
    code = kernels()
    assert code is not None
    return described, code.room_bytes(ctypes.byref(described))


def _run(name: str, w: CodedMatrix, first: int, last: int, *given: int) -> None:
    """Call a kernel for outputs from first to last, in parts on torch's threads; what is given follows them, then scratch."""
    scaled: tuple[int | None, ...] = (None, w.outputs, w.inputs, 0)
    if (scales := w.scales) is not None:
        powers = len(scales) if scales.dtype == torch.int8 else 0
        scaled = (scales.data_ptr(), w.outputs // scales.shape[-2], w.inputs // scales.shape[-1], powers)
    parts = iter(w.codes)
    codes = [next(parts).data_ptr() if (w.bits or 8) & width else None for width in WIDTHS]
    table = (w.table.data_ptr(), w.outputs // len(w.table))
    described, size = _described(w.inputs, w.outputs, len(w.codes[0]), w.bits, *table, *scaled, *codes)
    kernel, at = getattr(kernels(), name), ctypes.byref(described)

    def run(begin: int, end: int) -> None:
        room = torch.empty(size, dtype=torch.uint8)
        kernel(at, begin, end, *given, room.data_ptr())

    in_parts(first, last, max(1, PART // w.inputs), torch.get_num_threads(), run)
