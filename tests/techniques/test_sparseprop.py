"""Where sparse training is refused, and what it leaves alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from narrows.capture import capture
from narrows.capture.torch import from_module
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import machine
from narrows.step import Step
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
        (SparseProp(), "xeon-8480", Step.decode(2, 64), "dense"),
    ],
)
def test_where_it_does_not_pay_it_says_so(graph: Graph, technique: SparseProp, device: str, step: Step, reason: str) -> None:
    assert technique.check(graph, machine(device), Step.forward(2, 64) if step.phase == "decode" else step) is not None
    verdict = technique.check(graph, machine(device), step)
    assert not verdict
    assert reason in verdict.reason  # type: ignore[union-attr]
