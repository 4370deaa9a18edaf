"""Planes of signs and trits: what is packed is what was fitted, products without multiplications, gradients without copies."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from narrows import samples
from narrows.errors import NarrowsError
from narrows.modules.linears import Planes
from narrows.modules.planes import PlanesLinear, added, fit, shifted
from narrows.techniques.quantization.ptqtp import PTQTP
from narrows.techniques.quantization.shiftaddllm import ShiftAddLLM

FORMS = st.builds(Planes, st.sampled_from((2, 3)), st.integers(1, 3), st.sampled_from((8, 16, 40)), st.integers(0, 2))


def linear(inputs: int, outputs: int, seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


@settings(deadline=None, max_examples=25)
@given(form=FORMS, outputs=st.integers(1, 21), seed=st.integers(0, 9))
def test_a_layer_holds_the_sum_of_its_planes_in_the_bytes_it_says(form: Planes, outputs: int, seed: int) -> None:
    source = linear(2 * form.group, outputs, seed)
    layer = PlanesLinear.nearest(source, form, 3)
    found = fit(source.weight.view(-1, form.group), form, 3)
    torch.testing.assert_close(layer.weight(), (found.planes * found.scale[..., None]).sum(0).view(source.weight.shape))
    error = float((layer.weight() - source.weight).square().sum())
    assert error == pytest.approx(found.errors[-1], rel=1e-3, abs=1e-6)
    stored = form.stored.bytes(source.weight.numel(), source.in_features)
    assert stored + 4 * outputs <= layer.resident_bytes < stored + 4 * outputs + form.count * outputs
    x = torch.randn(3, source.in_features)
    torch.testing.assert_close(layer(x), x @ layer.weight().T + source.bias)


@settings(deadline=None, max_examples=25)
@given(form=FORMS, seed=st.integers(0, 99))
def test_rounds_never_raise_the_error(form: Planes, seed: int) -> None:
    rows = torch.randn(30, form.group, generator=torch.Generator().manual_seed(seed)) * 0.02
    errors = fit(rows, form, 10).errors
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))


def test_what_planes_can_say_is_found_exactly() -> None:
    signs = torch.randint(0, 2, (2, 8, 32), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    rows = signs[0] * 0.5 + signs[1] * 0.25
    assert fit(rows, Planes(2, 2, 32, powers=1), 20).errors[-1] < 1e-6


def test_zeros_stay_small() -> None:
    assert float(fit(torch.zeros(2, 8), Planes(2, 2, 8), 3).scale.max()) < 1e-6


def test_trits_multiply_by_adding() -> None:
    layer = PlanesLinear.nearest(linear(80, 6, bias=False), Planes(3, 2, 40))
    x = torch.randint(-100, 100, (3, 80))
    sums = added(x, layer).double()
    product = (sums * layer.scale[:, None].double()).sum((0, 3))
    torch.testing.assert_close(product, x.double() @ layer.weight().double().T)


def test_signs_multiply_by_shifting_and_looking_up() -> None:
    layer = ShiftAddLLM(group=16).planes(linear(48, 32, bias=False), torch.randn(64, 48))
    x = torch.randint(-3000, 3000, (5, 48))
    found, exponent = shifted(x, layer)
    assert found.dtype == torch.int64
    torch.testing.assert_close(found.double() * 2.0**exponent, x.double() @ layer.weight().double().T, rtol=0, atol=1e-9)


def test_scales_that_are_no_powers_of_two_cannot_shift() -> None:
    with pytest.raises(NarrowsError, match="shifts"):
        shifted(torch.ones(1, 16), PlanesLinear.nearest(linear(16, 16), Planes(2, 2, 16)))


def test_gradients_need_no_copy_of_the_weights() -> None:
    layer = PlanesLinear.nearest(linear(64, 48), Planes(2, 2, 32))
    x = torch.randn(5, 64, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = layer(x)
    assert max(kept, default=0) < 64 * 48
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(gradient, 2 * y.detach() @ layer.weight())


def test_sizes_and_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(NarrowsError, match="multiples"):
        PlanesLinear(60, 8, Planes(3, 2, 32))
    model, _ = samples.tiny_llama(1, 8)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NarrowsError, match="NaN"):
        PTQTP(group=32).apply(model)
