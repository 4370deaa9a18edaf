"""A linear layer whose weights are indices into codebooks that groups of similar outputs share, and how both are learned."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from narrows.errors import NarrowsError
from narrows.graph import DType, Op
from narrows.modules.coded_matrix import CodedMatrix, joined, segments

BINS = 512  # of the histogram that k-means runs on: beyond it codewords move by less than a bf16 step
ROUNDS = 25  # of k-means


@dataclass(frozen=True)
class Codebooks:
    """A matrix as indices: weight[order[g * R + r], k] = books[g, codes[g * R + r, k]].

    codes [N, K] uint8, the outputs sorted so that R alike ones follow each other; books [G, 2 ** bits] ascending;
    order [N] the output that each row of codes belongs to.
    """

    codes: Tensor
    books: Tensor
    order: Tensor

    def sorted_weight(self) -> Tensor:
        """The matrix [N, K] in the order of the codes."""
        grouped = self.codes.view(len(self.books), -1).long()
        return self.books.gather(1, grouped).view(self.codes.shape)

    def weight(self) -> Tensor:
        """The plain reference: the matrix [N, K] in the layer's own order."""
        return torch.empty_like(self.sorted_weight()).index_copy_(0, self.order, self.sorted_weight())


def clustered(weight: Tensor, bits: int, rows: int) -> Codebooks:
    """Outputs sorted by their spread, cut into groups of `rows` (0: one group in its own order), and k-means in each."""
    weight = weight.detach().float()
    order = weight.square().mean(1).argsort() if rows else torch.arange(len(weight))
    grouped = weight[order].view(-1, (rows or len(weight)) * weight.shape[1])
    books = _k_means(grouped, 2**bits)
    return Codebooks(_nearest(grouped, books).view(weight.shape).to(torch.uint8), books, order)


def _k_means(values: Tensor, count: int) -> Tensor:
    """Codewords [G, count], ascending, nearest in square to the values [G, n] of each row: Lloyd's rounds on a histogram."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    step = ((high - low) / BINS).clamp(min=1e-12)
    place = ((values - low) / step).long().clamp(max=BINS - 1)
    mass = torch.zeros(len(values), BINS).scatter_add_(1, place, torch.ones_like(values))
    total = torch.zeros(len(values), BINS).scatter_add_(1, place, values)
    shares = mass.cumsum(1) / mass.sum(1, keepdim=True)
    quantiles = ((torch.arange(count) + 0.5) / count).expand(len(values), -1).contiguous()
    books = low + step * (torch.searchsorted(shares, quantiles) + 0.5)
    centres = low + step * (torch.arange(BINS) + 0.5)
    for _ in range(ROUNDS):
        near = _nearest(centres, books)
        held = torch.zeros_like(books).scatter_add_(1, near, mass)
        books = torch.where(held > 0, torch.zeros_like(books).scatter_add_(1, near, total) / held.clamp(min=1), books)
        books = books.sort(1).values
    return books


def _nearest(values: Tensor, books: Tensor) -> Tensor:
    """The index of the nearest of each row's ascending codewords."""
    return torch.searchsorted((books[:, 1:] + books[:, :-1]) / 2, values.contiguous())


def learned(start: Codebooks, weight: Tensor, moments: Tensor, steps: int, proximal: bool = True) -> Codebooks:
    """Codebooks and indices that change the outputs less, learned together by gradients of the outputs' square error.

    moments: the second moments [K, K] of the layer's inputs. Every weight has a latent value whose nearest codeword it
    takes; the gradient to its codeword passes straight through to it. `proximal` lets an index move by one in a step and
    passes the less the farther the next codeword is; without it the gradient passes whole and any codeword can be next.
    The best of all steps is kept, so that the result is never worse than the start.
    """
    target = weight.detach().float()[start.order]
    groups, count = start.books.shape
    books, codes = start.books.clone(), start.codes.view(groups, -1).long()
    latent = target.view(groups, -1).clone()
    spread = latent.std(1, keepdim=True).clamp(min=1e-12)
    pace = 1 / float(torch.linalg.eigvalsh(moments)[-1].clamp(min=1e-20))  # of gradient descent on this square error
    best, least = start, float("inf")
    for step in range(steps + 1):
        here = books.gather(1, codes)
        off = here.view(target.shape) - target
        gradient = off @ moments
        error = float((gradient * off).sum())
        if error < least:
            best, least = Codebooks(codes.view(target.shape).to(torch.uint8), books, start.order), error
        if step == steps:
            break
        slope = gradient.view(groups, -1) * pace
        held = torch.zeros_like(books).scatter_add_(1, codes, torch.ones_like(slope))
        pull = torch.zeros_like(books).scatter_add_(1, codes, slope)
        moved = (books - pull / held.clamp(min=1)).sort(1).values
        if proximal:
            ahead = (codes - slope.sign().long()).clamp(0, count - 1)
            distance = (books.gather(1, ahead) - here).abs() / spread
            slope = slope / (1 + distance)
        latent -= slope
        near = _nearest(latent, moved)
        codes = torch.maximum(torch.minimum(near, codes + 1), codes - 1) if proximal else near
        books = moved
    return best


class CodebookLinear(nn.Module):  # type: ignore[misc]
    """y = x W^T + b with W kept as indices into 16-bit codebooks of `rows` outputs each: [..., K] to [..., N] in x's dtype.

    Codewords are bf16 numbers kept as raw bits (int16), so that `module.to(dtype)` leaves them.
    Gradients reach x, never the weights. Runs on the meta device.
    """

    books: Tensor
    order: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        form: DType,
        rows: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if outputs % rows or inputs % 8 or outputs >= 2**15:
            problem = f"{outputs} outputs of {inputs} inputs do not pack in groups of {rows}."
            raise NarrowsError(problem, where="CodebookLinear", remedy="Choose a group that divides the outputs.")
        self.in_features, self.out_features, self.form, self.rows = inputs, outputs, form, rows
        bits = round(form.bits)
        for width, packed in segments(torch.empty(outputs, inputs, dtype=torch.uint8, device="meta"), bits).items():
            self.register_buffer(f"bits{width}", torch.empty(packed.shape, dtype=torch.uint8, device=device))
        self.register_buffer("books", torch.empty(outputs // rows, 2**bits, dtype=torch.int16, device=device))
        self.register_buffer("order", torch.empty(outputs, dtype=torch.int16, device=device))
        self.bias = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def of(cls, found: Codebooks, form: DType, bias: Tensor | None = None) -> Self:
        """The layer of given codebooks."""
        outputs, inputs = found.codes.shape
        dtype = None if bias is None else bias.dtype
        layer = cls(inputs, outputs, form, outputs // len(found.books), bias is not None, found.codes.device, dtype)
        for width, packed in segments(found.codes, round(form.bits)).items():
            setattr(layer, f"bits{width}", packed)
        layer.books = found.books.to(torch.bfloat16).view(torch.int16)
        layer.order = found.order.to(torch.int16)
        if layer.bias is not None and bias is not None:
            layer.bias.data.copy_(bias.detach())
        return layer

    @property
    def matrix(self) -> CodedMatrix:
        """What it multiplies by, its outputs in the order of the codes."""
        parts = tuple(t[None] for name, t in self._buffers.items() if name.startswith("bits"))
        return CodedMatrix(self.out_features, self.in_features, parts, round(self.form.bits), self.books, None)

    @property
    def codebooks(self) -> Codebooks:
        """What it keeps, unpacked."""
        matrix = self.matrix
        return Codebooks(joined(matrix.codes, matrix.bits)[0], self.books.view(torch.bfloat16).float(), self.order.long())

    def graph_op(self, name: str, rows: int, act: DType) -> Op:
        """What capture writes down for this layer."""
        dims = {"rows": rows, "inputs": self.in_features, "outputs": self.out_features, "bias": int(self.bias is not None)}
        return Op(name, "linear", dims, act=act, weight=self.form)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return x.new_empty(*x.shape[:-1], self.out_features)
        y = self.matrix.multiply(x.reshape(-1, self.in_features))
        y = torch.empty_like(y).index_copy(1, self.order.long(), y)
        y = y if self.bias is None else y + self.bias.to(x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.form.name}, rows={self.rows}"
