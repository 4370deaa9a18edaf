"""Two-pass softmax as an analysis: what is in cache gains nothing, what is not gains a third of four passes."""

import pytest

from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.machine import machine
from narrows.step import Step
from narrows.technique import technique

TwoPass = technique("two-pass-softmax")


def test_rows_that_fit_into_cache_gain_nothing() -> None:
    read = TwoPass().measure(capture("gpt2"), machine("a100-80gb"), Step.decode(1, 512))
    assert all(row["in_cache"] for row in read.rows)
    assert read.values["speedup"] == 1


def test_rows_beyond_the_cache_gain_what_the_passes_say() -> None:
    small = machine("cortex-m7")
    graph, step = capture("gpt2"), Step.forward(1, 64)
    read = TwoPass().measure(graph, small, step)
    (head,) = [row for row in read.rows if row["width"] == 50257]
    assert not head["in_cache"]
    assert head["bytes"] == 3 * 4 * 50257 * 64
    assert head["three_pass_bytes"] == 4 * 4 * 50257 * 64
    (scores,) = [row for row in read.rows if row is not head]
    assert scores["softmaxes"] == 12 * 12 * 64
    assert scores["width"] == pytest.approx(65 / 2)


def test_an_unknown_algorithm_is_refused() -> None:
    with pytest.raises(NarrowsError, match="four_pass"):
        TwoPass("four_pass")
