"""Rounding to a few bits such that the errors of a layer's inputs cancel on calibration data, instead of each being least.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, ICLR 2023: inputs are
rounded one after another, and what each rounding changes in the outputs is taken back by the inputs that are left.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from narrows.errors import NarrowsError
from narrows.graph import DType
from narrows.modules.calibration import listen
from narrows.modules.packed_linear import Codes, quantized, requantized

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # shares of a group's range that its codes may cover
DAMPING = 0.01  # of the mean square of an input, added to every input's: rare inputs must not take all of the error
ROWS = 4096  # outputs rounded at a time: memory for the largest layers
AT_ONCE = 64  # inputs whose errors are carried on one by one; later inputs get theirs in one product
MOMENT_BYTES = 2**27  # of sums of products held at a time; the data runs once for each part of the layers


def moments(
    model: nn.Module, layers: Mapping[str, nn.Linear], data: Sequence[Mapping[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """(path, sum over all tokens of x^T x [K, K] as fp32) of the input x [T, K] of each named layer, in order.

    `data` holds the keyword arguments of the model's forward. Layers that read the same tensor share one sum; the model must
    stay as it is until all are taken. Raises NarrowsError for a layer that the data does not reach.
    """
    left = list(layers)
    while left:
        count, size = 1, layers[left[0]].in_features ** 2
        while count < len(left) and 4 * (size + layers[left[count]].in_features ** 2) <= MOMENT_BYTES:
            size += layers[left[count]].in_features ** 2
            count += 1
        part, left = left[:count], left[count:]
        sums = _sums(model, {name: layers[name] for name in part}, data)
        for name in part:
            if name not in sums:
                remedy = "Pass a few batches that run it, or round without compensation."
                raise NarrowsError("no calibration data reaches it.", where=name, remedy=remedy)
            yield name, sums[name]


def _sums(model: nn.Module, layers: Mapping[str, nn.Module], data: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    first: dict[str, str] = {}  # of layers that read the same tensor, the one that read it first
    last: tuple[Tensor | None, str] = (None, "")

    def add(name: str, given: Tensor) -> None:
        nonlocal last
        if given is last[0]:
            first[name] = last[1]
            return
        last = given, name
        x = given.flatten(0, -2).float()
        found[name] = x.T @ x if name not in found else found[name].addmm_(x.T, x)

    listen(model, layers, data, add)
    return found | {name: found[other] for name, other in first.items()}


def least_harm_shrinks(weight: Tensor, form: DType, grams: Tensor, shrinks: Sequence[float] = SHRINKS) -> Tensor:
    """For each group of a weight [N, K] the share of its range [N, G] under which rounding changes the outputs least.

    grams: [G, g, g], of each group's inputs the sum over tokens of x^T x.
    """
    plain = weight.detach().float()
    best = torch.ones(len(plain), len(grams))
    least = torch.full_like(best, float("inf"))
    for shrink in shrinks:
        change = requantized(plain, form, shrink).sub_(plain).view(len(plain), len(grams), -1).transpose(0, 1)
        error = ((change @ grams) * change).sum(-1).T  # what the group adds to the square of the output
        best = torch.where(error < least, shrink, best)
        least = torch.minimum(error, least)
    return best


def compensated(weight: Tensor, form: DType, gram: Tensor) -> Codes:
    """Codes of a weight [N, K] in a format with groups, given the sum over tokens of x^T x [K, K] of its inputs.

    Each group's scale and zero are those of rounding to nearest within the range that serves its inputs best; inputs are
    rounded in the order of their size.
    """
    order = gram.diagonal().argsort(descending=True)
    damped = gram[order][:, order]
    damped.diagonal().add_(DAMPING * damped.diagonal().mean().clamp(min=1e-12))
    carry = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    blocks = torch.stack([gram[i : i + form.group, i : i + form.group] for i in range(0, len(gram), form.group)])
    parts = []
    for rows in weight.detach().split(ROWS):  # each output is rounded on its own
        nearest = quantized(rows, form, least_harm_shrinks(rows, form, blocks))
        parts.append(replace(nearest, codes=_carried(rows, nearest, order, carry)))
    codes, scale, zero = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scale", "zero"))
    return Codes(codes, scale, zero, form)


def _carried(weight: Tensor, nearest: Codes, order: Tensor, carry: Tensor) -> Tensor:
    """Codes [N, K] as uint8 with the scales and zeros of `nearest`, inputs rounded in this order.

    carry: [K, K] in that order, upper triangular: how an input's error is spread over those after it.
    """
    inputs, most = len(order), 2 ** round(nearest.format.bits) - 1
    scale, zero = (t.T[order // nearest.format.group].contiguous() for t in (nearest.scale, nearest.zero.float()))  # [K, N]
    left = weight.float().T[order].contiguous()
    codes = torch.empty(inputs, len(weight), dtype=torch.uint8)
    for first in range(0, inputs, AT_ONCE):
        end = min(first + AT_ONCE, inputs)
        errors = torch.empty_like(left[first:end])
        for i in range(first, end):
            code = (left[i] / scale[i]).round_().add_(zero[i]).clamp_(0, most)
            errors[i - first] = (left[i] - (code - zero[i]) * scale[i]) / carry[i, i]
            left[i + 1 : end].addr_(carry[i, i + 1 : end], errors[i - first], alpha=-1)
            codes[order[i]] = code.to(torch.uint8)
        left[end:].addmm_(carry[first:end, end:].T, errors, alpha=-1)
    return codes.T.contiguous()
