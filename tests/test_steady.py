"""How sure the means of a run are: the warm-up is found, and intervals hold as often as they say."""

import json
import random
from statistics import fmean

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.capture import capture
from narrows.cli import cli
from narrows.errors import NarrowsError
from narrows.machine import machine
from narrows.simulate.fleet import Group, rules, serve
from narrows.simulate.steady import KEPT, Series, Steady, student
from narrows.simulate.workload import Lengths, generate


def correlated(seed: int, count: int, warm: int = 0) -> Series:
    """Numbers of mean 0, each near the one before; the first ones far too large."""
    draw, series, value = random.Random(seed), Series(), 0.0
    for i in range(count):
        value = 0.9 * value + draw.gauss(0, 1)
        series.add(value + (20.0 if i < warm else 0.0))
    return series


def test_intervals_hold_as_often_as_they_say() -> None:
    held = [low <= 0 <= high for seed in range(100) for low, high in [correlated(seed, 3000).interval(0) or (1.0, 1.0)]]
    assert 0.87 <= fmean(held) <= 1  # of 0.95


def test_the_warm_up_is_found_and_no_more() -> None:
    for seed in range(20):
        series = correlated(seed, 4000, warm=400)
        assert 400 <= series.warm_up() * series.size <= 1000
        assert (series.interval(series.warm_up()) or (0, 0))[1] < 1.0 < (series.interval(0) or (0, 0))[1]


@settings(max_examples=50)
@given(st.lists(st.floats(-1e3, 1e3), max_size=3 * KEPT))
def test_batches_are_means_of_what_came_in_order(values: list[float]) -> None:
    series = Series()
    for value in values:
        series.add(value)
    assert len(series.means) < 2 * KEPT and len(series.means) == len(values) // series.size
    for i, mean in enumerate(series.means):
        assert mean == pytest.approx(fmean(values[i * series.size : (i + 1) * series.size]), abs=1e-9)


def test_too_few_numbers_give_no_interval() -> None:
    assert correlated(0, 15).interval(0) is None and Series().warm_up() == 0


def test_a_load_that_never_settles_has_no_interval() -> None:
    group = Group(capture("smollm2-135m"), machine("l4"), rules("vllm-v1", max_sequences=4))
    for rate, settles in ((5.0, True), (500.0, False)):
        steady = Steady()
        serve(generate(rate, 2000, Lengths(200, 40, 0.5, 0.5)), group, each=steady.add)
        assert bool(steady.as_json()) == settles


def test_student_against_its_table() -> None:
    for count, table in ((3, 4.303), (5, 2.776), (20, 2.093)):  # two-sided 95 %, of any textbook
        low, high = student([0.0] * (count - 1) + [1.0])
        assert (high - low) / 2 == pytest.approx(table / count, rel=0.04)


def test_the_command_prints_intervals_of_a_run_and_over_seeds() -> None:
    words = ["simulate", "serve", "smollm2-135m", "-m", "l4", "--rate", "20", "--requests", "400", "-p", "200", "-o", "40"]
    found = json.loads(CliRunner().invoke(cli, [*words, "--seeds", "3", "--json"]).stdout)
    low, high = found["steady"]["e2e_s"]
    assert low < found["e2e_s"]["mean"] < high and 0 <= found["steady"]["warm_up_requests"] <= 200
    assert found["over_seeds"]["seeds"] == 3 and found["over_seeds"]["e2e_s"]["mean"][0] < found["over_seeds"]["e2e_s"]["mean"][1]
    text = CliRunner().invoke(cli, [*words, "--seeds", "3"]).stdout
    assert "Means after a warm-up of" in text and "e2e over 3 seeds" in text
    with pytest.raises(NarrowsError, match="too few"):
        raise CliRunner().invoke(cli, [*words, "--seeds", "2"]).exception  # type: ignore[misc]
