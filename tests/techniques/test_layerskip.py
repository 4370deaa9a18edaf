"""LayerSkip: drafts change no token, what training asks of the exits, and what a machine gains."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.machine import machine
from narrows.modules.early_exit import dropout_rates, dropping, exit_loss
from narrows.samples import tiny_llama
from narrows.step import Step
from narrows.techniques.decoding.layerskip import LayerSkip

OPTIONS = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("exit", [0.25, 0.75])
@pytest.mark.parametrize("ahead", [1, 4])
def test_the_tokens_are_those_of_the_whole_model(exit: float, ahead: int) -> None:
    model, batches = tiny_llama(4, tokens=20)
    prompt = batches[0]["input_ids"][:1]
    truth = model.eval().generate(prompt, max_new_tokens=17, **OPTIONS)
    found = LayerSkip(exit, ahead).generate(model, prompt, 17)
    assert torch.equal(found.ids, truth)
    assert 0 <= found.taken <= found.proposed
    assert found.steps["target"] - 1 + found.taken >= 16
    assert len(model.model.layers) == 4


def test_layers_above_that_add_nothing_take_every_draft() -> None:
    model, batches = tiny_llama(4, tokens=20)
    with torch.no_grad():
        for layer in model.eval().model.layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    assert LayerSkip(0.25, 3).generate(model, batches[0]["input_ids"][:1], 12).acceptance == 1.0


def test_models_without_a_stack_or_depth_are_refused() -> None:
    with pytest.raises(NarrowsError, match="no stack of layers"):
        LayerSkip().generate(torch.nn.Linear(2, 2), torch.zeros(1, 3, dtype=torch.long), 1)
    with pytest.raises(NarrowsError, match="cannot exit after 1 of 1"):
        LayerSkip().generate(tiny_llama(1, tokens=8)[0], torch.zeros(1, 3, dtype=torch.long), 1)


def test_the_loss_without_exits_is_the_plain_one_and_exits_reach_lower_layers() -> None:
    model, batches = tiny_llama(4, tokens=20)
    ids = batches[0]["input_ids"]
    plain = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(exit_loss(model, ids, [], 1.0), plain)
    LayerSkip(dropout=0.0, rotation=1).loss(model, ids, 0).backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    with dropping(model, 1.0):
        torch.manual_seed(0)
        assert not torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_dropout_grows_with_depth() -> None:
    rates = dropout_rates(8, 0.2)
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.2) and rates == sorted(rates)


def test_more_taken_is_more_gained_and_nothing_taken_is_a_loss() -> None:
    graph, device, step = capture("llama-2-7b"), machine("a100-80gb"), Step.decode(1, 1024)
    gains = [LayerSkip(taken=taken).measure(graph, device, step).values["speedup"] for taken in (0.0, 0.5, 0.9)]
    assert gains == sorted(gains) and gains[0] < 1 < gains[2]
