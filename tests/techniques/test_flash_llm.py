"""Tiled CSL of any shape and sparsity, saved layers, and where Flash-LLM is refused."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.machine import machine
from narrows.modules import csl_linear
from narrows.modules.csl_linear import CSLLinear
from narrows.step import Step
from narrows.technique import No
from narrows.techniques.sparsity_pruning.flash_llm import FlashLLM


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 150), st.integers(1, 300), st.floats(0, 1), st.booleans())
def test_the_largest_weights_come_back_and_are_multiplied(inputs: int, outputs: int, share: float, bias: bool) -> None:
    torch.manual_seed(inputs * outputs)
    plain = nn.Linear(inputs, outputs, bias)
    nonzeros = max(1, round(share * inputs * outputs))
    layer = CSLLinear.of(plain, nonzeros)
    weight = layer.weight()
    dense, kept = plain.weight.detach(), weight != 0
    assert int(kept.sum()) == nonzeros
    assert torch.equal(weight[kept], dense[kept].bfloat16().float())
    assert kept.all() or dense[kept].abs().min() >= dense[~kept].abs().max()
    x = torch.randn(2, 3, inputs)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, plain.bias))


def test_layers_that_are_expanded_piece_by_piece_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = CSLLinear.of(nn.Linear(100, 700), 14_000), torch.randn(5, 100)
    whole = layer(x)
    monkeypatch.setattr(csl_linear, "CHUNK", 128 * 100)
    torch.testing.assert_close(layer(x), whole)


def test_gradients_reach_the_inputs() -> None:
    layer, x = CSLLinear.of(nn.Linear(100, 70), 1400), torch.randn(5, 100, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight().sum(0).expand(5, -1))


def test_a_saved_layer_loads_into_the_structure() -> None:
    example = FlashLLM.example()
    structure = FlashLLM().restructure(deepcopy(example.model))
    sparse = FlashLLM().apply(example.model)
    structure.load_state_dict(sparse.state_dict())
    with torch.no_grad():
        assert torch.equal(structure(**example.data[0]).logits, sparse(**example.data[0]).logits)


def test_where_it_does_not_pay_it_says_so() -> None:
    graph, gpu = capture("llama-3.2-1b"), machine("h100-sxm")
    assert FlashLLM().check(graph, gpu, Step.decode(8, 2048)) is True
    for there, step, reason in (
        (machine("xeon-amx"), Step.decode(1, 2048), "times as long"),
        (gpu, Step.prefill(1, 4096), "would be 1 times as fast"),
        (gpu, Step.decode(512, 128), "not what holds them back"),
    ):
        verdict = FlashLLM().check(graph, there, step)
        assert isinstance(verdict, No)
        assert reason in verdict.reason
    with pytest.raises(NarrowsError, match=r"above 0\.5"):
        FlashLLM(0.4)


def test_a_layer_too_small_to_shrink_is_refused() -> None:
    with pytest.raises(NarrowsError, match="would take"):
        FlashLLM().apply(nn.Sequential(nn.Linear(2, 2)))
