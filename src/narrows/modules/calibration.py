"""What layers read while calibration data runs through a model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def observed(
    model: nn.Module, layers: Mapping[str, nn.Module], data: Sequence[Mapping[str, Tensor]], rows: int
) -> dict[str, Tensor]:
    """Inputs [T, K] of the named layers as fp32: `rows` of them, evenly spread over all batches and tokens.

    `data` holds the keyword arguments of the model's forward. The model is left as it was; layers that never ran are
    missing.
    """
    seen: dict[str, list[Tensor]] = {}
    each = -(-rows // max(len(data), 1))

    def before(name: str) -> Any:
        def keep(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            flat = args[0].detach().reshape(-1, args[0].shape[-1])
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
