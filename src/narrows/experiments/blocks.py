"""A model in which only the first blocks can be changed: what a claim about quality costs a quarter of."""

from typing import Any


def first_blocks(model: Any, count: int) -> Any:
    """A Llama-type model in which techniques that look for plain linear layers see those of its first blocks alone."""
    from torch import nn

    class Kept(nn.Linear):  # type: ignore[misc]
        """A linear layer that stays as it is."""

    for block in model.model.layers[count:]:
        for layer in block.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = Kept
    return model
