"""Products with packed weights on a CUDA device, in Triton: each tile is unpacked on chip, so that only packed bytes are read.

`CodedMatrix` and `PackedLinear` choose them by themselves; `CodedMatrix.rows` and `PackedLinear._unpacked` are the plain
arithmetic that they must equal. Without a GPU they run under TRITON_INTERPRET=1.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from narrows.modules.coded_matrix import MIDDLE, WIDTHS, CodedMatrix

LEAST_BLOCK = 32  # rows that are interleaved: half of them are a tile, and the tensor cores take no fewer than 16


@triton.jit  # type: ignore[untyped-decorator]
def _int4(
    x: Any, packed: Any, scales: Any, y: Any, m: Any, n: Any, k: Any,
    block: tl.constexpr, group: tl.constexpr, rows: tl.constexpr, depth: tl.constexpr,
) -> None:  # fmt: skip
    """One tile [rows, block] of y [m, n]; `depth` inputs at a time, which divides the group.

    packed [n / block, k, block / 2]: the low half of a byte belongs to row i of the block, the high one to row i + block / 2.
    scales [k / group, n, 2]: scale and scale x (8 - zero).
    """
    half: tl.constexpr = block // 2
    at_m = tl.program_id(0) * rows + tl.arange(0, rows)
    at_k, at_n = tl.arange(0, depth), tl.arange(0, half)
    first = tl.program_id(1) * block
    low, high = tl.zeros((rows, half), tl.float32), tl.zeros((rows, half), tl.float32)
    inside = (at_m < m)[:, None]
    for start in range(0, k, depth):
        here = start + at_k
        part = tl.load(x + at_m[:, None] * k + here[None, :], mask=inside, other=0.0)
        codes = tl.load(packed + (tl.program_id(1) * k + here[:, None]) * half + at_n[None, :])
        pair = scales + ((start // group) * n + first + at_n) * 2
        s_low, o_low = tl.load(pair).to(tl.float32), tl.load(pair + 1).to(tl.float32)
        s_high, o_high = tl.load(pair + block).to(tl.float32), tl.load(pair + block + 1).to(tl.float32)
        w_low = ((codes & 15).to(tl.float32) - 8.0) * s_low[None, :] + o_low[None, :]
        w_high = ((codes >> 4).to(tl.float32) - 8.0) * s_high[None, :] + o_high[None, :]
        low = tl.dot(part, w_low.to(part.dtype), low, input_precision="ieee")
        high = tl.dot(part, w_high.to(part.dtype), high, input_precision="ieee")
    out = y + at_m[:, None] * n + first + at_n[None, :]
    tl.store(out, low.to(y.dtype.element_ty), mask=inside)
    tl.store(out + half, high.to(y.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _int8(
    x: Any, packed: Any, scales: Any, y: Any, m: Any, n: Any, k: Any,
    block: tl.constexpr, rows: tl.constexpr, depth: tl.constexpr,
) -> None:  # fmt: skip
    """One tile [rows, block] of y [m, n]: codes [n, k] are exact in every dtype, and an output is scaled at the end."""
    at_m, at_n = tl.program_id(0) * rows + tl.arange(0, rows), tl.program_id(1) * block + tl.arange(0, block)
    total = tl.zeros((rows, block), tl.float32)
    for start in range(0, k, depth):
        here = start + tl.arange(0, depth)
        part = tl.load(x + at_m[:, None] * k + here[None, :], mask=(at_m < m)[:, None] & (here < k)[None, :], other=0.0)
        codes = tl.load(packed + at_n[None, :] * k + here[:, None], mask=(at_n < n)[None, :] & (here < k)[:, None], other=0)
        total = tl.dot(part, codes.to(part.dtype), total, input_precision="ieee")
    scale = tl.load(scales + at_n, mask=at_n < n, other=0.0).to(tl.float32)
    out = y + at_m[:, None] * n + at_n[None, :]
    tl.store(out, (total * scale[None, :]).to(y.dtype.element_ty), mask=(at_m < m)[:, None] & (at_n < n)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _wide(bits: Any) -> Any:
    """fp32 numbers of the raw bits of bf16 ones (int16): the interpreter has no bf16."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _codes(eights: Any, fours: Any, twos: Any, ones: Any, row: Any, here: Any, k: Any, bits: tl.constexpr) -> Any:
    """The codes of inputs `here` of the rows `row` of planes, as integers; 0 bits: trits, in `eights`."""
    code = row * 0 + here * 0
    if bits == 0:
        byte = tl.load(eights + row * ((k + 4) // 5) + here // 5, mask=here < k, other=0).to(tl.int32)
        digit = here % 5
        power = tl.where(digit == 0, 1, tl.where(digit == 1, 3, tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81))))
        code += (byte * power & 255) * 3 >> 8
    if bits & 8:
        code = tl.load(eights + row * k + here, mask=here < k, other=0).to(tl.int32)
    if bits & 4:
        byte = tl.load(fours + row * (k // 2) + here // 2, mask=here < k, other=0).to(tl.int32)
        code = code << 4 | (byte >> here % 2 * 4 & 15)
    if bits & 2:
        byte = tl.load(twos + row * (k // 4) + here // 4, mask=here < k, other=0).to(tl.int32)
        code = code << 2 | (byte >> here % 4 * 2 & 3)
    if bits & 1:
        byte = tl.load(ones + row * (k // 8) + here // 8, mask=here < k, other=0).to(tl.int32)
        code = code << 1 | (byte >> here % 8 & 1)
    return code


@triton.jit  # type: ignore[untyped-decorator]
def _coded(
    x: Any, eights: Any, fours: Any, twos: Any, ones: Any, table: Any, scales: Any, y: Any, m: Any, n: Any, k: Any,
    table_rows: Any, scale_rows: Any, group: Any, bits: tl.constexpr, planes: tl.constexpr, scaled: tl.constexpr,
    powers: tl.constexpr, middle: tl.constexpr, block: tl.constexpr, rows: tl.constexpr, depth: tl.constexpr,
) -> None:  # fmt: skip
    """One tile [rows, block] of y [m, n] of a `CodedMatrix`; `depth` inputs at a time."""
    at_m, at_n = tl.program_id(0) * rows + tl.arange(0, rows), tl.program_id(1) * block + tl.arange(0, block)
    near = tl.minimum(at_n, n - 1)[None, :]
    count = 3 if bits == 0 else 1 << bits
    total = tl.zeros((rows, block), tl.float32)
    for start in range(0, k, depth):
        here = (start + tl.arange(0, depth))[:, None]
        part = tl.load(
            x + at_m[:, None] * k + (start + tl.arange(0, depth))[None, :],
            mask=(at_m < m)[:, None] & (start + tl.arange(0, depth) < k)[None, :],
            other=0.0,
        )
        weight = tl.zeros((depth, block), tl.float32)
        for p in tl.static_range(planes):
            code = _codes(eights, fours, twos, ones, p * n + near, here, k, bits)
            number = _wide(tl.load(table + near // table_rows * count + code))
            if scaled:
                at = (p * (n // scale_rows) + near // scale_rows) * (k // group) + tl.minimum(here, k - 1) // group
                if powers == 0:
                    number *= _wide(tl.load(scales + at))
                else:
                    scale = tl.zeros((depth, block), tl.float32)
                    for i in tl.static_range(powers):
                        power = tl.load(scales + i * planes * (n // scale_rows) * (k // group) + at).to(tl.float32)
                        size = tl.exp2(tl.abs(power) - middle)
                        scale += tl.where(power == 0, 0.0, tl.where(power < 0, -size, size))
                    number *= scale
            weight += number
        total = tl.dot(part, weight.to(part.dtype), total, input_precision="ieee")
    out = y + at_m[:, None] * n + at_n[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=(at_m < m)[:, None] & (at_n < n)[None, :])


def _rows(m: int) -> int:
    """Rows of a tile: as few as the tensor cores take while decoding, more while reading a prompt."""
    return 16 if m <= 16 else 32 if m <= 32 else 64


def multiply_int4(x: Tensor, packed: Tensor, scales: Tensor, group: int, block: int) -> Tensor:
    """y [M, N] of x [M, K] and 4-bit weights: packed [N, K / 2] in blocks of rows, scales [K / group, N, 2] in bf16."""
    (m, k), n = x.shape, packed.shape[0]
    y, rows = x.new_empty(m, n), _rows(m)
    _int4[triton.cdiv(m, rows), n // block](
        x.contiguous(), packed, scales, y, m, n, k, block=block, group=group, rows=rows, depth=min(group & -group, 64)
    )
    return y


def multiply_int8(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """x [M, K] times codes [N, K] int8 with a scale for each output, [N] in bf16; y [M, N]."""
    (m, k), n = x.shape, packed.shape[0]
    y, rows = x.new_empty(m, n), _rows(m)
    _int8[triton.cdiv(m, rows), triton.cdiv(n, 64)](x.contiguous(), packed, scales, y, m, n, k, block=64, rows=rows, depth=64)
    return y


def multiply_coded(x: Tensor, w: CodedMatrix) -> Tensor:
    """y [M, N] of x [M, K] and a matrix of codes."""
    (m, k), n = x.shape, w.outputs
    y, rows, parts, block = x.new_empty(m, n), _rows(m), iter(w.codes), 32
    codes = [next(parts) if (w.bits or 8) & width else w.codes[0] for width in WIDTHS]
    scales = w.table if w.scales is None else w.scales
    powers = len(scales) if scales.dtype == torch.int8 else 0
    scale_rows, group = (n, k) if w.scales is None else (n // scales.shape[-2], k // scales.shape[-1])
    _coded[triton.cdiv(m, rows), triton.cdiv(n, block)](
        x.contiguous(), *codes, w.table, scales, y, m, n, k, n // len(w.table), scale_rows, group,
        bits=w.bits, planes=len(w.codes[0]), scaled=w.scales is not None, powers=powers, middle=MIDDLE,
        block=block, rows=rows, depth=64,
    )  # fmt: skip
    return y


def serves(bits: int, group: int, block: int, dtype: torch.dtype) -> bool:
    """Whether a kernel reads this layout: tiles of half a block of rows, and no fewer than 16 inputs of a group at a time."""
    plain = dtype in (torch.float32, torch.float16, torch.bfloat16)
    return plain and (bits == 8 or (block >= LEAST_BLOCK and min(group & -group, 64) >= 16))
