"""The page of a served load: its counts over time add up to what the requests took, its bars to their latencies."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from narrows.cli import cli
from narrows.report.served import served
from narrows.simulate.outcome import Outcome
from narrows.simulate.requests import Answer, Request
from narrows.simulate.step_times import PS
from narrows.simulate.watch import BINS, SLOWEST, STATES, Watch

gap = st.integers(0, 40 * PS)
moments = st.lists(st.tuples(gap, gap, gap, gap), min_size=1, max_size=40)


def answer(arrival: int, waits: int, reads: int, answers: int) -> Answer:
    admitted, first, last = arrival + waits, arrival + waits + reads, arrival + waits + reads + answers
    return Answer(Request(arrival, 100, 10), admitted, first, last, 0, 0, waits, reads, 0, answers, 0, 0, 0)


@given(moments)
def test_counts_over_time_add_up_to_the_time_spent_in_each_state(given_moments: list[tuple[int, int, int, int]]) -> None:
    watch, answers = Watch(), [answer(*one) for one in given_moments]
    for one in answers:
        watch.add(one)
    spent = dict(zip(STATES, ([w for _, w, _, _ in given_moments], [r for _, _, r, _ in given_moments],
                 [a for _, _, _, a in given_moments]), strict=True))  # fmt: skip
    for state, row in watch.inside().items():
        assert sum(row) * watch.bin_seconds == pytest.approx(sum(spent[state]) / PS, abs=1e-9)
        assert len(row) <= BINS
        assert min(row, default=0.0) >= 0


@given(moments)
def test_a_bin_holds_the_mean_number_inside(given_moments: list[tuple[int, int, int, int]]) -> None:
    watch = Watch()
    for one in given_moments:
        watch.add(answer(*one))
    width, row = round(watch.bin_seconds * PS), watch.inside()["being answered"]
    for i in (0, len(row) // 2, len(row) - 1):
        if row:
            overlaps = [min(a + w + r + n, (i + 1) * width) - max(a + w + r, i * width) for a, w, r, n in given_moments]
            assert row[i] == pytest.approx(sum(max(o, 0) for o in overlaps) / width, abs=1e-9)


@given(moments)
def test_the_slowest_are_kept_the_longest_first(given_moments: list[tuple[int, int, int, int]]) -> None:
    watch, answers = Watch(), [answer(*one) for one in given_moments]
    for one in answers:
        watch.add(one)
    assert watch.slowest == sorted(answers, key=lambda a: a.request.arrival - a.last)[:SLOWEST]


def test_the_page_draws_every_part_of_every_slow_request() -> None:
    watch, outcome = Watch(), Outcome(ttft_limit=1.0)
    for i in range(3):
        one = answer(i * PS, PS, PS // 2, (i + 1) * PS)
        watch.add(one)
        outcome.add(one)
    text = served(outcome, watch, "<model> on a machine")
    assert "&lt;model&gt;" in text and "<model>" not in text
    wide = [float(w) for w in re.findall(r'<rect [^>]*width="([0-9.]+)"', text)]
    assert len(wide) == 4 * 3  # the mean and three requests, three parts each
    each = [sum(wide[i : i + 3]) for i in range(0, 12, 3)]
    assert each[1] / each[3] == pytest.approx(4.5 / 2.5, rel=1e-3)  # as long as their latencies
    assert text == served(outcome, watch, "<model> on a machine")


def test_a_load_of_which_nothing_was_served_has_a_page() -> None:
    outcome = Outcome()
    outcome.reject(replace(answer(0, 0, 0, 0).request, prompt=10**6), "too long")
    assert "nothing was served" in served(outcome, Watch(), "a model")


def test_simulate_serve_writes_the_page(tmp_path: Path) -> None:
    page = tmp_path / "load.html"
    found = CliRunner().invoke(
        cli, ["simulate", "serve", "llama-3.1-8b", "-m", "h100-sxm", "--rate", "5", "--requests", "60", "--html", str(page)]
    )
    assert found.exit_code == 0, found.output
    assert "The slowest requests" in page.read_text("utf-8")
