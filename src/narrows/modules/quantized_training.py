"""Training with weights and inputs as whole numbers times a step, and gradients as if nothing were rounded."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

MOMENTUM = 0.1  # of the running bound of a layer's inputs
LEAST = 1e-8


def rounded(x: Tensor, step: Tensor) -> Tensor:
    """x as the nearest whole multiples of a step, with gradients as if it were x."""
    return x + ((x / step).round() * step - x).detach()


class WeightCodes(nn.Module):  # type: ignore[misc]
    """A weight [N, ...] as products see it: whole numbers of `bits`, symmetric, times a step for each output."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.most = 2 ** (bits - 1) - 1

    def step(self, weight: Tensor) -> Tensor:
        """The step of each output [N, 1, ...], at which its largest weight is the largest number."""
        return weight.detach().abs().amax(tuple(range(1, weight.dim())), keepdim=True).clamp(min=LEAST) / self.most

    def forward(self, weight: Tensor) -> Tensor:
        return rounded(weight, self.step(weight))


class InputCodes(nn.Module):  # type: ignore[misc]
    """Inputs as whole numbers of `bits` times one step, from 0 where none was negative in training; no gradient beyond the last.

    They end at `spread` times the root of their mean square, or at the largest where that is less: a running mean of training's.
    """

    bound: Tensor
    signed: Tensor

    def __init__(self, bits: int, spread: float) -> None:
        super().__init__()
        self.bits, self.spread = bits, spread
        self.register_buffer("bound", torch.zeros(()))
        self.register_buffer("signed", torch.zeros((), dtype=torch.bool))

    @property
    def range(self) -> tuple[int, int]:
        """The least and the largest whole number."""
        most = 2 ** (self.bits - bool(self.signed)) - 1
        return (-most if self.signed else 0), most

    @property
    def step(self) -> Tensor:
        """What the whole numbers are multiplied by."""
        return self.bound.clamp(min=LEAST) / self.range[1]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def watch(self, x: Tensor) -> None:
        """Take a batch of inputs into the running bound."""
        now = torch.minimum(x.abs().amax(), self.spread * x.square().mean().sqrt()).float()
        self.bound.copy_(torch.where(self.bound > 0, self.bound.lerp(now, MOMENTUM), now))
        self.signed |= (x < 0).any()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.watch(x)
        least, most = self.range
        return rounded(x.clamp(least * self.step, most * self.step), self.step)


def products(model: nn.Module) -> list[str]:
    """The paths of linear layers and convolutions, in order."""
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def quantize(model: nn.Module, widths: Mapping[str, int], spread: float) -> None:
    """Round weights and inputs of the named layers to so many bits each, in place."""
    for name, bits in widths.items():
        layer = model.get_submodule(name)
        parametrize.register_parametrization(layer, "weight", WeightCodes(bits))
        layer.register_module("input_codes", InputCodes(bits, spread))
        layer.register_forward_pre_hook(lambda layer, given: (layer.input_codes(given[0]), *given[1:]))
