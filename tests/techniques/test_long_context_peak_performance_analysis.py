"""The peak performance analysis of long contexts: closed forms by hand, what halving the cache must halve, and refusals."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.profiling_cost_models.long_context_peak_performance_analysis import HALVED, LongContextCost

A100 = machine("a100-80gb")
LLAMA = capture("llama-3.1-8b")


@settings(max_examples=30)
@given(context=st.integers(1000, 100_000))
def test_terms_are_the_sums_one_does_by_hand(context: int) -> None:
    found = LongContextCost(answer=100, rounds=3).measure(LLAMA, A100, Step.decode(1, context - 1)).values
    cache = 32 * 2 * 8 * 128 * 2 * context  # layers, keys and values, heads, width, bytes
    assert found["cache_bytes"] == cache
    assert found["switch_seconds"] == pytest.approx(2 * cache / 31.5e9)
    read = LLAMA.weight_bytes - 128256 * 4096 * 2  # of the input embedding, one row a token
    assert found["answer_seconds"] == pytest.approx(100 * (read + cache) / 2.039e12, rel=1e-2)
    assert found["users"] == pytest.approx((80 * 2**30 - LLAMA.weight_bytes) / cache, rel=0.01, abs=2)
    assert found["session_seconds"] >= found["prefill_seconds"] + 3 * found["switch_seconds"]


def test_each_way_halves_the_cache_and_layers_alone_shorten_the_prompt() -> None:
    rows = {row["halved"]: row for row in LongContextCost().measure(LLAMA, A100, Step.prefill(1, 50_000)).rows}
    assert set(rows) == set(HALVED)
    for name in set(HALVED) - {"nothing"}:
        assert rows[name]["cache_bytes"] == pytest.approx(rows["nothing"]["cache_bytes"] / 2)
        assert ("prefill_seconds" in rows[name]["cuts"]) == (name == "layers")
        assert rows[name]["session_seconds"] < rows["nothing"]["session_seconds"]


def test_layers_are_halved_whether_folded_or_not() -> None:
    attention = next(op for op in LLAMA if op.kind == "attention")
    apart = Graph("apart", tuple(replace(attention, name=f"layers.{i}", repeat=1) for i in range(5)))
    assert sum(op.repeat for op in HALVED["layers"](apart)) == 3
    assert sum(op.repeat for op in HALVED["layers"](Graph("folded", (replace(attention, repeat=5),)))) == 3


def test_a_latent_cache_has_no_heads_to_halve() -> None:
    rows = {row["halved"]: row for row in LongContextCost().measure(capture("deepseek-v2-lite"), A100, Step.decode(1, 8192)).rows}
    assert rows["heads"]["cuts"] == ()
    assert rows["bits"]["cache_bytes"] == pytest.approx(rows["nothing"]["cache_bytes"] / 2)


def test_without_the_cache_nothing_grows_but_the_prompt() -> None:
    found = LongContextCost().baseline().measure(LLAMA, A100, Step.decode(1, 50_000)).values
    assert found["cache_bytes"] == found["switch_seconds"] == 0


def test_it_says_what_does_not_fit_or_is_missing() -> None:
    with pytest.raises(NarrowsError, match="needs"):
        LongContextCost().measure(capture("llama-3.1-70b"), A100, Step.decode(1, 4096))
    with pytest.raises(NarrowsError, match="no link to a host"):
        LongContextCost().measure(LLAMA, replace(A100, links=()), Step.decode(1, 4096))
    with pytest.raises(NarrowsError, match="does no work"):
        LongContextCost().measure(Graph("empty", ()), A100, Step.decode(1, 4096))
    with pytest.raises(NarrowsError, match="rounds"):
        LongContextCost(rounds=0)
