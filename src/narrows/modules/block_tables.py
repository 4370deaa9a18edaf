"""4-bit weights as entries of a table, with a scale for each block of them: bitsandbytes' nf4 and fp4."""

from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64  # weights in a row that share a scale
SCALES = 256  # that share a scale of their own, where they are quantized as well


def table(name: str) -> Tensor:
    """The 16 numbers of 'nf4', or the 15 of 'fp4', ascending from -1 to 1.

    nf4: quantiles of the normal distribution, evenly spread on either side of 0. fp4: a sign, two exponent bits and one of the
    fraction, which steps by a third where a power of two does not.
    """
    if name == "fp4":
        sizes = [0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1]
        return torch.tensor(sorted({*sizes, *(-size for size in sizes)}))
    quantile, most = NormalDist().inv_cdf, (1 - 1 / 32 + 1 - 1 / 30) / 2  # the mean of half a step below 1 for 16 and 15 numbers
    above = [quantile(most + (0.5 - most) * i / 8) for i in range(8)]
    below = [-quantile(most + (0.5 - most) * i / 7) for i in range(7)]
    return torch.tensor(sorted((*below, 0.0, *above))) / max(above)


def tabled(weight: Tensor, name: str, double: bool = False) -> Tensor:
    """A matrix with every weight at its block's nearest number of a table, as fp32; `double`: scales in 8 bits too."""
    blocks = weight.detach().float().reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    if double:
        scale = _scales_in_8_bits(scale)
    numbers = table(name).to(weight.device)
    nearest = torch.bucketize(blocks / scale, (numbers[1:] + numbers[:-1]) / 2)
    return (numbers[nearest] * scale).view(weight.shape)


def _scales_in_8_bits(scale: Tensor) -> Tensor:
    """Scales [B, 1] as their mean and, for each 256 of them, 8-bit parts of the largest distance from it."""
    mean = scale.mean()
    apart = F.pad((scale - mean).flatten(), (0, -len(scale) % SCALES)).view(-1, SCALES)
    step = apart.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return ((apart / step).round() * step).flatten()[: len(scale), None] + mean
