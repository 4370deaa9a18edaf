"""Step's quantities against sums written out token by token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.errors import NarrowsError
from narrows.step import Step

sizes = st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(0, 30))


def keys_seen(new: int, past: int, window: int | None = None) -> list[int]:
    return [min(past + i, window or 10**9) for i in range(1, new + 1)]


@given(st.lists(sizes, min_size=1, max_size=4), st.integers(1, 40))
def test_ragged_batches_sum_token_by_token(groups: list[tuple[int, int, int]], window: int) -> None:
    batch, new, past = (np.array(column) for column in zip(*groups, strict=True))
    step = Step(batch, new, past)
    assert step["one"] == pytest.approx(1.0)
    assert step["sequences"] == sum(b for b, _, _ in groups)
    assert step["tokens"] == sum(b * n for b, n, _ in groups)
    assert step["pairs"] == sum(b * sum(keys_seen(n, p)) for b, n, p in groups)
    assert step["pairs[full]"] == sum(b * n * (p + n) for b, n, p in groups)
    assert step[f"pairs[window={window}]"] == sum(b * sum(keys_seen(n, p, window)) for b, n, p in groups)
    assert step["context"] == sum(b * (p + n) for b, n, p in groups)
    seen = [b * len(set().union(*(range(max(0, p + i - window), p + i) for i in range(1, n + 1)))) for b, n, p in groups]
    assert step[f"context[window={window}]"] == sum(seen)
    assert step[f"held[window={window}]"] == sum(b * min(p + n, window) for b, n, p in groups)
    assert step[f"pairs[past={window}]"] == sum(b * sum(keys_seen(n, min(p, window))) for b, n, p in groups)


def test_an_array_of_points_equals_the_points_one_by_one() -> None:
    contexts = [1, 100, 4096]
    many = Step.decode(8, [[c] for c in contexts])
    for field in ("tokens", "context", "pairs", "pairs[window=64]", "held[past=50]", "outputs"):
        assert list(np.broadcast_to(many[field], 3)) == [Step.decode(8, c)[field] for c in contexts]


def test_serving_gives_logits_of_the_last_token_alone() -> None:
    assert Step.prefill(2, 100)["outputs"] == 2
    assert Step.forward(2, 100)["outputs"] == Step.train(2, 100)["outputs"] == 200


def test_evicted_prompts_hold_their_budget() -> None:
    assert Step.prefill(1, 1000)["held[past=100]"] == 100
    assert Step.decode(1, 1000)["held[past=100]"] == 101


@pytest.mark.parametrize(
    "wrong", [{"batch": 0}, {"new": -1}, {"past": 1.5}, {"batch": float("nan")}, {"phase": "decoding"}, {"new": []}]
)
def test_sizes_that_are_none_are_refused(wrong: dict) -> None:
    with pytest.raises(NarrowsError):
        Step(**wrong)


def test_an_unknown_quantity_is_refused() -> None:
    with pytest.raises(NarrowsError, match="flop"):
        Step()["flop"]
