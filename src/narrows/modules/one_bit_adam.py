"""The optimizer of 1-bit Adam and the DDP communication hook that goes with it."""

from collections.abc import Callable
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from narrows.errors import NarrowsError
from narrows.modules.sign_exchange import SignMean

_FLAT = ("momentum", "variance")


class OneBitAdamOptimizer(torch.optim.Optimizer):  # type: ignore[misc]
    """Adam for `warmup` steps; then its variance is frozen and the momentum is averaged over ranks in one bit a number.

    Momentum, variance and rounding errors are flat fp32 vectors over all parameters, which all must take part in
    every step. `state_dict` holds this rank's own rounding errors: save one per rank to resume bit-equal.
    `sent_bytes` counts what this rank has sent, an all-reduce as the ring that moves 2 (ranks - 1) / ranks of it.

    The variance is frozen with its bias corrected, and the compressed stage corrects nothing: a short warm-up would
    otherwise leave steps too long. After the thousands of warm-up steps of the paper the two are the same. Parameters
    that had no gradient in all of the warm-up stay where they are.
    """

    def __init__(self, model: DistributedDataParallel, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
                 warmup: int, chunk: int, feedback: bool) -> None:  # fmt: skip
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        super().__init__(self._parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.warmup, self.steps, self.sent_bytes = warmup, 0, 0
        like, elements = self._parameters[0], sum(p.numel() for p in self._parameters)
        self.momentum = torch.zeros(elements, dtype=torch.float32, device=like.device)
        self.variance = torch.zeros_like(self.momentum)
        self.mean = SignMean(elements, chunk, feedback, model.process_group, like)
        model.register_comm_hook(self, _exchange)

    @property
    def compressing(self) -> bool:
        return self.steps >= self.warmup

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update from the gradients that backward left: averaged ones in warm-up, this rank's own afterwards."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        gradient = torch.cat([_gradient(p) for p in self._parameters])
        self.momentum.lerp_(gradient, 1 - beta1)
        correction = 1.0
        if self.compressing:
            self.momentum.copy_(self.mean(self.momentum))
            self.sent_bytes += self.mean.sent_bytes
            denominator = self.variance.sqrt()
        else:
            self.variance.lerp_(gradient.square_(), 1 - beta2)
            unbiased = self.variance / (1 - beta2 ** (self.steps + 1))
            correction, denominator = 1 - beta1 ** (self.steps + 1), unbiased.sqrt()
            if self.steps + 1 == self.warmup:
                unbiased[unbiased == 0] = torch.inf  # no gradient so far: rounding alone would move it, and very far
                self.variance.copy_(unbiased)
        self.steps += 1
        update = self.momentum / correction / denominator.add_(group["eps"])
        for parameter, change in zip(self._parameters, update.split([p.numel() for p in self._parameters]), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change.view_as(parameter), alpha=group["lr"])
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The options, the flat vectors and this rank's rounding errors."""
        flat = {name: getattr(self, name).clone() for name in _FLAT} | {name: error.clone() for name, error in self.mean.errors()}
        return {**super().state_dict(), "flat": flat, "steps": self.steps, "sent_bytes": self.sent_bytes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; raises NarrowsError for another model or another number of ranks."""
        flat = state_dict.get("flat", {})
        here = {name: getattr(self, name) for name in _FLAT} | dict(self.mean.errors())
        for name, tensor in here.items():
            if name not in flat or flat[name].shape != tensor.shape:
                found = tuple(flat[name].shape) if name in flat else "nothing"
                raise NarrowsError(f"{found} for {tuple(tensor.shape)}.", where=f"state_dict: {name}",
                                   remedy="Load what the same rank of an equal run saved.")  # fmt: skip
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for name, tensor in here.items():
            tensor.copy_(flat[name])
        self.steps, self.sent_bytes = state_dict["steps"], state_dict["sent_bytes"]


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        remedy = "Freeze the parameters that the loss does not use."
        raise NarrowsError("a parameter has no gradient.", where="1-bit-adam", remedy=remedy)
    return parameter.grad.reshape(-1).float()


def _exchange(optimizer: OneBitAdamOptimizer, bucket: dist.GradBucket) -> Future[Tensor]:
    """DDP's communication hook: average the gradients in warm-up; afterwards leave them, for the momentum is averaged."""
    gradients, group = bucket.buffer(), optimizer.mean.group
    if optimizer.compressing:
        done: Future[Tensor] = Future()
        done.set_result(gradients)
        return done
    ranks = dist.get_world_size(group)
    optimizer.sent_bytes += 2 * (ranks - 1) * gradients.numel() * gradients.element_size() // ranks
    work = dist.all_reduce(gradients.div_(ranks), group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda reduced: reduced.value()[0])
