"""MoE-Lens: the paper's bound by hand, what more of each resource does, and refusals."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.experiments.moe_lens import play_beside, play_first
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.serving.moe_lens import Host, MoELens

MIXTRAL, A40 = capture("mixtral-8x7b"), machine("a40")


@settings(max_examples=30)
@given(prompt=st.integers(1, 4000), answer=st.integers(1, 500))
def test_the_bound_by_capacity_is_the_papers(prompt: int, answer: int) -> None:
    host = Host(load=2.0, compute=1e9, room=1e6, attended=1e12)
    efficiency = (prompt + answer) / sum(prompt + j for j in range(1, answer + 1))  # its equation 3, after the first token
    assert MoELens(answer=answer).bounds(host, prompt)["capacity"] == pytest.approx(efficiency * 1e6 / 2)


def test_more_room_helps_until_arithmetic_binds() -> None:
    rates = [MoELens(cache_gb=gb).measure(MIXTRAL, A40, Step.prefill(1, 512)) for gb in (10, 100, 1000, 10_000)]
    assert [r.rows[0]["bound"] for r in rates] == ["capacity", "capacity", "compute", "compute"]
    assert rates[1].values["tokens_per_second"] == pytest.approx(10 * rates[0].values["tokens_per_second"])
    assert rates[2].values["of_arithmetic"] == 1.0
    assert all(r.values["saturating_bytes"] == pytest.approx(rates[0].values["saturating_bytes"]) for r in rates)


def test_no_schedule_is_faster_than_the_bound() -> None:
    host = Host(load=1.0, compute=2000.0, room=20_000, attended=1e9)
    for prompt, answer in ((100, 20), (20, 100)):
        least = 10_000 * (0.95 * prompt + answer) / min(MoELens(answer=answer).bounds(host, prompt).values())
        assert play_first(host, prompt, answer, 1.0) > play_beside(host, prompt, answer) > least


def test_it_says_what_is_missing() -> None:
    with pytest.raises(NarrowsError, match="no link"):
        MoELens().host(MIXTRAL, replace(A40, links=()))
    with pytest.raises(NarrowsError, match="answer"):
        MoELens(answer=0)
    with pytest.raises(NarrowsError, match="link_gb_per_s"):
        MoELens(link_gb_per_s=-1)
    assert MoELens().measure(capture("bert-base"), A40, Step.forward(1, 128)).values["tokens_per_second"] == 0
