"""Adam whose states lie in files and are read, updated and written a parameter at a time, after or during the backward pass."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def disk_adam(model: "torch.nn.Module", folder: Path, early: bool = True, **options: Any) -> "torch.optim.Optimizer":
    """An optimizer that gives the weights of `torch.optim.Adam(model.parameters(), **options)`, its states in `folder`.

    early: each parameter is updated as soon as its gradient is complete, and the gradient is freed; `step` then does
    nothing. Otherwise `step` updates them all.
    """
    import torch

    class DiskAdam(torch.optim.Adam):  # type: ignore[misc]
        """Holds the states of the parameter that is updated, and no other."""

        @torch.no_grad()  # type: ignore[untyped-decorator]
        def update(self, index: int, parameter: torch.Tensor) -> None:
            path = folder / f"{index}.state"
            if path.exists():
                count, first, second = np.split(np.fromfile(path, np.float32), [1, 1 + parameter.numel()])
                self.state[parameter] = {
                    "step": torch.tensor(float(count[0])),
                    "exp_avg": torch.from_numpy(first).view_as(parameter),
                    "exp_avg_sq": torch.from_numpy(second).view_as(parameter),
                }
            waiting = {p: p.grad for p in every if p is not parameter}
            for other in waiting:
                other.grad = None
            super().step()
            for other, gradient in waiting.items():
                other.grad = gradient
            parameter.grad = None
            state = self.state.pop(parameter)
            parts = [state["step"].reshape(1), state["exp_avg"].flatten(), state["exp_avg_sq"].flatten()]
            torch.cat(parts).numpy().tofile(path)

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
