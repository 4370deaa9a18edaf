"""Training as hardware with another number format would do it: operands of products are rounded to it, sums stay fp32."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# By name: mantissa bits, the exponent of the smallest normal number, and the largest number.
FORMATS = {"bf16": (7, -126, (2 - 2.0**-7) * 2.0**127), "fp16": (10, -14, 65504.0)}


def rounded(x: Tensor, form: str, nearest: bool = True) -> Tensor:
    """Each fp32 number as one of 'bf16' or 'fp16', in fp32: the nearest (ties to even), or the next towards zero.

    Rounded to the nearest, what lies half a step or more beyond the largest number is infinite.
    """
    mantissa, least, largest = FORMATS[form]
    wide = x.double()  # its exponents reach below the smallest step, so that all below is exact
    exponent = (wide.view(torch.int64) >> 52 & 2047).clamp_(min=least + 1023)
    step = (exponent - mantissa << 52).view(torch.float64)
    units = wide / step
    result = (units.round_() if nearest else units.trunc_()).mul_(step)
    if nearest:
        result[result.abs() > largest] *= torch.inf
    else:
        result = torch.where(wide.isfinite(), result.clamp(-largest, largest), result)
    return result.float()


class _Rounded(torch.autograd.Function):  # type: ignore[misc]
    """Rounds on the way forward, or on the way back."""

    @staticmethod
    def forward(context: Any, x: Tensor, form: str, nearest: bool, back: bool) -> Tensor:
        context.way = form, nearest, back
        return x.view_as(x) if back else rounded(x, form, nearest)

    @staticmethod
    def backward(context: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        form, nearest, back = context.way
        return rounded(dy, form, nearest) if back else dy, None, None, None


class _Operand(nn.Module):  # type: ignore[misc]
    """A weight as products see it; the one that is updated stays fp32."""

    def __init__(self, form: str, nearest: bool) -> None:
        super().__init__()
        self.way = form, nearest

    def forward(self, weight: Tensor) -> Tensor:
        return _Rounded.apply(weight, *self.way, False)


def round_products(model: nn.Module, form: str, nearest: bool = True) -> int:
    """Round inputs, weights and output gradients of fp32 linear layers and convolutions in place; gives how many layers."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    found = [layer for layer in model.modules() if isinstance(layer, kinds) and layer.weight.dtype == torch.float32]
    for layer in found:
        layer.register_forward_pre_hook(lambda _, given: (_Rounded.apply(given[0], form, nearest, False), *given[1:]))
        layer.register_forward_hook(lambda _, given, out: _Rounded.apply(out, form, nearest, True))
        parametrize.register_parametrization(layer, "weight", _Operand(form, nearest), unsafe=True)
    return len(found)
