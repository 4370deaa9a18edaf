"""FlexSP's groups on a made-up cost model: nothing overflows or is lost, and what cannot be is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.errors import NarrowsError
from narrows.techniques.training_parallelism.flexsp_heterogeneity_adaptive_sp import FlexSP, Rates

SIZES = (1, 2, 4, 8)
RATES = Rates(SIZES, np.array([1.0, 0.6, 0.4, 0.3]), 1e-3 / np.array(SIZES), 100.0, 5.0, 0.3)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=30), st.booleans())
def test_every_sequence_is_in_one_group_that_holds_it(lengths: list[int], flexible: bool) -> None:
    plan = FlexSP(devices=8, limit=800, flexible=flexible).plan(RATES, lengths)
    assert sorted(n for groups in plan for g in groups for n in g.lengths) == sorted(lengths)
    for groups in plan:
        assert sum(g.size for g in groups) == 8
        assert all(sum(g.lengths) <= g.size * RATES.tokens_held for g in groups)


def test_a_sequence_too_long_for_all_is_refused() -> None:
    with pytest.raises(NarrowsError, match="801 tokens; 8 devices hold 800"):
        FlexSP(devices=8).plan(RATES, [10, 801])
