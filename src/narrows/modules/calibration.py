"""What layers read while calibration data runs through a model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def vectors(layer: nn.Module, x: Tensor) -> Tensor:
    """What the outputs [T, N] of a linear layer are products of: its input as [T, K]."""
    return x.reshape(-1, x.shape[-1])


def observed(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    data: Sequence[Mapping[str, Tensor]],
    rows: int,
    read: Callable[[nn.Module, Tensor], Tensor] = vectors,
) -> dict[str, Tensor]:
    """Inputs [T, K] of the named layers as fp32: `rows` of them, evenly spread over all batches and tokens.

    `data` holds the keyword arguments of the model's forward; `read` makes [T, K] of what a layer is given. The model is
    left as it was; layers that never ran are missing.
    """
    seen: dict[str, list[Tensor]] = {}
    each = -(-rows // max(len(data), 1))

    def before(name: str) -> Any:
        def keep(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            flat = read(layer, args[0].detach())
            seen.setdefault(name, []).append(flat[torch.linspace(0, len(flat) - 1, min(each, len(flat))).long()].float())

        return keep

    hooks = [layer.register_forward_pre_hook(before(name)) for name, layer in layers.items()]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            for batch in data:
                model(**batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(pieces) for name, pieces in seen.items()}
