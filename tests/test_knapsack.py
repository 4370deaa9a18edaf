"""The knapsack of choices: within its limits, never below its bound, and close to what trying everything finds."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.search.knapsack import solve


def exhaustive(costs, limits, minimise):
    parts = np.arange(len(costs[minimise]))
    sums = [
        {n: c[parts, list(pick)].sum() for n, c in costs.items()}
        for pick in itertools.product(range(costs[minimise].shape[1]), repeat=len(parts))
    ]
    kept = [s[minimise] for s in sums if all(s[n] <= most for n, most in limits.items() if n != minimise)]
    return min(kept, default=np.inf)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 3), st.floats(0.05, 0.9), st.integers(1, 3))
def test_the_choice_lies_between_the_bound_and_nothing_better(seed, parts, options, tight, quantities):
    random = np.random.default_rng(seed)
    names = ["quality", *"abc"[:quantities]]
    costs = {n: random.uniform(0, 1, (parts, options)) for n in names}
    limits = {n: c.min(1).sum() + tight * (c.max(1).sum() - c.min(1).sum()) for n, c in costs.items() if n != "quality"}
    found, best = solve(costs, limits, "quality"), exhaustive(costs, limits, "quality")
    assert found.bound <= best + 1e-9
    if found.chosen is None:
        return
    for name, most in limits.items():
        assert costs[name][np.arange(parts), found.chosen].sum() <= most * (1 + 1e-6)
    assert found.cost >= best - 1e-9


def test_many_parts_close_the_gap():
    random = np.random.default_rng(0)
    size = np.tile([16.0, 8.0, 4.0], (200, 1))
    harm = np.sort(random.exponential(1, (200, 3)), axis=1) * [0, 1, 10]
    found = solve({"size": size, "harm": harm}, {"size": 200 * 7.0}, "harm")
    assert found.cost <= found.bound * 1.01
    uniform = harm[:, 2].sum()
    assert found.cost < uniform / 2


def test_what_cannot_be_is_proven():
    costs = {"size": np.array([[3.0, 2.0], [3.0, 2.0]]), "harm": np.array([[0.0, 1.0], [0.0, 1.0]])}
    alone = solve(costs, {"size": 3.9}, "harm")
    assert alone.chosen is None and alone.bound == np.inf
    together = solve(costs | {"time": 5 - costs["size"]}, {"size": 4.0, "time": 4.0}, "harm")
    assert together.chosen is None and together.bound == np.inf


def test_options_that_a_part_lacks_are_not_chosen():
    inf = np.inf
    costs = {"size": np.array([[2.0, 1.0, inf], [2.0, inf, 0.0]]), "harm": np.array([[0.0, 1.0, inf], [0.0, inf, 5.0]])}
    assert solve(costs, {"size": 3.0}, "harm").chosen.tolist() == [1, 0]
    assert solve(costs, {"harm": 5.0}, "size").cost == pytest.approx(2.0)
