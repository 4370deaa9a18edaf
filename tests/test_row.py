"""A row of servers: closed forms at light load, conservation, rules and brake, traces."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.energy import LOWEST_CLOCK, Curve
from narrows.errors import NarrowsError
from narrows.simulate.row import Feed, Phases, Requests, Rule, read_requests, run, synthetic
from narrows.validate import ROOT

PHASES = Phases((1.0, 1.0, 1.0, 1.0), 0.1, Curve(1000.0, 200.0, 1.0, 2.0), Curve(600.0, 200.0, 0.0, 2.0))
AZURE = ROOT.parent / "shared" / "data" / "traces" / "azure2023_conv.csv"


def every(seconds: float, count: int, written: float = 40) -> Requests:
    return Requests(np.arange(count) * seconds, np.full(count, 512.0), np.full(count, written))


def test_alone_a_request_takes_its_service_and_draws_its_phases() -> None:
    found = run(every(20.0, 200), PHASES, 10, Feed(math.inf), (), 0)
    assert found.low_seconds == found.high_seconds == pytest.approx(1.0 + 40 * 0.1)
    busy = (1.0 * 800 + 4.0 * 400) / 20  # watts above idle, one request every 20 s
    assert found.watts.mean() == pytest.approx(10 * 200 + busy, rel=0.01)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.5, 3.0))
def test_power_stays_between_all_idle_and_all_reading(seed: int, gap: float) -> None:
    found = run(every(gap, 60), PHASES, 6, Feed(math.inf), (), seed)
    assert np.all((found.watts >= 6 * 200 - 1e-6) & (found.watts <= 6 * 1000 + 1e-6))


def test_a_busy_row_serves_no_faster_than_it_can() -> None:
    crowded = run(every(0.4, 400), PHASES, 8, Feed(math.inf), (), 0)  # 8 servers answer 1.6 a second, 2.5 arrive
    assert crowded.low_seconds > 10.0


def test_rules_lower_power_and_slow_reading_alone() -> None:
    requests, feed = every(1.0, 600), Feed(6000.0)
    free = run(requests, PHASES, 10, feed, (), 0)
    capped = run(requests, PHASES, 10, feed, (Rule(0.1, 0.8, 1.0),), 0)
    assert capped.watts[60:].mean() < free.watts[60:].mean()
    assert capped.high_seconds == pytest.approx(free.high_seconds)
    assert free.low_seconds < capped.low_seconds < free.low_seconds + 0.3  # a second of reading takes 1 / 0.8


def test_a_command_arrives_after_its_delay() -> None:
    found = run(every(0.5, 400, 1000), PHASES, 4, Feed(2400.0, delay=40.0), (Rule(0.5, 0.5, 0.5),), 0)
    assert found.watts[: round(40 / 2)].max() > 2000
    assert found.watts[round(60 / 2) :].max() < 4 * (200 + 800 * 0.25) + 1


def test_the_brake_falls_at_the_rating_and_slows_all() -> None:
    small = run(every(0.5, 400), PHASES, 4, Feed(2000.0), (), 0)
    assert small.brakes > 0
    assert run(every(0.5, 400), PHASES, 4, Feed(1e9), (), 0).brakes == 0
    assert small.watts.min() <= 4 * (200 + 800 * LOWEST_CLOCK**2)


def test_a_threshold_passed_skips_the_rules_below_it() -> None:
    rules = (Rule(0.1, 0.9), Rule(0.3, 0.5, 0.5))
    both = run(every(0.5, 400, 1000), PHASES, 4, Feed(2400.0, delay=20.0), rules, 0)
    last = run(every(0.5, 400, 1000), PHASES, 4, Feed(2400.0, delay=20.0), rules[1:], 0)
    assert both.watts[30:].max() == pytest.approx(last.watts[30:].max())


def test_a_rate_is_met_by_thinning_and_by_copies() -> None:
    source = synthetic(3600, 2.0, 0)
    for rate in (0.5, 2.0, 7.0):
        found = source.at_rate(rate, 1)
        assert len(found.at) / 3600 == pytest.approx(rate, rel=0.1)
        assert np.all(np.diff(found.at) >= 0)


@pytest.mark.skipif(not AZURE.is_file(), reason="the trace is not at hand")
def test_synthetic_requests_are_like_azure_s() -> None:
    real, ours = read_requests(str(AZURE)), synthetic(3600, 5.5, 0)
    assert np.median(ours.prompt) == pytest.approx(np.median(real.prompt), rel=0.25)
    assert np.median(ours.written) == pytest.approx(np.median(real.written), rel=0.25)
    assert ours.prompt.mean() == pytest.approx(real.prompt.mean(), rel=0.25)
    assert ours.written.mean() == pytest.approx(real.written.mean(), rel=0.25)


@pytest.mark.parametrize(
    "content",
    ["", "TIMESTAMP,ContextTokens\n1,2\n", "TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,2\n",
     "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1,2\n",
     "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1,2\n2023-11-16 18:15:40,1,2\n"],
)  # fmt: skip
def test_a_broken_trace_is_refused_with_its_place(tmp_path: Path, content: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(content)
    with pytest.raises(NarrowsError, match=r"trace\.csv"):
        read_requests(str(path))
