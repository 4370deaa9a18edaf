"""Images from noise by a flow-matching transformer of FLUX's interface, and what it was called with on the way."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()  # type: ignore[untyped-decorator]
def sampled(model: Any, noise: Tensor, steps: int, conditions: Mapping[str, Tensor]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """(images [B, T, C], keyword arguments of each call): Euler steps of equal length from noise (time 1) to images (0).

    `conditions` are the other keyword arguments of the model's forward, the same at each step. The calls are data to calibrate
    on that no image was needed for.
    """
    x, calls = noise, []
    for step in range(steps):
        calls.append({"hidden_states": x, "timestep": torch.full((len(x),), 1 - step / steps), **conditions})
        x = x - model(**calls[-1]).sample / steps
    return x, calls
