"""A linear layer in tiles: the same function, and a refusal of more tiles than outputs."""

import pytest
import torch

from narrows.errors import NarrowsError
from narrows.modules.tiled_linear import tiled_linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tiles", [1, 3, 7])
def test_it_is_the_same_function(tiles: int, bias: bool) -> None:
    linear, x = torch.nn.Linear(5, 7, bias), torch.randn(2, 4, 5)
    tiled = tiled_linear(linear, tiles)
    torch.testing.assert_close(tiled(x), linear(x))
    assert sum(p.numel() for p in tiled.parameters()) == sum(p.numel() for p in linear.parameters())
    assert max(len(p) for p in tiled.parameters()) == -(-7 // tiles)


@pytest.mark.parametrize("tiles", [0, 8])
def test_tiles_that_there_cannot_be_are_refused(tiles: int) -> None:
    with pytest.raises(NarrowsError, match="7 outputs"):
        tiled_linear(torch.nn.Linear(5, 7), tiles)
