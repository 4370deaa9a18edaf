"""Two-pass softmax against torch over shapes, masks and far logits; what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from narrows.errors import NarrowsError
from narrows.modules import two_pass_softmax
from narrows.modules.two_pass_softmax import PASSES, counted, softmax


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 200)), elements=st.floats(-1e4, 1e4, width=32)),
    st.sampled_from(list(PASSES)),
)
def test_it_is_the_softmax_of_torch(x: np.ndarray, algorithm: str) -> None:
    found = softmax(x, algorithm)
    assert np.abs(found - torch.softmax(torch.from_numpy(x).double(), -1).numpy()).max() <= 1e-6


@pytest.mark.parametrize("algorithm", PASSES)
def test_every_load_and_store_is_counted(algorithm: str) -> None:
    x = np.zeros((2, 65), np.float32)
    out, moved = counted(x, algorithm)
    assert moved == PASSES[algorithm] * x.size
    np.testing.assert_allclose(out, 1 / 65, rtol=1e-6)


def test_masked_logits_get_nothing_and_bad_ones_spoil_their_row() -> None:
    x = np.array([[0, -np.inf, 0], [np.nan, 0, 0], [np.inf, 0, 0]], np.float32)
    out = softmax(x)
    np.testing.assert_allclose(out[0], [0.5, 0, 0.5], atol=1e-7)
    assert np.isnan(out[1:]).all()


def test_out_is_filled() -> None:
    x, out = np.ones((4, 9), np.float32), np.zeros((4, 9), np.float32)
    assert softmax(x.T.copy().T, out=out) is out
    np.testing.assert_allclose(out, 1 / 9, rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.zeros(3), {}, "float64"),
        (np.zeros((2, 0), np.float32), {}, "shape"),
        (np.zeros(3, np.float32), {"algorithm": "four_pass"}, "four_pass"),
        (np.zeros(3, np.float32), {"out": np.zeros(4, np.float32)}, "array of its own"),
        (np.full(3, 2e6, np.float32), {}, "above"),
    ],
)
def test_what_it_cannot_do_is_refused(x: np.ndarray, options: dict, message: str) -> None:
    with pytest.raises(NarrowsError, match=message):
        softmax(x, **options)


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    two_pass_softmax._built.cache_clear()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NarrowsError, match="no C compiler"):
        softmax(np.zeros(3, np.float32))
    monkeypatch.undo()
    assert softmax(np.zeros(1, np.float32)) == [1]
