"""Where sparse training is refused, and what it leaves alone."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from narrows.capture import capture
from narrows.capture.torch import from_module
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import machine
from narrows.step import Step
from narrows.technique import No
from narrows.techniques.sparsity_pruning.sparseprop import SparseProp


@pytest.fixture(scope="module")
def graph() -> Graph:
    example = SparseProp.example()
    return from_module(example.model, example.step)


@pytest.mark.parametrize(
    ("technique", "device", "step", "reason"),
    [
        (SparseProp(), "h100-sxm", Step.forward(2, 64), "runs on CPUs"),
        (SparseProp(0.5), "xeon-8480", Step.forward(2, 64), "sparsity=0.5"),
        (SparseProp(0.7), "xeon-8480", Step.train(2, 64), "up to 0.8"),
        (SparseProp(), "xeon-8480", Step.decode(2, 64), "dense products"),
    ],
)
def test_where_it_does_not_pay_it_says_so(graph: Graph, technique: SparseProp, device: str, step: Step, reason: str) -> None:
    verdict = technique.check(graph, machine(device), step)
    assert isinstance(verdict, No)
    assert reason in verdict.reason


def test_few_rows_and_other_numbers_are_refused() -> None:
    few = from_module(SparseProp.example().model, Step.forward(1, 8))
    assert "8 rows" in str(SparseProp().check(few, None, Step.forward(1, 8)))
    assert "bf16" in str(SparseProp().check(capture("llama-3.2-1b"), None, Step.prefill(1, 512)))


def test_a_pruned_network_keeps_its_function_and_a_spoilt_one_is_refused() -> None:
    example = SparseProp.example()
    model, batch = example.model, example.data[0]
    for linear in (m for m in model if isinstance(m, nn.Linear)):  # type: ignore[attr-defined]
        linear.weight.data[:, 8:] = 0
    with torch.no_grad():
        before = model(**batch)
        torch.testing.assert_close(SparseProp().apply(deepcopy(model), [])(**batch), before)
    model[1].weight.data[0, 0] = torch.nan  # type: ignore[index]
    with pytest.raises(NarrowsError, match="NaN"):
        SparseProp().apply(model, [])


def test_its_options_are_checked() -> None:
    with pytest.raises(NarrowsError, match="sparsity=1"):
        SparseProp(1.0)
    with pytest.raises(NarrowsError, match="float16"):
        SparseProp().apply(nn.Sequential(nn.Linear(8, 8)).half(), [])
