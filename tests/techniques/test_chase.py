"""Chase beyond its claims: the forecast, the budget, your own trace, and what is refused."""

import math
from pathlib import Path

import numpy as np
import pytest

from narrows.energy import Curve
from narrows.errors import NarrowsError
from narrows.techniques.profiling_cost_models.chase import GRIDS, HISTORY, Chase, foretold, read_trace, synthetic

CURVE = Curve(300.0, 60.0, 0.4, 2.5)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_regression_foretells_better_than_the_last_hour(grid: str) -> None:
    trace = synthetic(grid, 1500, 3)
    ours, last = (np.abs(guess - trace)[HISTORY:].mean() for guess in (foretold(trace), np.roll(trace, 1)))
    assert ours < last


def test_the_forecast_looks_at_no_hour_to_come() -> None:
    trace = synthetic("solar", HISTORY + 72, 0)
    changed = trace.copy()
    changed[HISTORY + 30 :] *= 3
    np.testing.assert_array_equal(foretold(trace)[: HISTORY + 30], foretold(changed)[: HISTORY + 30])


def test_an_even_grid_leaves_what_a_constant_limit_saves() -> None:
    trace = np.full(HISTORY + 100, 300.0)
    runs = {policy: Chase(policy, hours=50).run(CURVE, trace) for policy in ("forecast", "constant", "off")}
    assert runs["forecast"].grams == pytest.approx(runs["constant"].grams, rel=2e-3)
    assert runs["off"].hours == pytest.approx(50.0)
    assert runs["off"].grams == pytest.approx(50 * 0.3 * 300)  # hours x kW x g/kWh
    clock = 0.4 / (0.4 + 0.025)  # the one that takes 2.5 % longer
    expected = 50 * 1.025 * (60 + 240 * clock**2.5) / 1000 * 300
    assert runs["constant"].grams == pytest.approx(expected, rel=5e-3)


def test_dirty_hours_get_the_lower_clock() -> None:
    clocks = Chase().clocks(CURVE, np.array([100.0, 200.0, 300.0]), 4e4)
    assert clocks[0] > clocks[1] > clocks[2]


def test_a_trace_of_your_own_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "grid.csv"
    path.write_text("hour,g_per_kwh\n" + "\n".join(f"{h},{200 + h % 24}" for h in range(HISTORY + 100)) + "\n")
    assert len(read_trace(str(path))) == HISTORY + 100
    assert math.isfinite(Chase(trace=str(path), hours=20).run(CURVE, read_trace(str(path))).grams)
    with pytest.raises(NarrowsError, match="ends"):
        Chase(trace=str(path), hours=500).run(CURVE, read_trace(str(path)))
    path.write_text("hour,g_per_kwh\n0,-3\n")
    with pytest.raises(NarrowsError, match=r"grid\.csv"):
        read_trace(str(path))


def test_bad_options_are_refused() -> None:
    for options in ({"policy": "guess"}, {"grid": "moon"}, {"budget": 0.0}, {"hours": -1.0}):
        with pytest.raises(NarrowsError, match="chase: "):
            Chase(**options)  # type: ignore[arg-type]
