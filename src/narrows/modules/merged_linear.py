"""Training with weights in 4 bits: a frozen packed matrix and a low-rank part that is trained and merged into it at times."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from narrows.graph import DType
from narrows.modules.packed_linear import PackedLinear, quantized

# Turns of rounding the matrix and fitting B to what rounding left out, fewer where they no longer help.
ROUNDS = 5


class _Product(torch.autograd.Function):  # type: ignore[misc]
    """y = x (W + P B)^T; only x is kept for the backward pass, which unpacks W again and may look at W's own gradient."""

    @staticmethod
    def forward(context: Any, x: Tensor, factor: Tensor, layer: "MergedLinear") -> Tensor:
        context.save_for_backward(x, factor)
        context.layer = layer
        return x @ plain(layer.base, x.dtype).T + (x @ factor.T) @ plain(layer.projector, x.dtype).T

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(context: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, factor), layer = context.saved_tensors, context.layer
        if layer.due:
            layer.look(dy.T @ x)
        narrow = dy @ plain(layer.projector, dy.dtype)
        return dy @ plain(layer.base, dy.dtype) + narrow @ factor, narrow.T @ x, None


class MergedLinear(nn.Module):  # type: ignore[misc]
    """y = x (W + P B)^T + b: [..., K] to [..., N]; W [N, K] and P [N, r] are frozen, in 4 bits or plain, and B [r, K] is trained.

    Where `due`, a backward pass finds the P along which the loss falls fastest; `merge` then takes P B into W and starts
    anew with it. Before the first merge P and B are zero, and W is plain: nothing is lost that B could have made up for.
    """

    def __init__(self, linear: nn.Linear, rank: int, form: DType | None) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features, self.form, self.due = linear.in_features, linear.out_features, form, True
        self.base = kept(weight)
        self.projector = kept(weight.new_zeros(len(weight), rank), form)
        self.factor = nn.Parameter(weight.new_zeros(rank, weight.shape[1]))
        self.bias = linear.bias
        self._found: Tensor | None = None

    @property
    def change(self) -> Tensor:
        """P B [N, K] in fp32."""
        return plain(self.projector) @ self.factor.detach().float()

    @property
    def weight(self) -> Tensor:
        """The matrix [N, K] that the layer multiplies with, in fp32."""
        return plain(self.base) + self.change

    def look(self, gradient: Tensor) -> None:
        """Find the left singular vectors of a gradient [N, K], the sum of all replicas'; the first batch of a step decides."""
        if self._found is None:
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(gradient)
            self._found = torch.linalg.svd(gradient.float(), full_matrices=False).U[:, : len(self.factor)]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def merge(self) -> None:
        """Take P B into W, in 4 bits again; B begins as what makes up best for the rounding along the new P.

        Without a new P everything stays.
        """
        if self._found is None:
            return
        whole, self.projector = self.weight, kept(self._found.to(self.factor), self.form)
        self._found = None
        spread = plain(self.projector)
        inverse, factor, least = torch.linalg.pinv(spread), torch.zeros_like(self.factor, dtype=torch.float32), torch.inf
        for _ in range(ROUNDS):
            base = kept((whole - spread @ factor).to(self.factor.dtype), self.form)
            missing = whole - plain(base)
            factor = inverse @ missing
            error = float((missing - spread @ factor).norm())
            if error >= least:
                break
            least, self.base = error, base
            self.factor.copy_(factor)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *others: Any) -> None:
        """Take the structure of what is loaded: a run that is resumed has merged before."""
        if self.form and f"{prefix}base.packed" in state_dict and not isinstance(self.base, PackedLinear):
            self.base = kept(plain(self.base), self.form)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x.reshape(-1, self.in_features), self.factor, self)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


def kept(matrix: Tensor, form: DType | None = None) -> nn.Module:
    """A frozen matrix [N, K] as a linear layer, packed in a format or plain."""
    if form:
        return PackedLinear.of(quantized(matrix, form))
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(matrix.detach().clone(), requires_grad=False)
    return layer


def plain(layer: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix of such a layer, unpacked."""
    return layer.codes.weight(dtype) if isinstance(layer, PackedLinear) else layer.weight.to(dtype)


class MergingAdam(torch.optim.Adam):  # type: ignore[misc]
    """Adam that merges layers after its first step, and again after `gap + growth ** i` steps more, i counting the merges.

    gap 0: the first P stays. The moments of B are kept: the directions of largest gradient change little at a time.
    """

    def __init__(self, model: nn.Module, gap: int, growth: float, lr: float = 1e-3, speed: float = 1.0, **options: Any) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, MergedLinear)]
        factors = [layer.factor for layer in self.layers]
        theirs = {id(p) for p in factors}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in theirs]
        groups = [{"params": params, "lr": rate} for params, rate in ((factors, lr * speed), (others, lr)) if params]
        super().__init__(groups, lr=lr, **options)
        self.gap, self.growth = gap, growth
        self.param_groups[0].update(taken=0, merges=0, merge_at=1)  # here `state_dict` keeps them

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update, and merge where it is time."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        now = self.param_groups[0]
        if not now["taken"]:  # the matrices are plain so far: pack them before Adam makes its states
            self._merge()
        super().step()
        now["taken"] += 1
        if now["taken"] == now["merge_at"]:
            self._merge()
            now["merges"] += 1
            now["merge_at"] += round(self.gap + self.growth ** now["merges"]) if self.gap else 0
        self._ask()
        return loss

    def _merge(self) -> None:
        for layer in self.layers:
            layer.merge()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._ask()

    def _ask(self) -> None:
        now = self.param_groups[0]
        for layer in self.layers:
            layer.due = now["taken"] + 1 == now["merge_at"]
