"""Data movement: gradients and fusion with known answers, the count against the cost model, layouts against all paths."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.capture import capture
from narrows.cost import total
from narrows.errors import NarrowsError
from narrows.experiments.data_movement_is_all_you_need import encoder
from narrows.graph import Graph
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.profiling_cost_models.data_movement_is_all_you_need import (
    Dataflow,
    DataMovement,
    Operator,
    dataflow,
    path_seconds,
    shortest,
)

CHAIN = Dataflow(
    (
        Operator("lin", "contraction", ("x", "w"), ("a",)),
        Operator("bias", "bias", ("a",), ("b",)),
        Operator("relu", "map", ("b",), ("c",), ("b",)),
        Operator("add", "add", ("c", "x"), ("y",)),
    ),
    {"x": 10, "w": 3, "a": 10, "b": 10, "c": 10, "y": 10},
)


def test_a_chain_becomes_one_kernel_that_writes_only_its_result() -> None:
    product, joined = CHAIN.fused().operators
    assert product == CHAIN.operators[0]
    assert (joined.name, joined.reads, joined.writes) == ("bias + relu + add", ("a", "x"), ("y",))
    assert (CHAIN.bytes, CHAIN.fused().bytes) == (23 + 20 + 20 + 30, 23 + 30)


def test_the_backward_pass_has_each_gradient_once_and_keeps_what_it_needs() -> None:
    whole = CHAIN.training()
    assert [one.name for one in whole.operators[4:]] == ["relu db", "bias dW", "lin dx", "lin dw", "sum x"]
    by = {one.name: one for one in whole.operators}
    assert by["relu db"].reads == ("d:y", "b")  # an addition passes its gradient on as it is
    assert by["lin dw"].reads == ("d:b", "x")
    assert by["sum x"].reads == ("d:y", "d:x+1")
    joined = whole.fused().operators[1]
    assert joined.writes == ("b", "y"), "what the backward pass reads is written"


@given(st.integers(1, 4), st.integers(2, 64), st.integers(1, 4), st.integers(1, 4))
def test_fusion_never_adds_bytes_and_leaves_every_read_written(batch: int, tokens: int, heads: int, wider: int) -> None:
    flow = encoder(batch, tokens, 16 * heads, heads, 16 * heads * wider, 2).training()
    fused = flow.fused()
    assert fused.bytes < flow.bytes
    known = {"x", "wqkv", "wo", "w1", "w2", "d:z4"}
    for one in fused.operators:
        assert set(one.reads) <= known, one.name
        known |= set(one.writes)
    assert {"z4", "d:x", "d:wqkv", "d:wo", "d:w1", "d:w2"} <= known
    names = [name for one in fused.operators for name in one.name.split(" + ")]
    assert names == [one.name for one in flow.operators]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("llama-3.2-1b", Step.forward(2, 512)),
        ("llama-3.2-1b", Step.decode(4, 1024)),
        ("gpt2", Step.forward(2, 128)),
        ("deepseek-v2-lite", Step.decode(2, 512)),
    ],
)
def test_each_operator_on_its_own_moves_what_the_cost_model_says(name: str, step: Step) -> None:
    graph = capture(name)
    work = total(replace(graph, eager=True), step)
    assert dataflow(graph, step, scores=False).bytes == pytest.approx(work.read_bytes + work.write_bytes, rel=2e-3)


def test_readings_add_up_and_know_fused_attention() -> None:
    graph, here, step = capture("bert-large"), machine("v100-sxm2-32gb"), Step.train(8, 512)
    read = DataMovement().measure(graph, here, step)
    assert sum(row["bytes"] for row in read.rows) == pytest.approx(read.values["fused_bytes"])
    assert sum(read.values[f"{name}_share"] for name in ("contraction", "normalization", "elementwise")) == pytest.approx(1)
    assert 0.1 < read.values["less"] < 0.3
    assert DataMovement(scores=False).measure(graph, here, step).values["less"] < read.values["less"]
    assert DataMovement(fuse=False).measure(graph, here, step).values["less"] == 0
    with pytest.raises(NarrowsError, match="nothing"):
        DataMovement().measure(Graph("empty", ()), here, step)


tables = st.fixed_dictionaries({pair: st.floats(0.1, 10) for pair in itertools.product("ab", repeat=2)})


@given(st.lists(tables, min_size=1, max_size=5))
def test_the_chosen_layouts_are_the_best_of_all_paths(costs: list[dict[tuple[str, str], float]]) -> None:
    path, seconds = shortest(costs)
    assert seconds == pytest.approx(path_seconds(costs, path))
    assert seconds == pytest.approx(min(path_seconds(costs, p) for p in itertools.product("ab", repeat=len(costs) + 1)))


def test_layouts_that_do_not_meet_are_refused() -> None:
    with pytest.raises(NarrowsError, match="no layout"):
        shortest([{("a", "b"): 1.0}, {("a", "a"): 1.0}])
