"""The model of a program's text: what it reads, that it learns an additive cost and a largest one, and what it refuses."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.graph import FP32, Graph, Op
from narrows.modules.sequence_cost import SequenceCost, tensor
from narrows.step import Step
from narrows.technique import technique
from narrows.techniques.profiling_cost_models.ml_cost_model_for_mlir import Program, text, words

Model = technique("ml-cost-model-for-mlir")


def program(*widths: int) -> Program:
    names = [f"op{i}" for i in range(len(widths))]
    ops = [
        Op(name, "linear", {"rows": 32, "inputs": before, "outputs": after}, act=FP32, weight=FP32, inputs=(read,))
        for name, read, before, after in zip(names, ["x", *names], widths, widths[1:], strict=False)
    ]
    return Graph("chain", tuple(ops)), Step.forward(32, 1)


def test_a_graph_is_written_one_line_an_op() -> None:
    first, second = text(*program(64, 128, 16)).splitlines()
    assert first == "%0 = linear() rows=32 inputs=64 outputs=128 matrices=1 as fp32 kernels=1 times=1"
    assert second.startswith("%1 = linear(%0) rows=32 inputs=128")
    assert words(second)[:4] == [("linear", 1.0), ("rows", 32.0), ("inputs", 128.0), ("outputs", 16.0)]
    assert len(text(capture("llama-3.2-1b"), Step.train(1, 64)).splitlines()) == len(capture("llama-3.2-1b").ops)


@pytest.mark.parametrize("gather", [sum, max])
def test_it_learns_sums_and_maxima_over_lines(gather) -> None:  # type: ignore[no-untyped-def]
    draw = random.Random(0)
    chains = [[2 ** draw.randint(3, 9) for _ in range(draw.randint(2, 5))] for _ in range(100)]
    costs = [float(gather(a * b for a, b in pairwise(chain))) for chain in chains]
    programs = [program(*chain) for chain in chains]
    learnt = Model(members=1, epochs=40).fit(programs[:80], costs[:80])(programs[80:])
    error = np.abs(learnt / costs[80:] - 1).mean()
    assert error < 0.35


def test_a_program_costs_the_same_alone_and_beside_longer_ones() -> None:
    torch.manual_seed(0)
    model = SequenceCost(3, 8)
    short, long = [[(0, 4.0)], [(1, 2.0)]], [[(0, 4.0), (2, 9.0)]] * 5
    alone, beside = model(tensor([short], 3)), model(tensor([short, long], 3))
    torch.testing.assert_close(alone[0], beside[0])


def test_what_no_example_has_is_refused() -> None:
    predict = Model(members=1, epochs=1).fit([program(8, 8 * i) for i in range(1, 9)], [1.0] * 8)
    with pytest.raises(NarrowsError, match="attention"):
        predict([(capture("gpt2"), Step.forward(1, 8))])


@pytest.mark.parametrize("costs", [[1.0] * 7, [1.0] * 7 + [0.0], [1.0] * 7 + [float("nan")]])
def test_examples_that_teach_nothing_are_refused(costs: list[float]) -> None:
    with pytest.raises(NarrowsError, match="programs"):
        Model().fit([program(8, 8)] * len(costs), costs)
    with pytest.raises(NarrowsError, match="programs"):
        Model().measure(Graph("empty", ()), None, Step.forward(1, 8))
