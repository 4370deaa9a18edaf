"""A linear layer whose weights stay packed in 4 or 8 bits, beside the plain arithmetic that it must equal."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.errors import NarrowsError
from narrows.graph import DType, Op
from narrows.modules.coded_matrix import CUDA_ROWS, FEW_ROWS, PART, CodedMatrix, cuda_kernels, dense, kernels_for
from narrows.modules.compiled import in_parts

# By bits of the weight: up to so many bf16 rows torch's packed kernel beats unpacking and a dense product, because it
# unpacks again for every few rows: in layers whose unpacked weights stay in the cache, and in larger ones. Measured on
# a Xeon with AMX, layers of 576 x 1536 to 2048 x 2048. For fp16 and fp32 it is not vectorised and never pays.
KERNEL_ROWS = {4: (14, 18), 8: (14, 10)}
KERNEL_GROUPS = (32, 64, 128, 256)
# Weights unpacked at a time: 4 MB as fp32, so that unpacking stays in the cache.
CHUNK = 2**20
# Smallest scale: with 5 significant bits it is still exact in fp16.
LEAST_SCALE = 2.0**-20


def int4(group: int) -> DType:
    """4-bit codes; every `group` inputs of an output share a 16-bit scale and a 16-bit offset."""
    return DType("int4", 4, group, scale_bits=16, zero_bits=16)


def int8() -> DType:
    """8-bit codes; every output has a 16-bit scale."""
    return DType("int8", 8, 0, scale_bits=16)


@dataclass(frozen=True)
class Codes:
    """A matrix as integers: weight[n, k] = (codes[n, k] - zero[n, g]) * scale[n, g], g = k // group.

    codes [N, K] uint8, or int8 where zero is 0; scale [N, G] fp32 whose product with any zero is exact in bf16;
    zero [N, G] in the codes' dtype.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    format: DType

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The plain reference: the matrix [N, K] that the integers stand for."""
        outputs, groups = self.scale.shape
        grouped = self.codes.view(outputs, groups, -1).float() - self.zero.float()[..., None]
        return (grouped * self.scale[..., None]).view(outputs, -1).to(dtype)


def quantized(weight: Tensor, form: DType, shrink: Tensor | float = 1.0) -> Codes:
    """Round a matrix [N, K] to the nearest codes; `shrink` [N, G] narrows the range that they cover.

    Scales keep 5 significant bits where there are zeros (8 elsewhere): then scale x (8 - zero) is exact in bf16, fp16
    and fp32, and the layer means the same in every dtype and file layout. Raises NarrowsError for a K that the group
    does not divide.
    """
    codes, scale, zero = _rounded(weight, form, shrink)
    kind = torch.uint8 if form.zero_bits else torch.int8
    return Codes(codes.view(weight.shape).to(kind), scale, zero.to(kind), form)


def requantized(weight: Tensor, form: DType, shrink: Tensor | float = 1.0) -> Tensor:
    """`quantized(...).weight()` in fp32 without making the integers: what searches ask for again and again."""
    codes, scale, zero = _rounded(weight, form, shrink)
    return codes.sub_(zero[..., None]).mul_(scale[..., None]).view(weight.shape)


def _rounded(weight: Tensor, form: DType, shrink: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, G, g] as whole fp32 numbers, scale and zero [N, G]."""
    outputs, inputs = weight.shape
    group = form.group or inputs
    if inputs % group:
        raise NarrowsError(f"{inputs} inputs are no multiple of the group {group}.", remedy="Choose a group that divides them.")
    grouped = weight.detach().float().reshape(outputs, inputs // group, group)
    low, high = (end * shrink for end in (grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)))
    if form.zero_bits:
        least, most = 0, 2 ** round(form.bits) - 1
        scale = _significant((high - low) / most, 5)
        zero = (low / -scale).round_().clamp_(least, most)
    else:
        most = 2 ** (round(form.bits) - 1) - 1
        least, scale = -most, _significant(torch.maximum(high, -low) / most, 8)
        zero = torch.zeros_like(scale)
    codes = (grouped / scale[..., None]).round_().add_(zero[..., None]).clamp_(least, most)
    return codes, scale, zero


def _significant(scale: Tensor, bits: int) -> Tensor:
    """Positive fp32 numbers rounded to so many significant bits."""
    dropped = 24 - bits
    whole = scale.clamp(min=LEAST_SCALE).view(torch.int32)
    return ((whole + (1 << (dropped - 1))) & -(1 << dropped)).view(torch.float32)


def _interleaved(codes: Tensor, block: int) -> Tensor:
    """uint8 codes [N, K] as bytes [N, K / 2]: per block of rows, input by input, row i low and row i + block / 2 high."""
    outputs, inputs = codes.shape
    halves = codes.view(outputs // block, 2, block // 2, inputs)
    return (halves[:, 0] | halves[:, 1] << 4).transpose(1, 2).contiguous().view(outputs, inputs // 2)


@cache
def native_block() -> int:
    """Rows that this CPU's 4-bit kernel interleaves; 0 if it has no such kernel, or one with another layout."""
    if not hasattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu"):
        return 0
    probe = torch.arange(128 * 32, dtype=torch.int32, device="cpu").view(128, 32) * 7 // 5 % 16
    native = torch.ops.aten._convert_weight_to_int4pack_for_cpu(probe, 1)
    return next((b for b in (64, 32) if torch.equal(native.flatten(), _interleaved(probe.to(torch.uint8), b).flatten())), 0)


@cache
def _int8_table(device: torch.device) -> Tensor:
    """What each byte stands for, as a coded matrix wants it."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.int8).bfloat16().view(torch.int16)[None]


class _Interleaved(ctypes.Structure):
    """`struct interleaved` of the C file."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "group", "block")),
        *((name, ctypes.c_void_p) for name in ("packed", "scales")),
    ]


class PackedLinear(nn.Module):  # type: ignore[misc]
    """y = x W^T + b with W kept as packed integers alone: [..., K] to [..., N] in the dtype of x.

    Few rows run on the CPU's packed kernel; more are multiplied densely, the weights unpacked piece by piece.
    `packed` is [N, K / 2] bytes of 4-bit codes or [N, K] int8; `scales` holds bf16 numbers as raw bits, so that
    `module.to(dtype)` leaves them: [G, N, 2] scale and scale x (8 - zero), or [N]. Both kernels' own layouts.
    Runs on the meta device. Gradients reach x, never the weights.
    """

    packed: Tensor
    scales: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        form: DType,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if form not in (int4(form.group), int8()) or (form.bits == 4 and (inputs % form.group or outputs % 2)):
            problem = f"{inputs} inputs and {outputs} outputs do not pack as {form}."
            raise NarrowsError(problem, remedy="Use int8(), or int4 with a group that divides the inputs.")
        self.in_features, self.out_features, self.form = inputs, outputs, form
        self.kernel_rows = KERNEL_ROWS[round(form.bits)][inputs * outputs > CHUNK]
        native = native_block()
        if form.bits == 8:  # 32: other widths read past the end of a row
            self.native, self.block = inputs % 32 == 0, 0
        else:
            self.native = native > 0 and outputs % native == 0 and form.group in KERNEL_GROUPS
            self.block = native if self.native else min(64, outputs & -outputs)
        if form.bits == 4:
            packed = torch.empty(outputs, inputs // 2, dtype=torch.uint8, device=device)
            scales = torch.empty(inputs // form.group, outputs, 2, dtype=torch.int16, device=device)
        else:
            packed = torch.empty(outputs, inputs, dtype=torch.int8, device=device)
            scales = torch.empty(outputs, dtype=torch.int16, device=device)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.bias = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def of(cls, codes: Codes, bias: Tensor | None = None) -> Self:
        """The layer of given codes."""
        outputs, inputs = codes.codes.shape
        device = codes.codes.device
        layer = cls(inputs, outputs, codes.format, bias is not None, device, bias.dtype if bias is not None else None)
        if device.type == "meta":
            return layer
        if codes.format.bits == 4:
            offset = (8 - codes.zero.float()) * codes.scale
            layer.packed = _interleaved(codes.codes, layer.block)
            scales = torch.stack((codes.scale, offset), -1).transpose(0, 1).contiguous()
        else:
            layer.packed, scales = codes.codes, codes.scale[:, 0].contiguous()
        layer.scales = scales.to(torch.bfloat16).view(torch.int16)
        if layer.bias is not None and bias is not None:
            layer.bias.data.copy_(bias.detach())
        return layer

    @property
    def codes(self) -> Codes:
        """The integers, unpacked: exactly those the layer was made of."""
        scales = self.scales.view(torch.bfloat16).float()
        if self.form.bits == 8:
            return Codes(self.packed, scales[:, None], torch.zeros_like(self.packed[:, :1]), self.form)
        blocks = self.packed.view(-1, self.in_features, self.block // 2).transpose(1, 2)
        codes = torch.stack((blocks & 15, blocks >> 4), 1).reshape(self.out_features, self.in_features)
        scale, offset = scales.transpose(0, 1).unbind(-1)
        return Codes(codes, scale.contiguous(), (8 - offset / scale).round().to(torch.uint8), self.form)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [..., K] of the weights, unpacked, by their numbers [...]."""
        if self.form.bits == 8:
            return self.packed[ids].to(dtype) * self.scales[ids].view(torch.bfloat16).to(dtype)[..., None]
        half, inputs = self.block // 2, self.in_features
        bytes_ = self.packed.view(-1, inputs, half)[ids // self.block, :, ids % half]
        codes = torch.where((ids % self.block >= half)[..., None], bytes_ >> 4, bytes_ & 15).float() - 8
        scale, offset = self.scales[:, ids].view(torch.bfloat16).float().movedim(0, -2).unbind(-1)
        grouped = codes.unflatten(-1, (-1, self.form.group))
        return (grouped * scale[..., None] + offset[..., None]).flatten(-2).to(dtype)

    @property
    def resident_bytes(self) -> int:
        """Bytes of everything the layer keeps in memory."""
        return sum(t.numel() * t.element_size() for t in (*self.buffers(), *self.parameters()))

    def graph_op(self, name: str, rows: int, act: DType) -> Op:
        """What capture writes down for this layer."""
        dims = {"rows": rows, "inputs": self.in_features, "outputs": self.out_features, "bias": int(self.bias is not None)}
        return Op(name, "linear", dims, act=act, weight=self.form)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return x.new_empty(*x.shape[:-1], self.out_features)
        rows = x.numel() // self.in_features
        flat = x.reshape(rows, self.in_features)
        if x.requires_grad and torch.is_grad_enabled():
            y = F.linear(flat, self.codes.weight(x.dtype))
        elif rows <= self.kernel_rows and x.is_cpu and x.dtype is torch.bfloat16 and self.native:
            y = self._kernel(flat.contiguous())
        elif rows <= FEW_ROWS.get(x.dtype, 0) and kernels_for(x):
            y = self._compiled(flat)
        elif x.is_cuda and rows <= CUDA_ROWS and self.on_cuda(x.dtype):
            y = self._cuda(flat)
        else:
            y = self._unpacked(flat)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def _kernel(self, x: Tensor) -> Tensor:
        kept = self._buffers  # as attributes they are looked for elsewhere first, which shows in a token's step
        packed, scales = kept["packed"], kept["scales"].view(torch.bfloat16)
        if self.form.bits == 8:
            return torch.ops.aten._weight_int8pack_mm(x, packed, scales)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, self.form.group, scales)

    def _compiled(self, x: Tensor) -> Tensor:
        """x [M, K] times the weights as they are unpacked, by this package's own kernel."""
        if self.form.bits == 8:
            codes, table = self.packed.view(torch.uint8)[None], _int8_table(x.device)
            return CodedMatrix(self.out_features, self.in_features, (codes,), 8, table, self.scales[None, :, None]).multiply(x)
        x32, y, code = x.float().contiguous(), x.new_empty(len(x), self.out_features, dtype=torch.float32), kernels_for(x)
        at = ctypes.byref(self._interleaved())

        def run(first: int, last: int) -> None:
            code.interleaved_product(at, first, last, len(x), x32.data_ptr(), y.data_ptr())  # type: ignore[union-attr]

        blocks, size = self.out_features // self.block, self.in_features * self.block
        in_parts(0, blocks, max(1, PART // size), torch.get_num_threads(), run)
        return y.to(x.dtype)

    def _interleaved(self) -> "_Interleaved":
        sizes = (self.in_features, self.out_features, self.form.group, self.block)
        return _Interleaved(*sizes, self.packed.data_ptr(), self.scales.data_ptr())

    def on_cuda(self, dtype: torch.dtype) -> bool:
        """Whether a kernel for CUDA reads this layer's layout."""
        ours = cuda_kernels()
        return ours is not None and ours.serves(round(self.form.bits), self.form.group, self.block, dtype)

    def _cuda(self, x: Tensor) -> Tensor:
        ours, scales = cuda_kernels(), self.scales.view(torch.bfloat16)
        if self.form.bits == 8:
            return ours.multiply_int8(x, self.packed, scales)  # type: ignore[union-attr]
        return ours.multiply_int4(x, self.packed, scales, self.form.group, self.block)  # type: ignore[union-attr]

    def _unpacked(self, x: Tensor) -> Tensor:
        """x [M, K] times the weights, unpacked a few rows at a time."""
        y = dense(x, self.out_features, self._pieces(x.dtype))
        return y.mul_(self.scales.view(torch.bfloat16).to(x.dtype)) if self.form.bits == 8 else y

    def _pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """(which outputs, their weights [n, K]), those of 8 bits unscaled: they are exact, and outputs are fewer than weights."""
        block = self.block or 1
        for first in range(0, self.out_features, step := block * max(1, CHUNK // (self.in_features * block))):
            here = slice(first, min(first + step, self.out_features))
            yield here, self.packed[here].to(dtype) if self.form.bits == 8 else self._unpacked_rows(here, dtype)

    def _unpacked_rows(self, here: slice, dtype: torch.dtype) -> Tensor:
        """4-bit weights of outputs that are whole blocks."""
        inputs, first, last = self.in_features, here.start // self.block, here.stop // self.block
        if code := kernels_for(self.packed):
            brief = dtype == torch.bfloat16
            into = torch.empty(here.stop - here.start, inputs, dtype=dtype if brief else torch.float32)
            code.interleaved_rows(ctypes.byref(self._interleaved()), first, last, brief, into.data_ptr())
            return into.to(dtype)
        blocks = self.packed.view(-1, inputs, self.block // 2)[first:last].transpose(1, 2)
        codes = torch.cat((blocks & 15, blocks >> 4), 1).view(here.stop - here.start, -1, self.form.group)
        scale, offset = self.scales[:, here].view(torch.bfloat16).float().permute(2, 1, 0)[..., None]
        return torch.addcmul(offset, codes.float().sub_(8), scale).flatten(1).to(dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.form.name}, group={self.form.group}"
