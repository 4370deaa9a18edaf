"""A frozen linear layer with a trained low-rank change beside it, and a price on activations that are not zero."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU)


class AdaptedLinear(nn.Module):  # type: ignore[misc]
    """y = W x + b + B A x with W and b frozen; B starts at zero, so that the layer answers as before.

    x [..., K], y [..., N], A [rank, K], B [N, rank].
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = linear.requires_grad_(False)
        self.down = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.up = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        frozen: Tensor = self.frozen(x)
        return frozen + (x @ self.down.t()) @ self.up.t()

    def merged(self) -> nn.Linear:
        """The linear layer that answers the same; the one inside is spent."""
        with torch.no_grad():
            self.frozen.weight += self.up @ self.down
        return self.frozen


def merge(model: nn.Module) -> None:
    """Put plain linear layers back in the place of adapted ones, as is best once training is over; in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, AdaptedLinear):
            model.set_submodule(name, layer.merged())


class _Priced(torch.autograd.Function):  # type: ignore[misc]
    """Passes activations on; their gradient gets that of price x mean(tanh(|h| / width)) added."""

    @staticmethod
    def forward(context: Any, h: Tensor, price: float, width: float) -> Tensor:
        context.save_for_backward(h)
        context.price, context.width = price, width
        return h.view_as(h)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (h,) = context.saved_tensors
        slope = (1 - torch.tanh(h.abs() / context.width).square()) * h.sign() / context.width
        return gradients[0] + context.price / h.numel() * slope, None, None


def activations(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that are activation functions."""
    return [m for m in model.modules() if isinstance(m, ACTIVATIONS) or type(m).__module__ == "transformers.activations"]


def price_density(model: nn.Module, strength: float, width: float) -> None:
    """Add strength x mean(tanh(|h| / width)), a mean over the activations of every layer, to any loss trained from now on.

    It is added to gradients, not to the loss that is shown, and in training mode alone; the loss must not be scaled.
    """
    found = activations(model)
    for one in found:
        one.register_forward_hook(
            lambda module, _, h: _Priced.apply(h, strength / len(found), width) if module.training else h  # type: ignore[no-untyped-call]
        )


def density(model: nn.Module, batches: Iterable[Tensor]) -> float:
    """Share of activations that are not zero, over all layers and batches of the model's first argument."""
    counts = torch.zeros(2, dtype=torch.double)

    def count(_: nn.Module, __: Any, h: Tensor) -> None:
        counts.add_(torch.tensor([float(h.count_nonzero()), float(h.numel())], dtype=torch.double))

    hooks = [one.register_forward_hook(count) for one in activations(model)]
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return float(counts[0] / counts[1])
