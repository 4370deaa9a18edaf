"""Recommenders on servers: the model of a core by hand, laws of sharing, a profiler whose clock is known, and refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrows.errors import NarrowsError
from narrows.experiments.facebook_dnn_recommendation_workloads import SERVERS, SHAPES, graph
from narrows.graph import FP32, Graph, Op, Size
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.gnn_recsys_retrieval.facebook_dnn_recommendation_workloads import (
    GATHER_BYTES_PER_SECOND,
    RecommenderServing,
)

BROADWELL = machine("xeon-broadwell")


def test_the_open_models_have_the_parameters_and_gathers_of_their_tables() -> None:
    for name, shape in SHAPES.items():
        tables = graph(name).find("embedding")
        assert sum(op.parameters for op in tables) == shape.tables * shape.rows * shape.width
        rows = sum(op.sized(Step.forward(5))["rows"] * op.repeat for op in tables)
        assert rows == 5 * shape.tables * shape.lookups


def test_gathering_takes_its_bytes_over_what_a_core_has_in_flight() -> None:
    table = Op("table", "embedding", {"rows": Size.of(sequences=100), "outputs": 32, "vocabulary": 10**6}, FP32, FP32)
    one = RecommenderServing().seconds(Graph("tables", (table,)), BROADWELL, Step.forward(64))
    assert one["gather"] == pytest.approx(64 * 100 * 32 * 4 / GATHER_BYTES_PER_SECOND + BROADWELL.launch_seconds)
    full = RecommenderServing().seconds(Graph("tables", (table,)), BROADWELL, Step.forward(64), BROADWELL.units)
    assert full["gather"] == pytest.approx(64 * 100 * 32 * 4 / (76.8e9 / 14) + BROADWELL.launch_seconds)


@given(name=st.sampled_from(sorted(SHAPES)), server=st.sampled_from(SERVERS), power=st.integers(0, 8))
def test_neighbours_never_make_an_inference_faster_nor_a_server_slower(name: str, server: str, power: int) -> None:
    there, step = machine(server), Step.forward(2**power)
    took = [sum(RecommenderServing().seconds(graph(name), there, step, n).values()) for n in (1, 2, 4, 8, there.units)]
    assert took == sorted(took)
    assert there.units / took[-1] >= 1 / took[0]


def test_the_best_batch_and_instances_keep_the_bound() -> None:
    found = RecommenderServing(bound_seconds=0.002).measure(graph("RMC2"), BROADWELL, Step.forward(64))
    assert found.rows and all(row["latency_seconds"] <= 0.002 for row in found.rows)
    loose = RecommenderServing(bound_seconds=0.1).measure(graph("RMC2"), BROADWELL, Step.forward(64))
    assert loose.values["items_per_second"] >= found.values["items_per_second"] > 0
    assert RecommenderServing(pack=False).measure(graph("RMC2"), BROADWELL, Step.forward(64)).values["gain"] == pytest.approx(1.0)


def test_a_traced_graph_keeps_its_batch() -> None:
    op = Op("fc", "linear", {"rows": 32, "inputs": 256, "outputs": 256}, FP32, FP32)
    found = RecommenderServing().measure(Graph("traced", (op,)), BROADWELL, Step.forward(32))
    assert {row["batch"] for row in found.rows} == {32}


def test_the_profile_attributes_by_kind_where_the_clock_is_known() -> None:
    now = [0.0]

    def slow(module: torch.nn.Module, seconds: float) -> torch.nn.Module:
        forward = module.forward

        def later(*given: torch.Tensor) -> torch.Tensor:
            now[0] += seconds
            return forward(*given)

        module.forward = later  # type: ignore[method-assign, assignment]
        return module

    model = torch.nn.Sequential(slow(torch.nn.EmbeddingBag(8, 4), 3.0), slow(torch.nn.Linear(4, 1), 1.0))
    inputs = (torch.zeros(2, 2, dtype=torch.long),)
    found = RecommenderServing().profile(model, inputs, runs=3, clock=lambda: now[0])
    assert found.values == pytest.approx({"seconds": 4.0, "gather_share": 0.75, "dense_share": 0.25})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_it_refuses_more_instances_than_cores_and_bounds_that_nothing_keeps() -> None:
    with pytest.raises(NarrowsError, match="15 instances on 14 cores"):
        RecommenderServing().seconds(graph("RMC1"), BROADWELL, Step.forward(), 15)
    with pytest.raises(NarrowsError, match="larger bound_seconds"):
        RecommenderServing(bound_seconds=1e-6).measure(graph("RMC1"), BROADWELL, Step.forward())
    with pytest.raises(NarrowsError, match="no bound"):
        RecommenderServing(bound_seconds=0.0)
    with pytest.raises(NarrowsError, match="does no work"):
        RecommenderServing().measure(Graph("empty", ()), BROADWELL, Step.forward())
