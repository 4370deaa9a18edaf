"""A linear layer whose weights are codes of a number format of 2 to 8 bits, and whose inputs may be rounded to one.

Codes of b bits are kept as the segments of 8, 4, 2 and 1 bits that b is a sum of, the high bits in the widest: 6 bits as
4 + 2, each packed into whole bytes. They are multiplied as a `CodedMatrix`; 8-bit integers times integers run on the CPU's
and the GPU's int8 product.
"""

from functools import cache
from typing import Self

import torch
from torch import Tensor, nn

from narrows.errors import NarrowsError
from narrows.graph import DType, Op
from narrows.modules.coded_matrix import WIDTHS, CodedMatrix, joined, segments
from narrows.modules.number_formats import Coding, NumberFormat

LEAST_SCALE = 2.0**-40  # of a row of zeros


def table(form: NumberFormat) -> Tensor:
    """The number that each code stands for, fp32 [2 ** bits]; NaN and infinities where the format keeps them."""
    codes = torch.arange(2**form.bits)
    if not form.exponent:
        return (codes - (codes >> form.mantissa << form.bits)).float()
    field, fraction = codes >> form.mantissa & (2**form.exponent - 1), codes & (2**form.mantissa - 1)
    whole = torch.where(field > 0, fraction + 2**form.mantissa, fraction).double()
    value = whole * 2.0 ** (field.clamp(min=1) - 1 + form.least - form.mantissa)
    special = torch.where((fraction == 0) & (form.mantissa == 2), torch.inf, torch.nan).double()
    value = torch.where(value > form.largest, special, value)
    return torch.where(codes >> (form.bits - 1) > 0, -value, value).float()


@cache
def _kept_table(form: NumberFormat, device: torch.device) -> Tensor:
    """`table` as a coded matrix wants it: every format of up to 8 bits is exact in bf16."""
    return table(form).to(device, torch.bfloat16).view(torch.int16)[None]


def _steps(x: Tensor, form: NumberFormat) -> tuple[Tensor, Tensor]:
    """The exponent of each fp32 number, at least the format's, and the format's step there."""
    exponent = ((x.view(torch.int32) >> 23) & 255).clamp_(min=form.least + 127)
    return exponent - 127, ((exponent - form.mantissa) << 23).view(torch.float32)


def rounded(x: Tensor, form: NumberFormat) -> Tensor:
    """Each number of x as the format's nearest, as fp32; ties to even, and the largest for whatever lies beyond it."""
    x = x.float()
    if form.exponent:
        step = _steps(x, form)[1]
        x = (x / step).round_().mul_(step)
    else:
        x = x.round()
    return x.clamp_(-form.largest, form.largest)


def encoded(values: Tensor, form: NumberFormat) -> Tensor:
    """The codes (uint8) of numbers that lie on the format's grid."""
    values = values.float()
    if not form.exponent:
        return values.to(torch.int8).view(torch.uint8) & (2**form.bits - 1)
    exponent, step = _steps(values, form)
    magnitude = (exponent - form.least) * 2**form.mantissa + (values.abs() / step).int()
    return (magnitude | values.signbit().int() << (form.bits - 1)).to(torch.uint8)


def scales(weight: Tensor, form: NumberFormat, group: int = 0, shrink: Tensor | float = 1.0) -> Tensor:
    """The scale [N, G] at which each group's largest number (times `shrink`) is the format's largest; exact in bf16."""
    grouped = weight.detach().float().view(len(weight), -1, group or weight.shape[1])
    return (grouped.abs().amax(-1) * shrink / form.largest).clamp(min=LEAST_SCALE).bfloat16().float()


def recoded(weight: Tensor, form: NumberFormat, scale: Tensor) -> Tensor:
    """A matrix [N, K] rounded to a format at given scales [N, G], as numbers."""
    grouped = weight.detach().float().view(*scale.shape, -1)
    return rounded(grouped / scale[..., None], form).mul_(scale[..., None]).view(weight.shape)


class CodedLinear(nn.Module):  # type: ignore[misc]
    """y = Q((x - zero) / a) (W a)^T + W zero + b, with W kept as codes; without rounded inputs y = x W^T + b.

    [..., K] to [..., N] in the dtype of x. Scales and zeros are bf16 numbers kept as raw bits (int16), so that
    `module.to(dtype)` leaves them: `scales` [N, G]; with rounded inputs also `input_scale` (a) and `input_zero`, [K] or
    [1] (a row's own scale is not kept). Runs on the meta device. Gradients reach x where it is not rounded, never the weights.
    """

    bits8: Tensor  # or other segments, by what the bits of a code are a sum of
    scales: Tensor
    input_scale: Tensor | None
    input_zero: Tensor | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        coding: Coding,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if problem := coding.unfit(inputs):
            raise NarrowsError(f"{problem}.", where="CodedLinear", remedy="Use another format or group.")
        self.in_features, self.out_features, self.coding = inputs, outputs, coding
        for width in (w for w in WIDTHS if coding.weights.bits & w):
            packed = torch.empty(outputs, inputs * width // 8, dtype=torch.uint8, device=device)
            self.register_buffer(f"bits{width}", packed)
        groups = inputs // (coding.group or inputs)
        self.register_buffer("scales", torch.empty(outputs, groups, dtype=torch.int16, device=device))
        each = torch.empty(inputs if coding.per == "channel" else 1, dtype=torch.int16, device=device)
        self.register_buffer("input_scale", each if coding.inputs and coding.per != "token" else None)
        self.register_buffer("input_zero", each.clone() if coding.zero else None)
        bias = bias or coding.zero
        self.bias = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        coding: Coding,
        scale: Tensor | None = None,
        input_scale: Tensor | None = None,
        input_zero: Tensor | None = None,
    ) -> Self:
        """The layer of a weight [N, K] rounded at `scale` [N, G], by default that of each group's largest number.

        input_scale, input_zero: [K] or [1], as `coding` says; 1 and 0 by default. A zero goes into the bias.
        """
        outputs, inputs = weight.shape
        layer = cls(inputs, outputs, coding, bias is not None, weight.device, weight.dtype if bias is None else bias.dtype)
        whole = weight.detach().float()
        if layer.input_scale is not None:
            a = torch.ones_like(layer.input_scale, dtype=torch.float32) if input_scale is None else input_scale
            layer.input_scale = _bits(a.clamp(min=LEAST_SCALE))
            whole = whole * _numbers(layer.input_scale) if coding.folded else whole
        scale = scales(whole, coding.weights, coding.group) if scale is None else scale
        layer.scales = _bits(scale)
        values = rounded(whole.view(*scale.shape, -1) / scale[..., None], coding.weights).view(whole.shape)
        for width, packed in segments(encoded(values, coding.weights), coding.weights.bits).items():
            setattr(layer, f"bits{width}", packed)
        if layer.bias is not None:
            layer.bias.data.zero_() if bias is None else layer.bias.data.copy_(bias.detach())
        if layer.input_zero is not None and layer.bias is not None:
            layer.input_zero = _bits(
                torch.zeros_like(layer.input_zero, dtype=torch.float32) if input_zero is None else input_zero
            )
            moved = (_numbers(layer.input_zero) / _numbers(layer.input_scale)).expand(inputs)
            layer.bias.data += (layer.weight() @ moved).to(layer.bias.dtype)
        return layer

    @property
    def matrix(self) -> CodedMatrix:
        """What it multiplies by, but for scales of inputs that are not in it."""
        form = self.coding.weights
        parts = tuple(t[None] for name, t in self._buffers.items() if name.startswith("bits"))
        return CodedMatrix(
            self.out_features, self.in_features, parts, form.bits, _kept_table(form, self.scales.device), self.scales[None]
        )

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The plain reference: the matrix [N, K] that rounded inputs are multiplied by."""
        return (self.matrix.rows() * self._back()).to(dtype)

    def _back(self) -> Tensor | float:
        """What the weights are multiplied by because inputs were divided by it, after rounding them."""
        return 1.0 if self.input_scale is None or self.coding.folded else _numbers(self.input_scale)

    def rounded_inputs(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [M, K] as fp32 numbers of the inputs' format, zeros and scales taken out, and the scales of its rows [M, 1]."""
        assert self.coding.inputs
        if self.input_scale is None:
            scale = (x.float().abs().amax(-1, keepdim=True) / self.coding.inputs.largest).clamp(min=LEAST_SCALE)
            return rounded(x / scale, self.coding.inputs), scale
        shifted = x.float() if self.input_zero is None else x.float() - _numbers(self.input_zero)
        return rounded(shifted * _numbers(self.input_scale).reciprocal(), self.coding.inputs), None

    @property
    def resident_bytes(self) -> int:
        """Bytes of everything the layer keeps in memory."""
        return sum(t.numel() * t.element_size() for t in (*self.buffers(), *self.parameters()))

    def graph_op(self, name: str, rows: int, act: DType) -> Op:
        """What capture writes down for this layer."""
        dims = {"rows": rows, "inputs": self.in_features, "outputs": self.out_features, "bias": int(self.bias is not None)}
        return Op(name, "linear", dims, act=act, weight=self.coding.stored, compute=self.coding.compute)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return x.new_empty(*x.shape[:-1], self.out_features)
        flat, scale = x.reshape(-1, self.in_features), None
        if self.coding.inputs:
            flat, scale = self.rounded_inputs(flat)
        if self._is_integer(flat):
            y = self._integers(flat)
        else:
            back = self._back()
            y = self.matrix.multiply((flat * back if isinstance(back, Tensor) else flat).to(x.dtype))
        y = y if scale is None else y * scale
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _is_integer(self, x: Tensor) -> bool:
        """Whether the int8 product runs this; on a GPU it wants more than 16 rows and whole eights."""
        coding = self.coding
        plain = not coding.group and (coding.folded or coding.per != "channel")
        if x.device.type == "cpu":
            return plain and coding.compute == "int8" and coding.weights.bits == 8
        large = len(x) > 16 and self.in_features % 8 == self.out_features % 8 == 0
        return plain and large and coding.compute in ("int8", "int4")

    def _integers(self, x: Tensor) -> Tensor:
        """x [M, K] of whole numbers times the codes in int8 with sums in int32, as fp32."""
        bits = self.coding.weights.bits
        if bits == 8:
            codes = self.bits8.view(torch.int8)
        else:  # the sign moves to its place
            codes = (joined(self.matrix.codes, bits)[0] << 8 - bits).view(torch.int8) >> 8 - bits
        scale = _numbers(self.scales)[:, 0] * self._back()
        return torch._int_mm(x.to(torch.int8), codes.T).float().mul_(scale)

    def extra_repr(self) -> str:
        rounding = f", inputs={self.coding.inputs}" if self.coding.inputs else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.coding.stored.name}{rounding}"


def _bits(numbers: Tensor) -> Tensor:
    return numbers.to(torch.bfloat16).view(torch.int16)


def _numbers(bits: Tensor) -> Tensor:
    return bits.view(torch.bfloat16).float()
