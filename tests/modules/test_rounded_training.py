"""Rounding to 16-bit formats is what the machine's casts do, and leaves the weights that are updated alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from narrows.errors import NarrowsError
from narrows.modules.rounded_training import FORMATS, round_products, rounded
from narrows.techniques.quantization.bfloat16_training_study import BFloat16Training

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1), st.sampled_from(sorted(FORMATS)))
def test_rounding_is_the_cast(patterns: list[int], form: str) -> None:
    x = torch.tensor(patterns, dtype=torch.int64).int().view(torch.float32)
    torch.testing.assert_close(rounded(x, form), x.to(DTYPES[form]).float(), rtol=0, atol=0, equal_nan=True)


@given(st.floats(width=32, allow_nan=False), st.sampled_from(sorted(FORMATS)))
def test_cutting_off_never_grows_and_stays_finite(value: float, form: str) -> None:
    x = torch.tensor([value])
    cut = rounded(x, form, nearest=False)
    assert (cut.abs() <= x.abs()).all()
    assert cut.isfinite().equal(x.isfinite())


def test_products_see_rounded_numbers_and_updates_do_not() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    whole, wanted = layer.weight.detach().clone(), rounded(x, "bf16") @ rounded(layer.weight.detach(), "bf16").T
    bias = layer.bias.detach()
    assert round_products(layer, "bf16") == 1
    y = layer(x)
    torch.testing.assert_close(y, wanted + bias)
    dy = torch.randn(3, 4)
    y.backward(dy)
    (kept,) = (p for p in layer.parameters() if p.dim() == 2)
    assert torch.equal(kept, whole)
    torch.testing.assert_close(kept.grad, rounded(dy, "bf16").T @ rounded(x, "bf16"))


def test_a_model_without_products_is_refused() -> None:
    with pytest.raises(NarrowsError, match="no fp32 product"):
        BFloat16Training().attach(nn.Sequential(nn.LayerNorm(4)))
