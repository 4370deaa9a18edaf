"""A linear layer as several smaller ones that run one after another, so that no more than one's weights need be at hand."""

from typing import TYPE_CHECKING

from narrows.errors import NarrowsError

if TYPE_CHECKING:
    import torch


def tiled_linear(linear: "torch.nn.Linear", tiles: int) -> "torch.nn.Module":
    """The same function in `tiles` pieces along the outputs; raises NarrowsError for more tiles than outputs."""
    import torch

    if not 1 <= tiles <= linear.out_features:
        raise NarrowsError(
            f"{tiles} tiles of {linear.out_features} outputs.", where="tiled_linear", remedy="Give from 1 to the outputs."
        )

    class Tiled(torch.nn.Module):  # type: ignore[misc]
        """The pieces, each a linear layer of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleList()
            biases = [None] * tiles if linear.bias is None else linear.bias.detach().tensor_split(tiles)
            for weight, bias in zip(linear.weight.detach().tensor_split(tiles), biases, strict=True):
                part = torch.nn.Linear(linear.in_features, len(weight), bias is not None, dtype=weight.dtype)
                part.weight.data.copy_(weight)
                if bias is not None:
                    part.bias.data.copy_(bias)
                self.parts.append(part)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([part(x) for part in self.parts], -1)

    return Tiled()
