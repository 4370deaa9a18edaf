"""Measuring before against after: quality, bytes, the interleaved clock, and the gate that refuses."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from narrows import verify
from narrows.capture import capture
from narrows.graph import FP32
from narrows.machine import machine
from narrows.measured.kernels import in_format
from narrows.plan import Plan
from narrows.step import Step

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
PLAN = Plan.parse("bf16")


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(0, 128, (1, 32))} for _ in range(3)]


def noop() -> None:
    sum(range(20_000))


def measured(before, after, batches, predicted=(1.0, 0.9, 1.1), steps=(noop, noop), **more):  # type: ignore[no-untyped-def]
    return verify.verify(
        before, after, batches, PLAN, {"decode": predicted}, verify.resident_bytes(after), {"decode": steps}, **more
    )


def test_perplexity_is_that_of_the_loss(model: LlamaForCausalLM, batches: list) -> None:
    with torch.no_grad():
        loss = sum(float(model(**b, labels=b["input_ids"]).loss) for b in batches) / len(batches)
    assert verify.perplexity(model, batches) == pytest.approx(math.exp(loss), rel=1e-5)


def test_a_model_equals_itself(model: LlamaForCausalLM, batches: list) -> None:
    found = measured(model, copy.deepcopy(model), batches)
    assert found.quality_before == found.quality_after
    assert found.agreement == 1
    assert found.bytes_before == found.bytes_after == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert json.loads(json.dumps(verify.as_json(found)))["quality"] == "perplexity"


def test_the_gate_refuses_lost_quality_with_its_figure(model: LlamaForCausalLM, batches: list) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight.mul_(30)
    found = measured(model, broken, batches)
    assert not found.passed
    assert any("perplexity rose from" in f for f in found.failures)


def test_the_gate_refuses_a_prediction_that_did_not_come_true(model: LlamaForCausalLM, batches: list) -> None:
    found = measured(model, model, batches, predicted=(4.0, 3.8, 4.2))
    assert any("predicted 4.00 x" in f for f in found.failures)


def test_the_gate_refuses_bytes_that_were_not_saved(model: LlamaForCausalLM, batches: list) -> None:
    found = verify.verify(model, model, batches, PLAN, {}, verify.resident_bytes(model) / 2, {})
    assert any("weights take" in f for f in found.failures)


def test_the_user_s_own_quality_is_asked(model: LlamaForCausalLM, batches: list) -> None:
    found = measured(model, model, batches, quality=("mine", lambda m, b: 0.5))
    assert (found.quality, found.quality_after) == ("mine", 0.5)


def test_the_clock_pairs_its_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own: `before` takes 4 s drifting upwards, `after` 2 s; the ratio sees through the drift."""
    now = [0.0]
    monkeypatch.setattr(verify.time, "process_time", lambda: now[0])

    def work(seconds: float, drift: float = 0.0):  # type: ignore[no-untyped-def]
        calls = [0]

        def run() -> None:
            calls[0] += 1
            now[0] += seconds + drift * calls[0]

        return run

    before, after, ratio, same = verify.time_pair(work(4.0), work(2.0), rounds=5)
    assert (before, after, ratio, same) == (4.0, 2.0, 2.0, 1.0)
    _, _, ratio, same = verify.time_pair(work(4.0, 0.01), work(2.0, 0.02), rounds=5)
    assert ratio == pytest.approx(2.0, abs=0.05)
    assert same < 1


def test_a_mixture_of_formats_is_foreseen_with_the_errors_of_each() -> None:
    """Where each constant may be off by half as much again, the parts of a plan count by what they change of the step."""
    graph = in_format(capture("smollm2-135m"), FP32)
    known = {"median": 1.0, "low": 1 / 1.5, "high": 1.5}
    here = replace(machine("desktop-avx2"), efficiency={"step": known, "gain": known}, sources={})

    def width(plan: str) -> float:
        ours, theirs, (ratio, low, high) = verify.foreseen(graph, Plan.parse(plan), here, Step.decode(1, 128), "after")
        assert theirs.model == "after"
        assert ratio == pytest.approx(ours.seconds / theirs.seconds)
        assert low < ratio < high
        return math.log(high / low)

    assert width("bf16 + int8:but=gate_proj:int4g64") > 2 * math.log(1.5)  # none of it stays as it was
    assert width("int8:but=gate_proj:plain;up_proj:plain;down_proj:plain") < width("int8") < width("bf16 + int8")


def test_tied_weights_count_once(model: LlamaForCausalLM) -> None:
    own = verify.resident_bytes(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert verify.resident_bytes(model) == own - 128 * 64 * 4


def test_decoding_leaves_the_cache_as_it_was(model: LlamaForCausalLM) -> None:
    decode = verify.generation_steps(model, 8, 8)["decode"]
    first, second = decode(), decode()
    torch.testing.assert_close(first.logits, second.logits)  # type: ignore[attr-defined]


def test_results_are_kept_once_and_found_again(
    model: LlamaForCausalLM, batches: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "verified.csv"
    monkeypatch.setattr(verify, "results_file", lambda: file)
    assert verify.known_quality(PLAN) is None
    found = measured(model, model, batches, model="tiny")
    for _ in range(2):
        verify.record(found, "a machine", "a command", file)
    assert len(file.read_text().splitlines()) == 2
    assert verify.known_quality(PLAN) == ("perplexity", 1.0, "tiny")
    assert verify.known_quality(Plan.parse("bf16 + compile")) == ("perplexity", 1.0, "tiny")
    assert verify.known_quality(Plan.parse("llm-drop")) is None
