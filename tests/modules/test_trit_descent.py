"""Trits that serve the outputs: the error never rises, is what it says, and is least where one trit could change it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.modules.linears import Planes
from narrows.modules.trit_descent import DAMPING, descended


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([8, 16, 32]), st.booleans())
def test_the_error_never_rises_and_is_what_it_says(seed: int, group: int, zeros: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 32, generator=generator)
    if zeros:
        weight[:3] = 0
    x = torch.randn(40, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    gram = x.T @ x
    found = descended(weight, gram, Planes(3, 1, group), 5)
    assert all(after <= before * (1 + 1e-4) + 1e-4 for before, after in zip(found.errors, found.errors[1:], strict=False))
    change = (found.planes[0] * found.scale[0].repeat_interleave(group, 1) - weight).double()
    damped = gram.double() + DAMPING * gram.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    error = float((change @ damped * change).sum())
    assert abs(error - found.errors[-1]) <= 1e-3 * error + 1e-3
    assert set(found.planes.unique().tolist()) <= {-1, 0, 1}
    assert torch.equal(found.scale, found.scale.bfloat16().float())


def test_correlated_inputs_gain_most() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(32, 64, generator=generator), torch.randn(200, 8, generator=generator)
    x = x @ torch.randn(8, 64, generator=generator)  # of rank 8: many weights give the same outputs
    found = descended(weight, x.T @ x, Planes(3, 1, 64), 10)
    assert found.errors[-1] < 0.2 * found.errors[0]
