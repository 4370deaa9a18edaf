"""Factors are as near to the layer as their solver promises, and the two layers do what the one did."""

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from narrows.modules import low_rank  # noqa: E402


def product(factors):
    return factors[0] @ factors[1]


def test_svd_is_optimal_and_the_others_are_not():
    torch.manual_seed(0)
    weight = torch.randn(40, 60)
    tail = torch.linalg.svdvals(weight)[10:].square().sum().sqrt()
    errors = {s: float((weight - product(getattr(low_rank, s)(weight, 10))).norm() / tail) for s in ("svd", "semi_nmf", "random")}
    assert errors["svd"] == pytest.approx(1, abs=1e-5)
    assert 1 < errors["semi_nmf"] < 1.25 < errors["random"]


def test_semi_nmf_keeps_its_right_factor_positive():
    torch.manual_seed(0)
    assert (low_rank.semi_nmf(torch.randn(20, 30), 5)[1] >= 0).all()


def test_activation_svd_errs_less_on_its_inputs():
    torch.manual_seed(0)
    weight, x = torch.randn(40, 60), torch.randn(500, 60) * torch.logspace(-2, 1, 60)
    errors = [(x @ (weight - product(f)).T).norm() for f in (low_rank.activation_svd(weight, 10, x), low_rank.svd(weight, 10))]
    assert errors[0] < 0.8 * errors[1]


def test_activation_svd_takes_fewer_inputs_than_dimensions():
    factors = low_rank.activation_svd(torch.randn(8, 32), 4, torch.randn(5, 32))
    assert product(factors).isfinite().all()


LAYERS = [
    nn.Linear(12, 20),
    nn.Linear(12, 20, bias=False),
    nn.Conv1d(3, 8, 5, stride=2, padding=1),
    nn.Conv2d(3, 8, 3, dilation=2),
    nn.Conv3d(2, 6, 2, bias=False),
    nn.Conv2d(4, 8, (1, 3), padding="same", padding_mode="reflect"),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_full_rank_factors_compute_the_same(layer):
    outputs, inputs = low_rank.matrix(layer).shape
    x = torch.randn(2, 3, 12)
    if not isinstance(layer, nn.Linear):
        x = torch.randn(2, layer.in_channels, *[9] * (layer.weight.dim() - 2))
    assert low_rank.is_factorable(layer)
    assert torch.allclose(low_rank.factored(layer, min(outputs, inputs), low_rank.svd)(x), layer(x), atol=1e-5)


def test_meta_layers_are_factored_without_a_solver():
    with torch.device("meta"):
        layer = nn.Linear(12, 20, dtype=torch.bfloat16)
    first, second = low_rank.factored(layer, 3, low_rank.svd)
    assert first.weight.shape == (3, 12) and second.weight.is_meta and second.bias.dtype == torch.bfloat16


def test_grouped_and_transposed_convolutions_are_left():
    assert not any(low_rank.is_factorable(m) for m in (nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 4, 3), nn.LSTM(3, 3)))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_outputs_are_products_of_patches(layer):
    x = (
        torch.randn(2, 3, 12)
        if isinstance(layer, nn.Linear)
        else torch.randn(2, layer.in_channels, *[9] * (layer.weight.dim() - 2))
    )
    with torch.no_grad():
        out = layer(x) if isinstance(layer, nn.Linear) else layer(x).movedim(1, -1)
        bias = 0 if layer.bias is None else layer.bias
        ours = low_rank.patches(layer, x) @ low_rank.matrix(layer).T + bias
    torch.testing.assert_close(ours, out.reshape(-1, out.shape[-1]), rtol=1e-4, atol=1e-5)
