"""Where grouped n:m layers are refused, and that saved ones load."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from narrows.capture import capture
from narrows.capture.torch import from_module
from narrows.errors import NarrowsError
from narrows.free import Bf16
from narrows.machine import machine
from narrows.plan import Plan
from narrows.step import Step
from narrows.technique import No
from narrows.techniques.sparsity_pruning.sten import STen


def test_where_it_does_not_pay_or_fit_it_says_so() -> None:
    example = STen.example()
    graph = from_module(example.model, example.step)
    assert STen().check(graph, machine("xeon-amx"), example.step) is True
    bert = capture("bert-base")
    refusal = str(STen().check(bert, machine("h100-sxm"), Step.forward(8, 128)))
    assert "runs on CPUs" in refusal
    assert 1.1 < float(refusal.split("at most ")[1].split()[0]) < 2
    assert "no multiples of 128 and 4" in str(STen(g=32).check(graph, None, example.step))
    few = from_module(example.model, Step.forward(1, 8))
    assert "8 rows" in str(STen().check(few, None, Step.forward(1, 8)))
    with pytest.raises(NarrowsError, match="3:4"):
        STen("3:4")


def test_a_saved_layer_loads_into_the_structure() -> None:
    example = STen.example()
    other = deepcopy(example.model)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    sparse, structure = STen().apply(example.model), STen().restructure(other)
    structure.load_state_dict(sparse.state_dict())
    batch = example.data[0]
    with torch.no_grad():
        torch.testing.assert_close(structure(**batch), sparse(**batch))


def test_a_sparse_network_is_not_cast_to_numbers_that_its_kernel_does_not_take() -> None:
    example = STen.example()
    verdict = Plan((STen(), Bf16())).check(from_module(example.model, example.step), None, example.step)
    assert isinstance(verdict, No)
    assert "fp32" in verdict.reason
