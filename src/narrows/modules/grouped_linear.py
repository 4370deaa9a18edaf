"""A linear layer with grouped n:m weights: of each m outputs an input has weights for n, in patterns that the kernel knows.

Plain n:m leaves every input its own choice of n, which a kernel must look up for every weight. Here inputs are sorted into
chunks of C(m, n) x g, and within a chunk each of the C(m, n) patterns has g inputs: code for each pattern is laid out once.
"""

from itertools import combinations
from typing import Any, Self

import torch
from torch import Tensor, nn

from narrows.errors import NarrowsError
from narrows.graph import DType, Op
from narrows.modules.grouping import Grouping
from narrows.modules.sparse_linear import check_input, in_parts, kernels


def sparsify(weight: Tensor, form: Grouping) -> tuple[Tensor, Tensor]:
    """(columns [N/m, chunks, inputs of a chunk], values [..., n]) of a matrix [N, K]: which weights stay, largest ones first.

    Inputs of a chunk are given to patterns greedily, by how much of their magnitude the pattern keeps, until it has g.
    """
    blocks = weight.detach().unflatten(0, (-1, form.m)).unflatten(2, (-1, form.chunk)).permute(0, 2, 3, 1)  # [N/m, C, size, m]
    patterns = _patterns(form)
    gain = blocks.abs()[..., patterns].sum(-1).flatten(0, 1)  # [blocks, size, patterns]
    order = gain.flatten(1).argsort(1, descending=True)
    every = torch.arange(len(gain))
    chosen = torch.full(gain.shape[:2], -1)
    room = torch.full((len(gain), len(patterns)), form.g)
    for place in order.unbind(1):
        one, pattern = place // len(patterns), place % len(patterns)
        fits = (chosen[every, one] < 0) & (room[every, pattern] > 0)
        chosen[every, one] = torch.where(fits, pattern, chosen[every, one])
        room[every, pattern] -= fits.long()
    # all inputs of the first pattern, then of the next; the kernel takes one of each pattern in turn
    columns = chosen.argsort(dim=1, stable=True).unflatten(1, (len(patterns), form.g)).transpose(1, 2).flatten(1)
    columns = columns.unflatten(0, blocks.shape[:2])
    picked = blocks.gather(2, columns[..., None].expand(*columns.shape, form.m))
    values = picked.gather(3, patterns.repeat(form.g, 1).expand(*columns.shape, form.n))
    return columns.to(torch.uint8), values


def _patterns(form: Grouping) -> Tensor:
    """The patterns of n of m outputs, in the kernel's order: [C(m, n), n]."""
    return torch.tensor(list(combinations(range(form.m), form.n)))


class _Product(torch.autograd.Function):  # type: ignore[misc]
    """y = x W^T + b for x [M, K]; backward it is the dense matrix, and the gradients of what is kept."""

    @staticmethod
    def forward(context: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: "GroupedLinear") -> Tensor:
        code, form, x = kernels(), layer.form, x.contiguous()
        context.save_for_backward(x, values)
        context.layer = layer
        y = x.new_empty(len(x), layer.out_features)

        def run(first: int, last: int) -> None:
            scratch = x.new_empty(code.tile_rows(), layer.in_features + layer.out_features)
            sizes = (last - first, layer.in_features, layer.out_features)
            weights = (layer.columns.data_ptr(), values.data_ptr(), None if bias is None else bias.data_ptr())
            places = [t.data_ptr() for t in (x[first:], y[first:], scratch)]
            code.grouped_forward(form.n, form.m, form.g, form.chunk, *weights, *sizes, *places)

        in_parts(len(x), run)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(context: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, values = context.saved_tensors
        places = context.layer.places
        dense = values.new_zeros(dy.shape[1] * x.shape[1]).index_put((places,), values).view(dy.shape[1], x.shape[1])
        return dy @ dense, (dy.T @ x).flatten()[places], dy.sum(0) if context.needs_input_grad[2] else None, None


class GroupedLinear(nn.Module):  # type: ignore[misc]
    """y = x W^T + b with grouped n:m weights: [..., K] to [..., N], fp32 on the CPU.

    `values` [N/m, K/size, size, n] are the weights that are kept, `columns` the place of each input in its chunk. Runs on the
    meta device. Raises NarrowsError for other numbers than fp32.
    """

    columns: Tensor

    def __init__(
        self, inputs: int, outputs: int, form: Grouping, bias: bool = False, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.form = inputs, outputs, form
        shape = (outputs // form.m, inputs // form.chunk, form.chunk)
        self.values = nn.Parameter(torch.empty(*shape, form.n, device=device))
        self.register_buffer("columns", torch.zeros(shape, dtype=torch.uint8, device=device))
        self.bias = nn.Parameter(torch.empty(outputs, device=device)) if bias else None

    @classmethod
    def of(cls, linear: nn.Linear, form: Grouping) -> Self:
        """The layer with the largest weights of a plain one that the form allows, and its bias."""
        layer = cls(linear.in_features, linear.out_features, form, linear.bias is not None, linear.weight.device)
        if linear.weight.is_meta:
            return layer
        columns, values = sparsify(linear.weight, form)
        layer.columns.copy_(columns)
        layer.values.data.copy_(values)
        if layer.bias is not None:
            layer.bias.data.copy_(linear.bias.detach())
        return layer

    @property
    def places(self) -> Tensor:
        """Where each of `values` stands in the flattened matrix [N, K]."""
        blocks, chunks, size = self.columns.shape
        inputs = torch.arange(chunks)[:, None] * size + self.columns.long()
        outputs = torch.arange(blocks)[:, None, None, None] * self.form.m + _patterns(self.form).repeat(self.form.g, 1)
        return outputs * self.in_features + inputs[..., None]

    @property
    def weight(self) -> Tensor:
        """The plain reference: the matrix [N, K], zeros included."""
        dense = self.values.detach().new_zeros(self.out_features * self.in_features)
        return dense.index_put((self.places,), self.values.detach()).view(self.out_features, self.in_features)

    def graph_op(self, name: str, rows: int, act: DType) -> Op:
        """What capture writes down for this layer."""
        sizes = {"rows": rows, "inputs": self.in_features, "outputs": self.out_features, "nonzeros": self.values.numel()}
        return Op(name, "sparse", {**sizes, "bias": int(self.bias is not None)}, act=act, weight=self.form.stored)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return x.new_empty(*x.shape[:-1], self.out_features)
        check_input(x, self.values, self.in_features)
        if int(self.columns.max()) >= self.form.chunk:
            raise NarrowsError("its columns lie outside of their chunk.", where="grouped linear", remedy="Load it again.")
        y = _Product.apply(x.reshape(-1, self.in_features), self.values, self.bias, self)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.form.stored.name}"
