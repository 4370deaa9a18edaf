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
    wide = x.double()
    exponent = (torch.frexp(wide).exponent - 1).clamp(min=least)
    step = torch.ldexp(torch.ones_like(wide), exponent - mantissa)
    scaled = wide / step
    result = (scaled.round() if nearest else scaled.trunc()) * step
    beyond = torch.where(wide < 0, -1.0, 1.0) * (torch.inf if nearest else largest)
    result = torch.where((result.abs() > largest) & wide.isfinite(), beyond, result)
    return torch.where(wide.isfinite(), result, wide).float()


class _Rounded(torch.autograd.Function):  # type: ignore[misc]
    """Rounds on the way forward, backward, or both."""

    @staticmethod
    def forward(context: Any, x: Tensor, form: str, nearest: bool, ways: str) -> Tensor:
        context.way = form, nearest, ways
        return rounded(x, form, nearest) if "forward" in ways else x.view_as(x)

    @staticmethod
    def backward(context: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        form, nearest, ways = context.way
        return rounded(dy, form, nearest) if "backward" in ways else dy, None, None, None


class _Weight(nn.Module):  # type: ignore[misc]
    """A weight as products see it; the one that is updated stays fp32."""

    def __init__(self, form: str, nearest: bool) -> None:
        super().__init__()
        self.way = form, nearest

    def forward(self, weight: Tensor) -> Tensor:
        return _Rounded.apply(weight, *self.way, "forward")


def round_products(model: nn.Module, form: str, nearest: bool = True) -> nn.Module:
    """The model, in place, with inputs, weights and output gradients of linear layers and convolutions rounded to a format."""
    for layer in list(model.modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, given: (_Rounded.apply(given[0], form, nearest, "forward"), *given[1:]))
            layer.register_forward_hook(lambda _, given, out: _Rounded.apply(out, form, nearest, "backward"))
            parametrize.register_parametrization(layer, "weight", _Weight(form, nearest), unsafe=True)
    return model
