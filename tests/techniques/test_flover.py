"""Flover: fused generation against each request alone, slots that are freed, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.machine import machine
from narrows.modules.fused_generation import Asked, Slots, generate
from narrows.simulate.demand import Demand
from narrows.simulate.fleet import Group, rules
from narrows.simulate.requests import Request
from narrows.techniques.serving.flover import Flover


def small() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **shape)
    return LlamaForCausalLM(config).double().eval()  # type: ignore[no-untyped-call,no-any-return]


MODEL = small()
asked = st.builds(Asked, st.integers(0, 12), st.lists(st.integers(0, 60), min_size=1, max_size=9), st.integers(1, 8))


@settings(max_examples=15, deadline=None)
@given(st.lists(asked, min_size=1, max_size=5), st.booleans())
def test_every_answer_is_that_of_the_request_alone(load: list[Asked], fused: bool) -> None:
    together = generate(MODEL, load, fused)
    assert together.answers == [generate(MODEL, [one]).answers[0] for one in load]
    longest, whole = max(one.tokens for one in load) - 1, sum(one.tokens - 1 for one in load)
    assert longest <= together.passes <= whole


def test_what_comes_later_joins_and_what_is_done_leaves() -> None:
    load = [Asked(0, [1, 2, 3], 9), Asked(2, [4], 3), Asked(4, [5, 6], 4)]
    fused, batches = generate(MODEL, load), generate(MODEL, load, fused=False)
    assert (fused.passes, batches.passes) == (8, 8 + 3)
    assert fused.most_held == 2 * 9  # three slots at no time: the second has its tokens when the third comes


def test_a_freed_slot_holds_the_last_one_and_no_empty_columns() -> None:
    slots = Slots(MODEL)
    with torch.no_grad():
        for owner, prompt in enumerate(([1, 2, 3, 4, 5], [6], [7, 8])):
            slots.join(owner, prompt)
    kept = slots.cache.layers[0].keys[2, :, -2:].clone()  # type: ignore[index]
    slots.leave(0)
    assert (slots.owners, slots.lengths, slots.held) == ([2, 1], [2, 1], 4)
    assert torch.equal(slots.cache.layers[0].keys[0], kept)  # type: ignore[index]


@pytest.mark.parametrize("one", [Asked(0, [], 3), Asked(0, [1], 0)])
def test_an_empty_prompt_or_answer_is_refused(one: Asked) -> None:
    with pytest.raises(NarrowsError, match="request 1 has"):
        generate(MODEL, [Asked(0, [1], 1), one])


def test_nothing_to_fuse_is_refused() -> None:
    group = Group(capture("smollm2-135m"), machine("a100-80gb"), rules("vllm-v1"))
    verdict = Flover().check(Demand(group, (Request(0, 9, 1), Request(5, 9, 30))))
    assert not verdict
    assert "1 of its requests" in verdict.reason  # type: ignore[union-attr]
