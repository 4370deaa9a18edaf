"""Rounding while training: whole numbers in range, gradients that pass, tables of 4 bits as they are published."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from narrows.errors import NarrowsError
from narrows.modules.block_tables import BLOCK, table, tabled
from narrows.modules.quantized_training import InputCodes, WeightCodes, products, quantize
from narrows.techniques.quantization.aqt_pareto_4_bit_resnet import AQT


@given(st.integers(0, 2**16), st.integers(2, 8))
def test_weights_are_whole_numbers_of_their_bits(seed: int, bits: int) -> None:
    weight = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(seed), requires_grad=True)  # type: ignore[call-overload]
    codes = WeightCodes(bits)
    seen = codes(weight)
    whole = seen / codes.step(weight)
    torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-4)
    assert len(whole[0].round().unique()) < 2**bits
    seen.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_inputs_end_at_their_bound_and_learn_their_sign() -> None:
    codes = InputCodes(2, spread=2.0).train()
    codes(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert (codes.range, float(codes.bound)) == ((0, 3), 1.0)
    x = torch.tensor([0.4, 0.9, 5.0], requires_grad=True)
    y = codes.eval()(x)
    torch.testing.assert_close(y, torch.tensor([1 / 3, 1.0, 1.0]))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 0], "no gradient for what was cut off"
    codes.train()(torch.tensor([-1.0, 1.0]))
    assert codes.range == (-1, 1)


def test_the_first_and_last_layer_keep_more_bits() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    widths = AQT().widths(products(model))
    assert widths == {"0": 8, "1": 4, "3": 8}
    quantize(model, widths, 3.0)
    assert model(torch.rand(2, 1, 5, 5)).shape == (2, 2)


def test_what_has_no_products_and_what_is_no_width_are_refused() -> None:
    with pytest.raises(NarrowsError, match="no product"):
        AQT().attach(nn.Sequential(nn.BatchNorm2d(3)))
    with pytest.raises(NarrowsError, match="not possible"):
        AQT(bits=12)


@pytest.mark.parametrize(("name", "numbers"), [("nf4", 16), ("fp4", 15)])
def test_tables_reach_from_minus_one_to_one(name: str, numbers: int) -> None:
    found = table(name)
    assert (len(found), float(found[0]), float(found[-1])) == (numbers, -1.0, 1.0)
    assert 0.0 in found.tolist()
    if name == "nf4":  # two of the numbers in the appendix of QLoRA
        torch.testing.assert_close(found[[1, 8]], torch.tensor([-0.6961928, 0.0795803]), rtol=0, atol=1e-5)


@given(st.integers(0, 2**16), st.booleans())
def test_every_weight_goes_to_its_nearest_number(seed: int, double: bool) -> None:
    weight = torch.randn(4, 2 * BLOCK, generator=torch.Generator().manual_seed(seed))
    kept = tabled(weight, "nf4", double).view(-1, BLOCK)
    scale = weight.view(-1, BLOCK).abs().amax(1, keepdim=True)
    nearest = (weight.view(-1, BLOCK, 1) - scale[..., None] * table("nf4")).abs().amin(-1)
    assert ((kept - weight.view(-1, BLOCK)).abs() <= nearest + (0.02 if double else 1e-6) * scale).all()
