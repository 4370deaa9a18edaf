"""Linear and convolution layers as two layers with a narrow middle, made of standard modules alone."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.modules.calibration import vectors

Factors = tuple[Tensor, Tensor]
_CONVOLUTIONS = {nn.Conv1d, nn.Conv2d, nn.Conv3d}


def svd(weight: Tensor, rank: int) -> Factors:
    """left [N, r] and right [r, K] whose product is the nearest to weight [N, K] of that rank (Eckart-Young)."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def activation_svd(weight: Tensor, rank: int, x: Tensor, damping: float = 1e-3) -> Factors:
    """Factors that change the outputs for inputs like x [T, K] least, instead of the weights.

    With the inputs' second moments C = L L^T the error is |(W - A B) L|: the SVD of W L, multiplied by L^-1 again.
    `damping` of the mean diagonal keeps directions that x never took.
    """
    moments = x.T @ x / len(x)
    moments.diagonal().add_(damping * moments.diagonal().mean() + 1e-12)
    whitener = torch.linalg.cholesky(moments)
    left, right = svd(weight @ whitener, rank)
    return left, torch.linalg.solve_triangular(whitener, right, upper=False, left=False)


def semi_nmf(weight: Tensor, rank: int, rounds: int = 30) -> Factors:
    """left [N, r] of any sign and right [r, K] >= 0 by multiplicative updates (Ding, Li and Jordan 2010), from the SVD."""
    right = svd(weight, rank)[1].abs() + 1e-3
    for _ in range(rounds):
        left = torch.linalg.lstsq(right.T, weight.T).solution.T
        pull, gram = left.T @ weight, left.T @ left
        gain = pull.clamp(min=0) + (-gram).clamp(min=0) @ right
        right = right * (gain / (pull.clamp(max=0).neg() + gram.clamp(min=0) @ right + 1e-9)).sqrt()
    return torch.linalg.lstsq(right.T, weight.T).solution.T, right


def random(weight: Tensor, rank: int) -> Factors:
    """Factors that know of the weight only how large its outputs are: for training from the start."""
    generator = torch.Generator().manual_seed(weight.shape[0] * weight.shape[1])
    spread = (weight.std() / rank**0.5).sqrt()
    left = torch.randn(weight.shape[0], rank, generator=generator)
    return left * spread, torch.randn(rank, weight.shape[1], generator=generator) * spread


def factored(layer: nn.Module, rank: int, solve: Callable[[Tensor, int], Factors]) -> nn.Sequential:
    """A linear layer or an ungrouped convolution as two: the first has no bias, the second has the layer's own.

    A convolution keeps its kernel, stride and padding in the first, which gives `rank` channels; the second is 1 x 1.
    On the meta device nothing is solved. Dtype and device stay the layer's.
    """
    weight, bias = matrix(layer), getattr(layer, "bias", None)
    outputs, inputs = weight.shape
    made: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if isinstance(layer, tuple(_CONVOLUTIONS)):
        kind: Any = type(layer)
        conv: Any = layer
        window = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        first = kind(conv.in_channels, rank, bias=False, **window, **made)
        second = kind(rank, outputs, 1, bias=bias is not None, **made)
    else:
        first = nn.Linear(inputs, rank, bias=False, **made)
        second = nn.Linear(rank, outputs, bias=bias is not None, **made)
    if weight.device.type != "meta":
        left, right = solve(weight.float(), rank)
        with torch.no_grad():
            first.weight.copy_(right.reshape(first.weight.shape))
            second.weight.copy_(left.reshape(second.weight.shape))
            if bias is not None:
                second.bias.copy_(bias)
    return nn.Sequential(first, second).train(layer.training)


def matrix(layer: nn.Module) -> Tensor:
    """The layer's weight as [N, K]: outputs by everything that one of them is a sum of."""
    weight: Tensor = layer.weight.detach()
    return weight.T if _is_transposed(layer) else weight.flatten(1)


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """What the outputs of a factorable layer are products of, [T, K]: its input's rows, or a convolution's patches."""
    if not isinstance(layer, tuple(_CONVOLUTIONS)):
        return vectors(layer, x)
    conv: Any = layer
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    space = range(2, x.dim())
    for dim, size, stride, dilation in zip(space, conv.kernel_size, conv.stride, conv.dilation, strict=True):
        x = x.unfold(dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
    x = x.movedim(1, 1 + len(space))  # [B, positions, C, kernel]
    return x.reshape(-1, conv.in_channels * math.prod(conv.kernel_size))


def is_factorable(layer: nn.Module) -> bool:
    """A plain linear layer (GPT-2's transposed one too) or a convolution that joins all its channels."""
    if type(layer) in _CONVOLUTIONS:
        return bool(layer.groups == 1)
    return type(layer) is nn.Linear or _is_transposed(layer)


def _is_transposed(layer: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2 in transformers, which keeps its weight as [K, N]."""
    return f"{type(layer).__module__}.{type(layer).__name__}" == "transformers.pytorch_utils.Conv1D"
