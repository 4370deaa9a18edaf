"""What holds for every search in the registry: its budget, its reproducibility, and that it learns."""

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest

from narrows.errors import NarrowsError
from narrows.technique import Searches, Trial, techniques

SEARCHES = {slug: t for slug, t in techniques().items() if issubclass(t, Searches)}
GRID = [dict(zip("abc", values, strict=True)) for values in product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16), ("x", "y", "z"))]


def score(one: Mapping[str, Any]) -> float:
    if one["a"] * one["b"] > 64:
        return math.inf
    return float({"x": 1.0, "y": 1.3, "z": 2.0}[one["c"]] * (8 / one["a"] + one["a"] / 4 + 8 / one["b"]))


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES.keys())
class TestEverySearch:
    def test_it_keeps_to_its_budget_and_tries_nothing_twice(self, search: type[Searches]) -> None:
        for budget in (1, 2, 7, 1000):
            trials = search().search(GRID[::4], score, budget)
            assert len(trials) == min(budget, len(GRID[::4]))
            assert len({str(t.candidate) for t in trials}) == len(trials)
            assert all(t.score == score(t.candidate) for t in trials)

    def test_a_seed_repeats_it(self, search: type[Searches]) -> None:
        assert search().search(GRID, score, 12, seed=3) == search().search(GRID, score, 12, seed=3)
        assert search().search(GRID, score, 12, seed=3) != search().search(GRID, score, 12, seed=4)

    def test_it_beats_its_baseline(self, search: type[Searches]) -> None:
        def mean(one: Searches) -> float:
            return sum(min(t.score for t in one.search(GRID, score, 15, seed)) for seed in range(8)) / 8

        assert mean(search()) < mean(search().baseline())  # type: ignore[arg-type]

    def test_what_is_known_costs_nothing_and_helps(self, search: type[Searches]) -> None:
        known = [Trial(one, score(one)) for one in GRID[::2]]
        trials = search().search(GRID, score, 5, known=known)
        assert not [t for t in trials if t.candidate in [k.candidate for k in known]]
        rest = sorted(score(one) for one in GRID[1::2])
        assert min(t.score for t in trials) <= rest[2]

    def test_it_goes_on_where_all_fail(self, search: type[Searches]) -> None:
        assert len(search().search(GRID, lambda _: math.inf, 9)) == 9

    def test_bad_input_is_refused(self, search: type[Searches]) -> None:
        with pytest.raises(NarrowsError, match="budget"):
            search().search(GRID, score, 0)
        with pytest.raises(NarrowsError, match="nan"):
            search().search(GRID, lambda _: math.nan, 3)
        with pytest.raises(NarrowsError, match="same names"):
            search().search([*GRID, {"d": 1}] * 2, lambda _: 1.0, 10, known=[Trial(GRID[0], 1.0)])
