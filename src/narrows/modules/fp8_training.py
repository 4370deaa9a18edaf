"""What training keeps, in 8-bit floats: Adam's states with their range stretched to the format's, and saved activations."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from narrows.modules.linears import is_output

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = 448.0
RANGE = LARGEST / 2.0**-9  # of E4M3: its largest number over its smallest
MOST_POWER = 64.0  # of a group of equal numbers, which has no range to stretch
LEAST = 2.0**-100  # the scale of a group of zeros
_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")


@dataclass(frozen=True)
class Packed:
    """E4M3 codes [G, g] of a tensor cut into G groups, each with its largest number and, where stretched, its power (bf16)."""

    codes: Tensor
    top: Tensor
    power: Tensor | None
    shape: torch.Size
    dtype: torch.dtype

    def numbers(self) -> Tensor:
        """The tensor that the codes stand for."""
        x = self.codes.float() / LARGEST
        if self.power is not None:
            x = x.sign() * x.abs() ** (1 / self.power.float())
        return (x * self.top.float()).flatten()[: self.shape.numel()].view(self.shape).to(self.dtype)


def packed(x: Tensor, group: int = 0, expand: bool = False) -> Packed:
    """A tensor of any shape in E4M3 with one scale for every `group` numbers in a row (0: for all).

    expand: sizes are first raised to the power at which the group's range, largest over smallest, is the format's.
    """
    flat = x.detach().float().flatten()
    flat = nn.functional.pad(flat, (0, -len(flat) % group)).view(-1, group) if group else flat[None]
    size = flat.abs()
    top = size.amax(1, keepdim=True).clamp(min=LEAST).bfloat16()
    share = size / top.float()
    power = None
    if expand:
        least = torch.where(share > 0, share, 1).amin(1, keepdim=True)
        power = (math.log(RANGE) / -least.clamp(max=1 - 1e-6).log()).clamp(max=MOST_POWER).bfloat16()
        share = share ** power.float()
    codes = (share * LARGEST).clamp(max=LARGEST).copysign(flat).to(E4M3)
    return Packed(codes, top, power, x.shape, x.dtype)


class ExpandedAdamW(torch.optim.Optimizer):  # type: ignore[misc]
    """AdamW with both moments in E4M3, a scale and a power for each `group` numbers (0: both stay fp32).

    Parameters that are not fp32 get a copy that is, which is updated. Options as of torch.optim.AdamW.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        group: int = 128,
        expand: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.group, self.expand = group, expand

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for options in self.param_groups:
            for parameter in options["params"]:
                if parameter.grad is not None:
                    self._update(parameter, options)
        return loss

    def _update(self, parameter: Tensor, options: dict[str, Any]) -> None:
        state, (first, second), rate = self.state[parameter], options["betas"], options["lr"]
        gradient, count = parameter.grad.float(), state.get("step", 0) + 1  # type: ignore[union-attr]
        mean, square = self.moments(parameter)
        mean = mean.lerp(gradient, 1 - first)
        square = square.lerp(gradient.square(), 1 - second)
        weight = state.setdefault("master", parameter.float()) if parameter.dtype != torch.float32 else parameter
        size = (square / (1 - second**count)).sqrt_().add_(options["eps"])
        weight.mul_(1 - rate * options["weight_decay"]).addcdiv_(mean, size, value=-rate / (1 - first**count))
        if weight is not parameter:
            parameter.copy_(weight)
        state["step"] = count
        for name, moment in (("mean", mean), ("square", square)):
            if not self.group:
                state[name] = moment
                continue
            kept = packed(moment, self.group, self.expand)
            state.update({name: kept.codes, f"{name} top": kept.top, f"{name} power": kept.power})

    def moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """Both moments of a parameter as fp32 numbers; zeros before its first step."""
        state = self.state[parameter]
        if "mean" not in state:
            return torch.zeros_like(parameter, dtype=torch.float32), torch.zeros_like(parameter, dtype=torch.float32)
        if not self.group:
            return state["mean"], state["square"]

        def read(name: str) -> Tensor:
            kept = (state[name], state[f"{name} top"], state[f"{name} power"])
            return Packed(*kept, parameter.shape, torch.float32).numbers()

        return read("mean"), read("square")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer, which would cast states to the dtype of their parameter: here they keep theirs."""
        super().load_state_dict(state_dict)
        every = [p for options in self.param_groups for p in options["params"]]
        for index, kept in state_dict["state"].items():
            parameter = every[index]
            self.state[parameter] = {
                name: t.to(parameter.device, copy=True) if isinstance(t, Tensor) else t for name, t in kept.items()
            }


_SEEN = WeakTensorKeyDictionary()  # inputs that live, by their packed form: layers that read the same tensor share one


def _shared(x: Tensor) -> Packed:
    version, kept = _SEEN.get(x, (-1, None))
    if version != x._version:
        kept = packed(x)
        _SEEN[x] = x._version, kept
    return kept  # type: ignore[no-any-return]


def _narrow(x: Tensor, form: torch.dtype) -> Tensor:
    """A tensor rounded to an 8-bit float with one scale, in its own dtype."""
    scale = x.detach().abs().amax().float().clamp(min=LEAST) / torch.finfo(form).max
    return ((x.float() / scale).to(form).float() * scale).to(x.dtype)


class _Product(torch.autograd.Function):  # type: ignore[misc]
    """y = x W^T with operands rounded to 8-bit floats in both directions; x is kept in 8 bits, and W as it is."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, kept: Packed) -> Tensor:
        context.save_for_backward(kept.codes, kept.top, weight)
        context.like = x.shape, x.dtype
        return kept.numbers() @ _narrow(weight, E4M3).T

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(context: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        (codes, top, weight), (shape, dtype) = context.saved_tensors, context.like
        dy = _narrow(dy, E5M2)
        x = Packed(codes, top, None, shape, dtype).numbers()
        return dy @ _narrow(weight, E4M3), dy.flatten(0, -2).T @ x.flatten(0, -2), None


class Fp8Linear(nn.Module):  # type: ignore[misc]
    """A linear layer [..., K] to [..., N] that multiplies as 8-bit floats would, and keeps its input in 8 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x, self.weight, _shared(x))
        return y if self.bias is None else y + self.bias


def keep_in_groups(forward: Callable[..., Any], group: int) -> Callable[..., Any]:
    """A function that keeps what its backward pass needs in 8 bits with a scale for every `group` numbers of a row.

    Parameters stay as they are, and so do rows that no whole number of groups makes, like the statistics of a norm.
    """

    def pack(tensor: Tensor) -> Tensor | Packed:
        plain = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) and not isinstance(tensor, nn.Parameter)
        return packed(tensor, group) if plain and tensor.dim() > 1 and not tensor.shape[-1] % group else tensor

    def unpack(kept: Tensor | Packed) -> Tensor:
        return kept.numbers() if isinstance(kept, Packed) else kept

    def changed(*args: Any, **options: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return forward(*args, **options)

    return changed


def train_in_fp8(model: nn.Module, group: int) -> int:
    """Keep what the backward pass needs in 8 bits, in place; gives how many linear layers multiply as 8-bit floats now.

    All but the output layer and those of shared weights, and norms and whatever calls an activation function; attention keeps
    its own. Activations are looked for as modules: transformers' and torch.nn's.
    """
    shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    modules = dict(model.named_modules())
    linears = {
        name: m for name, m in modules.items() if type(m) is nn.Linear and not is_output(name) and id(m.weight) not in shared
    }
    curved = [n for n, m in modules.items() if type(m).__module__ in _ACTIVATIONS and not isinstance(m, nn.MultiheadAttention)]
    callers = {name.rpartition(".")[0] for name in curved} | {name for name, m in modules.items() if "Norm" in type(m).__name__}
    for name in callers:
        module: Any = modules[name]
        module.forward = keep_in_groups(module.forward, group)
    for name, linear in linears.items():
        model.set_submodule(name, Fp8Linear(linear))
    return len(linears)
