"""Collectives among ranks: the fit finds a known link again, and real ranks meet on this machine."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows import ranks
from narrows.costmodel import op_time
from narrows.errors import NarrowsError
from narrows.graph import FP32, Op
from narrows.machine import machine
from narrows.step import Step


def truth(bandwidth: float, latency: float, count: int) -> list[ranks.Timing]:
    found = []
    for size in ranks.SIZES:
        for kind in ranks.HOPS:
            sent, messages = ranks._terms(kind, size, count)
            found.append((kind, size, sent / bandwidth + messages * latency))
    return found


@given(st.floats(1e7, 1e12), st.floats(1e-7, 1e-3), st.integers(2, 16))
@settings(max_examples=30)
def test_a_known_link_is_found_again(bandwidth: float, latency: float, count: int) -> None:
    wire, reached = ranks.fit("gloo", count, truth(bandwidth, latency, count))
    for sent, messages in (ranks._terms("all_reduce", size, count) for size in ranks.SIZES):
        ours = sent / wire.bandwidth_bytes_per_s + messages * wire.latency_seconds
        assert ours == pytest.approx(sent / bandwidth + messages * latency, rel=0.01)
    assert reached["link"]["low"] <= 1 <= reached["link"]["high"]


def test_a_few_slow_rounds_do_not_move_it() -> None:
    found = truth(1e9, 1e-4, 4)
    found[3], found[20] = (*found[3][:2], found[3][2] * 20), (*found[20][:2], found[20][2] * 10)
    wire, _ = ranks.fit("gloo", 4, found)
    assert wire.bandwidth_bytes_per_s == pytest.approx(1e9, rel=0.1)
    assert wire.latency_seconds == pytest.approx(1e-4, rel=0.1)


def test_the_cost_model_predicts_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "timings", lambda count, backend: truth(1e9, 1e-4, count))
    found = ranks.linked(machine("desktop-avx2"), 4)
    for kind, size, seconds in truth(1e9, 1e-4, 4):
        op = Op(kind, kind, {"elements": size, "ranks": 4}, act=FP32)
        ours = op_time(op, Step.forward(), found, eager=True).causes["communication"]
        assert float(ours) == pytest.approx(seconds, rel=0.02)
    assert "4 ranks over gloo" in found.sources["links.gloo.latency_seconds"]
    assert found.sources["units"] == machine("desktop-avx2").sources["units"]


def test_one_rank_is_refused() -> None:
    with pytest.raises(NarrowsError, match="exchange nothing"):
        ranks.linked(machine("desktop-avx2"), 1)


def test_a_rank_that_fails_is_named_and_none_is_left() -> None:
    pytest.importorskip("torch")
    with pytest.raises(NarrowsError, match=r"rank \d stopped"):
        ranks.timings(2, "nosuch")


def test_real_ranks_meet() -> None:
    pytest.importorskip("torch")
    found = ranks.timings(2, "gloo")
    assert {kind for kind, _, _ in found} == set(ranks.HOPS)
    assert all(seconds > 0 for _, _, seconds in found)
