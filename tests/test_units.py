"""Quantities as people write and read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.errors import NarrowsError
from narrows.units import format_seconds, parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10min", 600), ("1.5 h", 5400), ("30d", 2592000), ("5y", 157680000)]
)
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1h", "3 weeks", "1h30", "nan"])
def test_what_is_no_time_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(NarrowsError, match=r"--restart: .*Write it like"):
        parse_seconds(text, "--restart")
    with pytest.raises(NarrowsError):
        parse_bytes(text + "x")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (4.2e-3, "4.2 ms"), (599, "599 s"), (600, "10 min"), (3600 * 3, "3 h"), (86400, "24 h"), (3e6, "34.7 days")],
)
def test_times_are_shown_in_the_unit_that_suits_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@given(st.floats(1e-9, 1e12))
def test_what_is_shown_is_what_was_meant(seconds: float) -> None:
    figure, unit = format_seconds(seconds).replace(",", "").split()
    factor = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1, "min": 60, "h": 3600, "days": 86400}[unit]
    assert float(figure) * factor == pytest.approx(seconds, rel=0.006)
