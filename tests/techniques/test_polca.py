"""POLCA beyond its claims: the rating, a network without a cache, and what is refused."""

from dataclasses import replace

import pytest

from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.machine import machine
from narrows.techniques.profiling_cost_models.polca import BASE_PEAK, Polca

A100 = machine("a100-80gb")


def test_a_row_that_is_not_oversubscribed_peaks_where_it_was_rated() -> None:
    one = Polca("none", extra=0.0, servers=8, draws=1)
    found = one.row(one.phases(capture("llama-2-70b"), A100))
    assert found.share.max() == pytest.approx(BASE_PEAK)
    assert found.brakes == 0
    assert found.low_loss == found.high_loss == 0.0


def test_servers_draw_more_to_read_than_to_write_and_hosts_stay_on() -> None:
    phases = Polca().phases(capture("llama-2-70b"), A100)
    assert phases.reading.watts > phases.writing.watts > phases.reading.idle > 8 * 0.2 * 400
    assert phases.reading.sensitive > phases.writing.sensitive
    assert list(phases.read_seconds) == sorted(phases.read_seconds)


def test_a_network_without_a_cache_reads_alone() -> None:
    phases = Polca().phases(capture("resnet-50"), A100)
    assert phases.token_seconds == 0.0


def test_bad_options_are_refused() -> None:
    for options in ({"policy": "hope"}, {"load": 1.5}, {"draws": 0}, {"servers": 0}):
        with pytest.raises(NarrowsError, match="polca: "):
            Polca(**options)  # type: ignore[arg-type]
    with pytest.raises(NarrowsError, match="power_watts"):
        Polca().phases(capture("llama-2-70b"), replace(A100, power_watts=None))
