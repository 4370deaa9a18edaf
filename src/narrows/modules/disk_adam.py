"""Adam whose states lie in files and are read, updated and written a parameter at a time, after or during the backward pass."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def disk_adam(model: "torch.nn.Module", folder: Path, early: bool = True, **options: Any) -> "torch.optim.Optimizer":
    """An optimizer that gives the weights of `torch.optim.Adam(model.parameters(), **options)`, its states in `folder`.

    Of a parameter that several ranks share, each keeps the states of its part; `recall` brings states back into memory.

    early: each parameter is updated as soon as its gradient is complete, and the gradient is freed; `step` then does
    nothing. Otherwise `step` updates them all.
    """
    import torch
    from torch.distributed.tensor import DTensor

    def local(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    class DiskAdam(torch.optim.Adam):  # type: ignore[misc]
        """Holds the states of the parameter that is updated, and no other."""

        @torch.no_grad()  # type: ignore[untyped-decorator]
        def update(self, index: int, parameter: torch.Tensor) -> None:
            self.recall(index, parameter)
            waiting = {p: p.grad for p in every if p is not parameter}
            for other in waiting:
                other.grad = None
            super().step()
            for other, gradient in waiting.items():
                other.grad = gradient
            parameter.grad = None
            state = self.state.pop(parameter)
            parts = [local(state[name]).flatten() for name in ("step", "exp_avg", "exp_avg_sq")]
            torch.cat(parts).numpy().tofile(folder / f"{index}.state")

        def recall(self, index: int, parameter: torch.Tensor) -> None:
            path, part = folder / f"{index}.state", local(parameter.detach())
            if path.exists():
                count, *moments = np.split(np.fromfile(path, part.numpy().dtype), [1, 1 + part.numel()])
                self.state[parameter] = {"step": torch.tensor(float(count[0]))}
                for name, values in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                    self.state[parameter][name] = state = torch.empty_like(parameter, requires_grad=False)
                    local(state).copy_(torch.from_numpy(values).view_as(part))

        def step(self, closure: Any = None) -> None:
            for index, parameter in enumerate(every):
                if parameter.grad is not None:
                    self.update(index, parameter)

    every = [p for p in model.parameters() if p.requires_grad]
    optimizer = DiskAdam(every, **options)
    if early:
        for index, parameter in enumerate(every):
            parameter.register_post_accumulate_grad_hook(lambda p, i=index: optimizer.update(i, p))
    return optimizer
