"""Linear layers whose weights are sums of planes of signs or trits, each plane scaled group by group.

A weight is W[n, k] = sum_p scale[p, n, k // g] x plane[p, n, k] with a plane of {-1, 1} or {-1, 0, 1}; with scales `by`
outputs, they are shared by g outputs of one input instead: scale[p, n // g, k]. Signs take 1 bit, trits 1.6: five a byte.
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Self

import torch
from torch import Tensor, nn

from narrows.errors import NarrowsError
from narrows.graph import DType, Op
from narrows.modules.coded_matrix import MIDDLE, CodedMatrix, joined, packed_trits, segments, unpacked_trits
from narrows.modules.linears import NUMBERS_PER_BYTE, Planes

CHUNK = 2**20  # weights that moments are taken of at a time: 4 MB as fp32, which stays in the cache
LEAST_SCALE = 2.0**-40
EVEN = 0.7  # of the largest weight: where signs start


@dataclass(frozen=True)
class Fit:
    """Planes [P, R, g] (int8) and scales [P, R] of rows [R, g], and the squared error before and after each round."""

    planes: Tensor
    scale: Tensor
    errors: tuple[float, ...]


def fit(rows: Tensor, form: Planes, rounds: int = 10, uniform: bool = False) -> Fit:
    """The sum of scaled planes nearest to each row [R, g], by turns: each weight its nearest level, then scales for them.

    Both turns are exact, a scale being the nearest to its optimum that the format keeps, so that the error never rises.
    Trits start plane by plane on what the planes before leave, signs from even levels, powers of two from the best plain
    scales. `uniform` instead rounds signs to even levels up to the largest weight, and does no round.
    """
    size = rows.detach().float().abs()
    combos = _combinations(form.values, form.count).to(rows.device)
    if form.powers and not uniform:
        scale = fit(rows, replace(form, powers=0), rounds).scale
    elif form.values == 3:
        scale = _greedy(size, form)
    else:
        scale = _even(size, form) * (1 if uniform else EVEN)
    scale = _storable(scale, form)
    gram, pull, error = _moments(size, scale, combos)
    errors = [error]
    for _ in range(0 if uniform else rounds):
        for p in (*range(form.count), *range(form.count)):
            weight = gram[:, p, p]
            best = (pull[:, p] - (gram[:, p] * scale.T).sum(1) + weight * scale[p]) / weight.clamp(min=1)
            better = torch.where(weight > 0, _storable(best.clamp(min=LEAST_SCALE), form), scale[p])
            scale = torch.cat((scale[:p], better[None], scale[p + 1 :]))
        gram, pull, error = _moments(size, scale, combos)
        errors.append(error)
        if error > (1 - 1e-3) * errors[-2]:
            break
    levels, order, _ = _levels(scale, combos)
    index = torch.zeros(rows.shape, dtype=torch.int64, device=rows.device)
    for j in range(levels.shape[1] - 1):
        index += size > (levels[:, j] + levels[:, j + 1])[:, None] / 2
    chosen = _signed(scale, combos)[torch.arange(len(rows), device=rows.device)[:, None], order.gather(1, index)]
    sign = torch.where(rows < 0, -1.0, 1.0)[..., None]
    return Fit((chosen * sign).permute(2, 0, 1).to(torch.int8), scale, tuple(errors))


@cache
def _combinations(values: int, count: int) -> Tensor:
    """What planes can say of one weight up to its sign: fp32 [J, P]."""
    every = product((1.0, -1.0) if values == 2 else (1.0, 0.0, -1.0), repeat=count)
    found: list[tuple[float, ...]] = []
    for one in every:
        if tuple(-v for v in one) not in found:
            found.append(one)
    return torch.tensor(found)


def _signed(scale: Tensor, combos: Tensor) -> Tensor:
    """The combinations [R, J, P], each turned so that its level is not negative."""
    sign = torch.where(scale.T @ combos.T < 0, -1.0, 1.0)
    return combos * sign[..., None]


def _levels(scale: Tensor, combos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels [R, J] in ascending order, which combination each is [R, J], and those, turned [R, J, P]."""
    signed = _signed(scale, combos)
    levels, order = (signed * scale.T[:, None]).sum(-1).sort(1)
    return levels, order, signed.gather(1, order[..., None].expand_as(signed))


def _moments(size: Tensor, scale: Tensor, combos: Tensor) -> tuple[Tensor, Tensor, float]:
    """Of the nearest planes: their products with each other [R, P, P], with the weights [R, P], and the squared error."""
    levels, _, signed = _levels(scale, combos)
    counts, sums = levels.new_zeros(*levels.shape[:1], levels.shape[1] + 1), levels.new_zeros(len(levels), levels.shape[1] + 1)
    counts[:, 0], sums[:, 0] = size.shape[1], size.sum(1)
    for rows in torch.arange(len(size), device=size.device).split(max(1, CHUNK // 4 // size.shape[1])):
        here = slice(int(rows[0]), int(rows[-1]) + 1)
        for j in range(1, levels.shape[1]):
            above = (size[here] > ((levels[here, j - 1] + levels[here, j]) / 2)[:, None]).float()
            counts[here, j] = above.sum(1)
            sums[here, j] = above.mul_(size[here]).sum(1)
    counts, sums = counts[:, :-1] - counts[:, 1:], sums[:, :-1] - sums[:, 1:]
    error = size.square().sum(1) - 2 * (sums * levels).sum(1) + (counts * levels.square()).sum(1)
    pull = (sums[:, :, None] * signed).sum(1)
    return signed.mT @ (counts[:, :, None] * signed), pull, float(error.double().sum())


def _even(size: Tensor, form: Planes) -> Tensor:
    """The scales at which signs make 2^P even levels, the last the largest weight."""
    step = size.amax(1) / (2**form.count - 1)
    return torch.stack([step * 2**p for p in range(form.count)]).clamp(min=LEAST_SCALE)


def _greedy(size: Tensor, form: Planes) -> Tensor:
    """Each trit-plane's scale by what the planes before leave: the mean of what lies above 0.7 of its mean (Li et al. 2016)."""
    left, scales = size, []
    for _ in range(form.count):
        chosen = left > 0.7 * left.mean(1, keepdim=True)
        scale = ((left * chosen).sum(1) / chosen.sum(1).clamp(min=1)).clamp(min=LEAST_SCALE)
        scales.append(scale)
        left = (left - scale[:, None] * chosen).abs()
    return torch.stack(scales)


def _storable(scale: Tensor, form: Planes) -> Tensor:
    """The nearest positive numbers that the format keeps."""
    return _powers(scale, form.powers)[1] if form.powers else scale.bfloat16().float()


def _powers(scale: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """Numbers as sums of signed powers of two, each the nearest to what is left: bytes [terms, ...], and their sum."""
    codes, total = [], torch.zeros_like(scale)
    for _ in range(terms):
        left = scale - total
        fraction, exponent = torch.frexp(left)  # |left| = fraction x 2^exponent, fraction in [0.5, 1)
        exponent = torch.where(fraction.abs() >= 0.75, exponent, exponent - 1).clamp(1 - MIDDLE, 127 - MIDDLE)
        used = (left != 0) & (left.abs() >= LEAST_SCALE / 2)
        codes.append((torch.sign(left) * (exponent + MIDDLE) * used).to(torch.int8))
        total = total + torch.where(used, torch.sign(left) * torch.exp2(exponent.float()), 0)
    return torch.stack(codes), total


@cache
def _table(values: int, device: torch.device) -> Tensor:
    """The numbers of the codes of a plane, as a coded matrix wants them."""
    numbers = torch.tensor([[-1.0, 1.0] if values == 2 else [-1.0, 0.0, 1.0]], device=device)
    return numbers.bfloat16().view(torch.int16)


class PlanesLinear(nn.Module):  # type: ignore[misc]
    """y = x W^T + b with W kept as packed planes: [..., K] to [..., N] in the dtype of x.

    `planes` are bytes [P, N, ...]; `scales` are [P, R, G], int16 (raw bf16), or int8 [terms, P, R, G] for powers of two: a
    row for each output, or for each group of them. Gradients reach x, never the weights, and keep no copy of these. Runs on
    the meta device.
    """

    planes: Tensor
    scales: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        form: Planes,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if problem := form.unfit(inputs, outputs):
            raise NarrowsError(f"{problem}.", where="PlanesLinear", remedy="Use another group.")
        self.in_features, self.out_features, self.form = inputs, outputs, form
        size = -(-inputs // NUMBERS_PER_BYTE[form.values])
        self.register_buffer("planes", torch.empty(form.count, outputs, size, dtype=torch.uint8, device=device))
        groups = (outputs, inputs // form.group) if form.by == "inputs" else (outputs // form.group, inputs)
        terms, kind = ((form.powers,), torch.int8) if form.powers else ((), torch.int16)
        self.register_buffer("scales", torch.empty(*terms, form.count, *groups, dtype=kind, device=device))
        self.bias = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def of(cls, planes: Tensor, scale: Tensor, form: Planes, bias: Tensor | None, dtype: torch.dtype) -> Self:
        """The layer of planes [P, N, K] and scales [P, N, K / g], or [P, N / g, K] where they go by outputs."""
        _, outputs, inputs = planes.shape
        layer = cls(inputs, outputs, form, bias is not None, planes.device, dtype)
        codes = (planes + 1).to(torch.uint8)
        layer.planes = packed_trits(codes) if form.values == 3 else segments(codes >> 1, 1)[1]
        scale = scale.contiguous()
        layer.scales = _powers(scale, form.powers)[0] if form.powers else scale.bfloat16().view(torch.int16)
        if layer.bias is not None and bias is not None:
            layer.bias.data.copy_(bias.detach())
        return layer

    @classmethod
    def like(cls, linear: nn.Linear, form: Planes) -> Self:
        """The structure of a linear layer's planes, with its bias and without weights."""
        weight, bias = linear.weight, linear.bias is not None
        return cls(linear.in_features, linear.out_features, form, bias, weight.device, weight.dtype)

    @classmethod
    def nearest(cls, linear: nn.Linear, form: Planes, rounds: int = 10, uniform: bool = False) -> Self:
        """The layer whose planes are nearest to a linear layer's weights; scales by inputs."""
        weight = linear.weight.detach()
        found = fit(weight.reshape(-1, form.group), form, rounds, uniform)
        planes = found.planes.view(form.count, *weight.shape)
        return cls.of(planes, found.scale.view(form.count, len(weight), -1), form, linear.bias, weight.dtype)

    @property
    def matrix(self) -> CodedMatrix:
        """What it multiplies by."""
        bits = 1 if self.form.values == 2 else 0
        table = _table(self.form.values, self.planes.device)
        return CodedMatrix(self.out_features, self.in_features, (self.planes,), bits, table, self.scales)

    @property
    def scale(self) -> Tensor:
        """The scales as fp32 numbers [P, R, G]."""
        found = self.matrix.scale()
        assert found is not None
        return found

    def weight(self) -> Tensor:
        """The plain reference: the matrix [N, K] that the planes stand for, fp32."""
        return self.matrix.rows()

    @property
    def resident_bytes(self) -> int:
        """Bytes of everything the layer keeps in memory."""
        return sum(t.numel() * t.element_size() for t in (*self.buffers(), *self.parameters()))

    def graph_op(self, name: str, rows: int, act: DType) -> Op:
        """What capture writes down for this layer."""
        dims = {"rows": rows, "inputs": self.in_features, "outputs": self.out_features, "bias": int(self.bias is not None)}
        return Op(name, "linear", dims, act=act, weight=self.form.stored)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return x.new_empty(*x.shape[:-1], self.out_features)
        y = self.matrix.multiply(x.reshape(-1, self.in_features))
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.form.stored.name}, group={self.form.group}"
        )


def added(x: Tensor, layer: PlanesLinear) -> Tensor:
    """Whole numbers x [M, K] times each of a layer's planes, by groups of inputs, with additions alone: int64 [P, M, N, G]."""
    group, codes = layer.form.group, (layer.planes,)
    digits = unpacked_trits(*codes, layer.in_features) if layer.form.values == 3 else 2 * joined(codes, 1)
    planes = (digits.int() - 1).view(layer.form.count, 1, layer.out_features, -1, group)
    read = x.view(1, len(x), 1, -1, group)
    zero = torch.zeros((), dtype=x.dtype)
    return torch.where(planes > 0, read, zero).sum(-1) - torch.where(planes < 0, read, zero).sum(-1)


def shifted(x: Tensor, layer: PlanesLinear) -> tuple[Tensor, int]:
    """Whole numbers x [M, K] times a layer's weights with shifts, table look-ups and additions alone: (int64 [M, N], e).

    The result is y = int64 x 2^e. For signs with scales that are powers of two by outputs: inputs are shifted by
    their scales' exponents, every 8 of them make a table of their 256 signed sums, and a plane's bytes look them up.
    """
    form = layer.form
    if not form.powers or form.values != 2 or form.by != "outputs":
        raise NarrowsError("its scales cannot be shifts.", where="planes", remedy="Use signs and powers of two by outputs.")
    codes = layer.scales.long()
    least = int(codes.abs()[codes != 0].min())
    shifts = (codes.abs() - least).clamp(min=0)
    y = torch.zeros(len(x), layer.out_features, dtype=torch.int64)
    looked_up = layer.planes.long()  # a byte for every 8 inputs of an output
    for plane in range(form.count):
        for group in range(layer.out_features // form.group):
            here = slice(group * form.group, (group + 1) * form.group)
            terms = (x.long()[None] << shifts[:, plane, None, group]) * torch.sign(codes[:, plane, None, group])
            eights = terms.sum(0).view(len(x), -1, 8)
            table = torch.zeros(*eights.shape[:2], 256, dtype=torch.int64)
            table[..., 0] = -eights.sum(-1)
            for bit in range(8):  # an entry with one more bit set adds that input twice
                table[..., 2**bit : 2 ** (bit + 1)] = table[..., : 2**bit] + (eights[..., bit, None] << 1)
            index = looked_up[plane, here].T.expand(len(x), -1, -1)
            y[:, here] += table.gather(2, index).sum(1)
    return y, least - MIDDLE
