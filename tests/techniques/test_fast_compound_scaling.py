"""Scaling a graph: the exponents of the closed form, the networks as built, and what cannot be scaled."""

import math

import pytest
import torch

from narrows.capture import capture
from narrows.capture.torch import from_module
from narrows.errors import NarrowsError
from narrows.experiments.fast_compound_scaling import FAMILIES, network
from narrows.graph import Graph
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.scaling_laws.fast_compound_scaling import FastCompoundScaling, growth, scaled

HERE, STEP = machine("a100-80gb"), Step.forward(1, 1)


@pytest.mark.parametrize(
    ("strategy", "parameters", "activations"),
    [("depth", 1, 1), ("width", 1, 0.5), ("resolution", 0, 1), ("uniform", 2 / 3, 5 / 6), ("fast", 0.9, 0.6)],
)
def test_exponents_are_those_of_the_closed_form(strategy: str, parameters: float, activations: float) -> None:
    """FLOP go with d w^2 r^2, parameters with d w^2, activations with d w r^2; the stem and rounding bend them a little."""
    read = FastCompoundScaling().measure(capture("resnet-50"), HERE, STEP)
    (row,) = [row for row in read.rows if (row["strategy"], row["s"]) == (strategy, 8.0)]
    assert math.log(row["flop"], 8) == pytest.approx(1, abs=0.04)
    assert math.log(row["parameters"], 8) == pytest.approx(parameters, abs=0.04)
    assert math.log(row["activations"], 8) == pytest.approx(activations, abs=0.04)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", ["width", "resolution"])
def test_a_scaled_graph_is_the_graph_of_the_network_as_built(family: str, strategy: str) -> None:
    def built(by: tuple[float, float, float]) -> Graph:
        with torch.device("meta"):
            net, side = network(family, by)
            return from_module(torch.nn.Sequential(torch.nn.Upsample(size=(side, side)), net), STEP)

    def flop(graph: Graph, by: tuple[float, float, float]) -> float:
        ops = [(op, times) for op, times in scaled(graph, by) if op.kind == "conv"]
        return sum(op.spec.flop(op.sized(STEP)) * op.repeat * times for op, times in ops)

    by, same = growth(strategy, 4, 0.8), (1.0, 1.0, 1.0)
    before, after = built(same), built(by)
    assert flop(before, by) / flop(after, same) == pytest.approx(1, abs=0.01)


def test_depth_is_a_real_number_and_ends_stay() -> None:
    ops = scaled(capture("resnet-50"), (1.5, 1.0, 1.0))
    assert {times for op, times in ops if op.kind == "conv"} == {1.0, 1.5}
    assert [times for op, times in ops if op.kind == "conv"].count(1.0) == 1


def test_the_proxy_is_what_seconds_are_taken_to_grow_with() -> None:
    by_activations, by_flop = (
        FastCompoundScaling(proxy=name).measure(capture("resnet-50"), HERE, STEP).values["proxy_seconds"]
        for name in ("activations", "flop")
    )
    assert by_activations / by_flop == pytest.approx(8**-0.4, rel=0.05)


def test_other_networks_and_options_are_refused() -> None:
    with pytest.raises(NarrowsError, match="convolution"):
        FastCompoundScaling().measure(capture("gpt2"), HERE, Step.forward(1, 8))
    with pytest.raises(NarrowsError, match="share"):
        FastCompoundScaling(alpha=1.5)
    with pytest.raises(NarrowsError, match="seconds"):
        FastCompoundScaling(proxy="seconds")
