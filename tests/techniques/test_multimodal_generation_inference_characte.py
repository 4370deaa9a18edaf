"""Levers of generation: unfused attention does the same work with more traffic, shares add up, drafts give what a draw gives."""

from dataclasses import replace

import numpy as np
import pytest

from narrows.capture import capture
from narrows.cost import total
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.profiling_cost_models.multimodal_generation_inference_characte import (
    LEVERS,
    SHARES,
    GenerationLevers,
    unfused,
)

HERE = machine("a100-80gb")
DECODE = Step.decode(1, 1024)


def test_unfused_attention_multiplies_as_much_and_moves_scores_and_a_copy_of_the_cache() -> None:
    graph = replace(capture("llama-2-7b"), eager=True)
    apart = unfused(graph, DECODE)
    layers, heads, width, keys, byte = 32, 32, 128, 1025, 2
    products = {op.name: op for op in apart if op.name.endswith((".scores", ".values"))}
    assert sum(op.spec.flop(op.sized(DECODE)) * op.repeat for op in products.values()) == 4 * layers * heads * width * keys
    whole, before = total(apart, DECODE), total(graph, DECODE)
    cache = 2 * layers * heads * width * keys * byte
    scores = layers * heads * keys * byte
    more = float(whole.read_bytes + whole.write_bytes - before.read_bytes - before.write_bytes)
    # the copy runs as two kernels: 3 to 4 times the cache; each of the kernels between the products passes the scores
    assert 3 * cache <= more <= 4 * cache + 20 * scores
    assert unfused(capture("resnet-50"), Step.forward(1, 1)).ops == capture("resnet-50").ops


@pytest.mark.parametrize(("name", "bound"), [("smollm2-135m", 1), ("llama-2-70b", 0)])
def test_small_models_are_launch_bound_and_shares_add_up(name: str, bound: int) -> None:
    read = GenerationLevers().measure(capture(name), HERE, DECODE)
    assert read.values["launch_bound"] == bound
    for row in read.rows:
        assert sum(row[share] for share in SHARES) == pytest.approx(1)
    assert [row["lever"] for row in read.rows] == ["none", *LEVERS]
    assert all(row["gain"] >= 1 for row in read.rows)
    assert np.prod([row["gain"] for row in read.rows]) == pytest.approx(read.values["gain"])


def test_large_batches_gain_little_from_a_compiler() -> None:
    def compiled(batch: int) -> float:
        rows = GenerationLevers().measure(capture("llama-3.2-1b"), HERE, Step.decode(batch, 1024)).rows
        return float(rows[2]["gain"])

    assert 1 <= compiled(256) < 1.2
    assert compiled(1) > 1.5


def test_layer_skipping_is_for_decode_and_pays_by_the_tokens_a_round_gives() -> None:
    graph = capture("llama-2-7b")
    technique, never = GenerationLevers(), GenerationLevers(acceptance=0.0)
    assert technique.skip_gain(graph, HERE, Step.prefill(1, 512)) == 1
    assert technique.skip_gain(capture("resnet-50").map(lambda op: replace(op, repeat=1)), HERE, DECODE) == 1
    agreed = np.random.default_rng(0).random((200_000, technique.drafted)) < technique.acceptance
    tokens = 1 + np.cumprod(agreed, axis=1).sum(1).mean()  # the check gives one more than what was agreed on
    gain = technique.skip_gain(graph, HERE, DECODE) / never.skip_gain(graph, HERE, DECODE)
    assert gain == pytest.approx(tokens, rel=0.01)
    assert never.skip_gain(graph, HERE, DECODE) < 1


def test_without_idle_time_and_levers_nothing_is_found() -> None:
    read = GenerationLevers().baseline().measure(capture("smollm2-135m"), HERE, DECODE)  # type: ignore[attr-defined]
    assert (read.values["idle_share"], read.values["gain"]) == (0, 1)


@pytest.mark.parametrize("options", [{"levers": 5}, {"exit_share": 1.0}, {"acceptance": 1.0}, {"drafted": 0}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(NarrowsError):
        GenerationLevers(**options)  # type: ignore[arg-type]


def test_nothing_to_run_is_refused() -> None:
    with pytest.raises(NarrowsError, match="no operator"):
        GenerationLevers().profile(lambda: None, rounds=1)
    with pytest.raises(NarrowsError, match="no time"):
        GenerationLevers().measure(Graph("empty", ()), HERE, DECODE)
