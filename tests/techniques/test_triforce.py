"""TriForce: the target's own tokens whatever is proposed, acceptance, and what a machine gains."""

import pytest
import torch

from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.machine import machine
from narrows.samples import tiny_llama
from narrows.step import Step
from narrows.techniques.decoding.triforce import TriForce, expected

OPTIONS = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("budget,chunk", [(48, 8), (120, 5), (400, 8)])
@pytest.mark.parametrize("by", ["retrieval", "recency"])
@pytest.mark.parametrize("draft", [None, "other", "same"])
def test_the_tokens_are_those_of_the_target(budget: int, chunk: int, by: str, draft: str | None) -> None:
    model = tiny_llama(4, tokens=8)[0].eval()
    small = {None: None, "other": tiny_llama(1, tokens=8)[0].eval(), "same": model}[draft]
    prompt = torch.randint(1, 128, (1, 203), generator=torch.Generator().manual_seed(1))
    truth = model.generate(prompt, max_new_tokens=21, **OPTIONS)
    found = TriForce(budget, chunk, outer=5, inner=2, window=32, by=by).generate(model, prompt, 21, small)
    assert torch.equal(found.ids, truth)
    assert found.taken + found.steps["target"] >= 21 and found.taken <= found.proposed
    if budget == 400:  # the sparse cache lacks nothing
        assert found.acceptance == 1.0
    assert (found.steps["draft"] > 0) == (draft is not None)


def test_what_is_expected_of_a_check() -> None:
    assert expected(0.0, 6) == 1.0 and expected(1.0, 6) == 7.0
    assert expected(0.5, 2) == pytest.approx(1 + 0.5 + 0.25)


def test_more_taken_is_more_gained_and_short_contexts_gain_nothing() -> None:
    graph, device = capture("llama-2-7b"), machine("a100-80gb")
    long = TriForce().measure(graph, device, Step.decode(1, 100_000))
    gains = [row["speedup"] for row in long.rows]
    assert gains == sorted(gains) and long.values["speedup"] > 1.5
    assert TriForce().measure(graph, device, Step.decode(1, 1000)).values["speedup"] < 1.0


@pytest.mark.parametrize("wrong", [{"budget": 8}, {"outer": 0}, {"taken": 1.5}, {"by": "luck"}])
def test_impossible_options_raise(wrong: dict) -> None:
    with pytest.raises(NarrowsError, match="is not possible"):
        TriForce(**wrong)
