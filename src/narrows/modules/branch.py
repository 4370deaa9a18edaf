"""A linear layer in few bits with a low-rank branch of plain numbers beside it, and one whose inputs are rounded too."""

from typing import Self

import torch
from torch import Tensor, nn

from narrows.graph import DType, Op
from narrows.modules.coded_linear import CodedLinear
from narrows.modules.number_formats import Coding, NumberFormat

LEAST = 2.0**-40


class BranchedLinear(nn.Module):  # type: ignore[misc]
    """y = base(x) + up(down(x)): [..., K] to [..., N], through a middle of r numbers."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int, rank: int, like: Tensor) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(inputs, rank, bias=False, device=like.device, dtype=like.dtype)
        self.up = nn.Linear(rank, outputs, bias=False, device=like.device, dtype=like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def rounded_by_group(x: Tensor, group: int) -> Tensor:
    """x [M, K] as 4-bit whole numbers times a scale for each token and group of inputs: the numbers that they stand for."""
    grouped = x.float().view(len(x), -1, group)
    scale = (grouped.abs().amax(-1, keepdim=True) / 7).clamp(min=LEAST)
    return (grouped / scale).round_().mul_(scale).view(x.shape).to(x.dtype)


class RoundedLinear(nn.Module):  # type: ignore[misc]
    """y = Q(x * smooth) W^T + b in 4-bit weights and 4-bit inputs, both in groups of inputs; a reference, not a kernel.

    `smooth` [K] holds bf16 numbers as raw bits. Runs on the meta device.
    """

    smooth: Tensor

    def __init__(self, coded: CodedLinear, smooth: Tensor) -> None:
        super().__init__()
        self.coded = coded
        self.register_buffer("smooth", smooth)

    @classmethod
    def like(cls, linear: nn.Linear, group: int) -> Self:
        """The structure for a linear layer, with its bias and without weights."""
        weight, sizes = linear.weight, (linear.in_features, linear.out_features)
        coded = CodedLinear(*sizes, int4(group), linear.bias is not None, weight.device, weight.dtype)
        return cls(coded, torch.empty(linear.in_features, dtype=torch.int16, device=weight.device))

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, smooth: Tensor, group: int) -> Self:
        """The layer of a weight [N, K] for inputs multiplied by `smooth` [K], numbers that bf16 holds."""
        return cls(CodedLinear.of(weight, bias, int4(group)), smooth.bfloat16().view(torch.int16))

    def graph_op(self, name: str, rows: int, act: DType) -> Op:
        """What capture writes down for this layer."""
        coded = self.coded
        dims = {"rows": rows, "inputs": coded.in_features, "outputs": coded.out_features, "bias": int(coded.bias is not None)}
        return Op(name, "linear", dims, act=act, weight=coded.coding.stored, compute="int4")

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return x.new_empty(*x.shape[:-1], self.coded.out_features)
        flat = x.reshape(-1, x.shape[-1]) * self.smooth.view(torch.bfloat16).to(x.dtype)
        y: Tensor = self.coded(rounded_by_group(flat, self.coded.coding.group))
        return y.view(*x.shape[:-1], -1)


def int4(group: int) -> Coding:
    """4-bit whole numbers with a scale for every `group` inputs."""
    return Coding(NumberFormat.parse("int4"), group)
