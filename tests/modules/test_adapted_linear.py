from copy import deepcopy

import pytest
import torch
from torch import nn

from narrows.modules.adapted_linear import AdaptedLinear, density, merge, price_density


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 3))


def test_an_adapted_layer_starts_as_the_frozen_one_and_merges_into_what_it_became() -> None:
    model, x = network(), torch.randn(5, 6)
    before = model(x)
    model[2] = AdaptedLinear(model[2], 4)
    torch.testing.assert_close(model(x), before)
    nn.init.normal_(model[2].up)
    changed = model(x)
    assert not torch.allclose(changed, before)
    merge(model)
    assert type(model[2]) is nn.Linear
    torch.testing.assert_close(model(x), changed)


@pytest.mark.parametrize("strength", [0.1, 2.0])
def test_gradients_are_those_of_the_loss_with_the_price_written_out(strength: float) -> None:
    x, ours = torch.randn(7, 6), network()
    theirs = deepcopy(ours)
    price_density(ours, strength, 0.2)
    ours(x).square().mean().backward()
    h1 = theirs[1](theirs[0](x))
    h2 = theirs[3](theirs[2](h1))
    price = sum(torch.tanh(h.abs() / 0.2).mean() for h in (h1, h2)) / 2
    (theirs[4](h2).square().mean() + strength * price).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_nothing_is_priced_outside_of_training() -> None:
    x, ours = torch.randn(7, 6), network().eval()
    theirs = deepcopy(ours)
    price_density(ours, 1.0, 0.2)
    for model in (ours, theirs):
        model(x).square().mean().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_density_counts_what_is_not_zero() -> None:
    model = nn.Sequential(nn.Identity(), nn.ReLU())
    assert density(model, [torch.tensor([[1.0, -1.0], [2.0, 0.0]]), torch.tensor([[3.0, 4.0]])]) == pytest.approx(4 / 6)
