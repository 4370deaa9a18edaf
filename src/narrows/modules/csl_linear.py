"""A linear layer that is loaded sparse and computed dense: its nonzeros are expanded, tile by tile, for a dense product."""

from typing import Self

import torch
from torch import Tensor, nn

from narrows.graph import DType, Op
from narrows.modules.linears import CSL_TILE, csl

# Weights expanded at a time: 4 MB as fp32, so that they stay in the cache.
CHUNK = 2**20
DOWN, ACROSS = CSL_TILE


class CSLLinear(nn.Module):  # type: ignore[misc]
    """y = x W^T + b with only the nonzeros of W kept, as tiled CSL: [..., K] to [..., N] in the dtype of x.

    `entries` [nonzeros] hold a bf16 number in their high half and its place in its tile of 128 x 64 in their low half, tile
    by tile along a row of tiles; `starts` [tiles + 1] where each tile's begin. The plain reference of a kernel that
    expands a tile in on-chip memory while another is multiplied. Runs on the meta device. Gradients reach x, never the weights.
    """

    entries: Tensor
    starts: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        nonzeros: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.down, self.across = -(-outputs // DOWN), -(-inputs // ACROSS)  # tiles
        self.register_buffer("entries", torch.zeros(nonzeros, dtype=torch.int32, device=device))
        self.register_buffer("starts", torch.zeros(self.down * self.across + 1, dtype=torch.int32, device=device))
        self.bias = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def like(cls, linear: nn.Linear, nonzeros: int) -> Self:
        """The structure for a linear layer, with its bias and without weights."""
        weight = linear.weight
        return cls(linear.in_features, linear.out_features, nonzeros, linear.bias is not None, weight.device, weight.dtype)

    @classmethod
    def of(cls, linear: nn.Linear, nonzeros: int) -> Self:
        """The layer with the `nonzeros` largest weights of a plain one, as bf16, and its bias."""
        layer, weight = cls.like(linear, nonzeros), linear.weight.detach()
        if weight.is_meta:
            return layer
        kept = weight.abs().flatten().topk(nonzeros).indices
        row, column = kept // layer.in_features, kept % layer.in_features
        tile = row // DOWN * layer.across + column // ACROSS
        place = row % DOWN * ACROSS + column % ACROSS
        order = (tile * DOWN * ACROSS + place).argsort()
        values = weight.flatten()[kept].bfloat16().view(torch.int16).int()
        layer.entries.copy_((values << 16 | place.int())[order])
        layer.starts[1:] = torch.bincount(tile, minlength=len(layer.starts) - 1).cumsum(0)
        if layer.bias is not None:
            layer.bias.data.copy_(linear.bias.detach())
        return layer

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K], zeros included."""
        return self._expanded(0, self.down, dtype)

    def graph_op(self, name: str, rows: int, act: DType) -> Op:
        """What capture writes down for this layer."""
        dims = {"rows": rows, "inputs": self.in_features, "outputs": self.out_features, "bias": int(self.bias is not None)}
        return Op(name, "linear", dims, act=act, weight=csl(self.in_features, self.out_features, len(self.entries)))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return x.new_empty(*x.shape[:-1], self.out_features)
        at_once = max(1, CHUNK // (DOWN * self.in_features))
        bands = range(0, self.down, at_once)
        y = torch.cat([x @ self._expanded(i, min(i + at_once, self.down), x.dtype).T for i in bands], -1)
        return y if self.bias is None else y + self.bias

    def _expanded(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """The outputs of some rows of tiles."""
        starts = self.starts[first * self.across : last * self.across + 1].long()
        entries = self.entries[starts[0] : starts[-1]]
        tile = torch.repeat_interleave(starts.diff())
        place = (entries & 0xFFFF).long()
        row = tile // self.across * DOWN + place // ACROSS
        column = tile % self.across * ACROSS + place % ACROSS
        whole = torch.zeros((last - first) * DOWN, self.across * ACROSS, dtype=dtype, device=entries.device)
        whole[row, column] = (entries >> 16).to(torch.int16).view(torch.bfloat16).to(dtype)
        return whole[: self.out_features - first * DOWN, : self.in_features]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, nonzeros={len(self.entries)}"
