"""A linear layer that keeps and multiplies its nonzero weights alone, forward and backward, in a kernel for this CPU."""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from narrows.errors import NarrowsError
from narrows.graph import DType, Op
from narrows.modules import compiled
from narrows.modules.linears import csr


@cache
def kernels() -> ctypes.CDLL:
    """The C code beside this file, compiled on first use; raises NarrowsError without a compiler."""
    code = compiled.library("sparse_linear", "sparse linear")
    numbers, addresses = [ctypes.c_int64] * 3, ctypes.c_void_p
    code.sparse_forward.argtypes = [addresses] * 3 + numbers + [addresses] * 3
    code.sparse_backward.argtypes = [addresses] * 3 + numbers + [addresses] * 5
    code.grouped_forward.argtypes = [ctypes.c_int64] * 4 + [addresses] * 3 + numbers + [addresses] * 3
    code.sparse_forward.restype = code.sparse_backward.restype = code.grouped_forward.restype = None
    code.tile_rows.restype = ctypes.c_int64
    return code


def in_parts(rows: int, run: Callable[[int, int], None]) -> None:
    """Call run(first, last) for whole tiles of rows, split over torch's threads."""
    compiled.in_parts(0, rows, kernels().tile_rows(), torch.get_num_threads(), run)


def check_input(x: Tensor, values: Tensor, inputs: int) -> None:
    """Refuse what a kernel would misread: it takes fp32 on the CPU, and as many numbers a row as it has inputs."""
    if x.dtype != torch.float32 or values.dtype != torch.float32 or x.device.type != "cpu":
        problem = f"its inputs are {x.dtype} on {x.device}, its weights {values.dtype}."
        raise NarrowsError(problem, where="sparse linear", remedy="Keep the model in fp32 on the CPU.")
    if x.shape[-1] != inputs:
        remedy = f"Give {inputs} numbers a row."
        raise NarrowsError(f"its inputs have shape {tuple(x.shape)}.", where="sparse linear", remedy=remedy)


class _Product(torch.autograd.Function):  # type: ignore[misc]
    """y = x W^T for x [M, K] and the nonzeros of W; the backward pass makes both gradients in one pass over them."""

    @staticmethod
    def forward(context: Any, x: Tensor, values: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
        code, x, outputs = kernels(), x.contiguous(), len(starts) - 1
        context.save_for_backward(x, values, starts, columns)
        y = x.new_empty(len(x), outputs)
        pattern = (starts.data_ptr(), columns.data_ptr(), values.data_ptr())

        def run(first: int, last: int) -> None:
            scratch = x.new_empty(code.tile_rows(), x.shape[1] + outputs)
            sizes = (last - first, x.shape[1], outputs)
            code.sparse_forward(*pattern, *sizes, x[first:].data_ptr(), y[first:].data_ptr(), scratch.data_ptr())

        in_parts(len(x), run)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(context: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        code, dy, outputs = kernels(), dy.contiguous(), dy.shape[1]
        x, values, starts, columns = context.saved_tensors
        dx, dvalues = torch.empty_like(x), []
        pattern = (starts.data_ptr(), columns.data_ptr(), values.data_ptr())

        def run(first: int, last: int) -> None:
            scratch, sums = x.new_empty(code.tile_rows(), 2 * x.shape[1] + outputs), torch.zeros_like(values)
            places = [t.data_ptr() for t in (x[first:], dy[first:], dx[first:], sums, scratch)]
            code.sparse_backward(*pattern, last - first, x.shape[1], outputs, *places)
            dvalues.append(sums)

        in_parts(len(x), run)
        return dx, sum(dvalues[1:], dvalues[0]), None, None


class SparseLinear(nn.Module):  # type: ignore[misc]
    """y = x W^T + b with only the nonzeros of W kept and trained: [..., K] to [..., N], fp32 on the CPU.

    `values` are the nonzeros, output by output, `columns` the input of each, `starts` [N + 1] where each output's begin.
    Which weights are zero stays as it is. Runs on the meta device. Raises NarrowsError for other numbers than fp32.
    """

    columns: Tensor
    starts: Tensor

    def __init__(
        self, inputs: int, outputs: int, nonzeros: int, bias: bool = False, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.values = nn.Parameter(torch.empty(nonzeros, device=device))
        self.register_buffer("columns", torch.zeros(nonzeros, dtype=torch.int32, device=device))
        self.register_buffer("starts", torch.zeros(outputs + 1, dtype=torch.int32, device=device))
        self.bias = nn.Parameter(torch.empty(outputs, device=device)) if bias else None
        self._trusted: tuple[int, ...] = ()  # the pattern that was last found to lie inside the matrix

    @classmethod
    def of(cls, linear: nn.Linear, nonzeros: int) -> Self:
        """The layer with the `nonzeros` largest weights of a plain one, and its bias."""
        weight = linear.weight.detach()
        outputs, inputs = weight.shape
        layer = cls(inputs, outputs, nonzeros, linear.bias is not None, weight.device)
        if weight.is_meta:
            return layer
        kept = weight.abs().flatten().topk(nonzeros).indices.sort().values
        layer.values.data.copy_(weight.flatten()[kept])
        layer.columns.copy_(kept % inputs)
        layer.starts[1:] = torch.bincount(kept // inputs, minlength=outputs).cumsum(0)
        if layer.bias is not None:
            layer.bias.data.copy_(linear.bias.detach())
        return layer

    @property
    def outputs_of_values(self) -> Tensor:
        """The output that each nonzero belongs to."""
        counts = self.starts.diff().long()
        return torch.repeat_interleave(torch.arange(self.out_features, device=counts.device), counts)

    @property
    def weight(self) -> Tensor:
        """The plain reference: the matrix [N, K], zeros included."""
        dense = self.values.detach().new_zeros(self.out_features, self.in_features)
        dense[self.outputs_of_values, self.columns.long()] = self.values.detach()
        return dense

    def graph_op(self, name: str, rows: int, act: DType) -> Op:
        """What capture writes down for this layer."""
        nonzeros = self.values.numel()
        sizes = {"rows": rows, "inputs": self.in_features, "outputs": self.out_features, "nonzeros": nonzeros}
        form = csr(self.out_features, nonzeros)
        return Op(name, "sparse", {**sizes, "bias": int(self.bias is not None)}, act=act, weight=form)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return x.new_empty(*x.shape[:-1], self.out_features)
        check_input(x, self.values, self.in_features)
        self._check_pattern()
        y = _Product.apply(x.reshape(-1, self.in_features), self.values, self.starts, self.columns)
        y = y if self.bias is None else y.add_(self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _check_pattern(self) -> None:
        """Refuse a damaged pattern before the kernel follows it out of the matrix; once for each pattern."""
        now = tuple(n for t in (self.columns, self.starts) for n in (t.data_ptr(), t._version))
        if now == self._trusted:
            return
        low, high = self.columns.aminmax()
        ordered = self.starts[0] == 0 and self.starts[-1] == len(self.values) and bool((self.starts.diff() >= 0).all())
        if low < 0 or high >= self.in_features or not ordered or len(self.columns) != len(self.values):
            problem = "its pattern of nonzeros lies outside of the matrix."
            raise NarrowsError(problem, where="sparse linear", remedy="Load it again from an undamaged file.")
        self._trusted = now

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, nonzeros={self.values.numel()}"
