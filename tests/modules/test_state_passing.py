"""Linear attention on one rank, beside the recurrence that defines it; what crosses ranks is tested in test_run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.modules.state_passing import mixer


def recurrence(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gated: bool) -> torch.Tensor:
    """S_t = diag(a_t) S_(t-1) + k_t^T v_t, o_t = q_t S_t, a token at a time."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    keep = torch.sigmoid(k) ** (1 / 16) if gated else torch.ones_like(k)
    k = 1 - keep if gated else k
    state, out = torch.zeros(*q.shape[::2], q.shape[-1], q.shape[-1], dtype=q.dtype), []
    for t in range(q.shape[1]):
        state = keep[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        out.append(torch.einsum("bhd,bhde->bhe", q[:, t] * q.shape[-1] ** -0.5, state))
    return torch.stack(out, 1)


@settings(deadline=None, max_examples=25)
@given(tokens=st.integers(1, 24), heads=st.sampled_from([1, 2, 4]), shared=st.sampled_from([1, 2]), gated=st.booleans(),
       seed=st.integers(0, 9))  # fmt: skip
def test_it_is_the_recurrence(tokens: int, heads: int, shared: int, gated: bool, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(2, tokens, heads * shared, 8, generator=draw, dtype=torch.float64)
    k, v = torch.randn(2, 2, tokens, heads, 8, generator=draw, dtype=torch.float64)
    torch.testing.assert_close(mixer("gather", gated)(q, k, v), recurrence(q, k, v, gated), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gated", [True, False])
def test_it_sees_no_token_that_is_to_come(gated: bool) -> None:
    q, k, v = torch.randn(3, 1, 6, 2, 4, dtype=torch.float64)
    whole, first = mixer("gather", gated)(q, k, v), mixer("gather", gated)(q[:, :4], k[:, :4], v[:, :4])
    torch.testing.assert_close(whole[:, :4], first)
