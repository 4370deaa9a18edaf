"""Ops and graphs: validation, folding, files."""

import json
from copy import copy

import pytest

from narrows.errors import NarrowsError
from narrows.graph import BF16, FP32, DType, Graph, Op, Size
from narrows.step import Step

T = Size.of(tokens=1)


def linear(name: str = "layers.0.q", **more) -> Op:
    return Op(name, "linear", {"rows": T, "inputs": 64, "outputs": 32}, weight=BF16, **more)


def test_sizes_are_linear_forms() -> None:
    size = 2 * T + Size.of(sequences=3) + 5
    assert size.at(Step.forward(4, 10)) == 2 * 40 + 3 * 4 + 5
    assert str(T) == "tokens"


def test_an_op_knows_its_parameters_and_bytes() -> None:
    op = linear(repeat=3)
    assert op.parameters == 3 * 64 * 32
    assert op.weight_bytes == 3 * 64 * 32 * 2
    assert linear().but(bias=1).parameters == 65 * 32
    assert linear(tied="embed").parameters == 0
    assert linear(tied="embed").stored_bytes == 64 * 32 * 2  # still read


def test_grouped_formats_count_scales_and_zeros() -> None:
    int4 = DType("int4", 4, group=32, scale_bits=16, zero_bits=4)
    assert int4.bytes(64 * 32, 64) == (64 * 32 * 4 + 32 * 2 * 20) / 8
    per_row = DType("int8", 8, scale_bits=32)
    assert per_row.bytes(64 * 32, 64) == 64 * 32 + 32 * 4
    assert linear().but(weight=int4, bias=1).stored_bytes == int4.bytes(64 * 32, 64) + 32 * 2  # the bias stays bf16


def test_but_tells_dims_from_edges() -> None:
    op = linear().but(inputs=16)
    assert op["inputs"] == 16
    assert op.but(inputs=("x",)).inputs == ("x",)


@pytest.mark.parametrize("change", [{"kind": "liner"}, {"dims": {"rows": 1}}, {"dims": {"rows": 1, "inputs": -1, "outputs": 2}},
                                    {"dims": {"rows": 1, "inputs": float("nan"), "outputs": 2}},
                                    {"dims": {"rows": 1, "inputs": 1, "outputs": 2, "heads": 3}}])  # fmt: skip
def test_an_op_that_makes_no_sense_is_refused(change: dict) -> None:
    with pytest.raises(NarrowsError, match="op"):
        Op(**{"name": "op", "kind": "linear", "dims": {"rows": 1, "inputs": 1, "outputs": 1}, **change})


def test_folding_joins_layers_that_differ_in_their_index() -> None:
    graph = Graph(
        "g", (linear("layers.0.q"), linear("layers.1.q", inputs=("layers.0.q",)), linear("layers.2.q", inputs=("layers.1.q",)))
    )
    folded = graph.fold()
    assert [(op.name, op.repeat) for op in folded] == [("layers.*.q", 1), ("layers.*.q", 2)]
    assert folded.parameters == graph.parameters
    assert folded.fold() == folded


def test_a_graph_file_reads_back_equal() -> None:
    graph = Graph(
        "g",
        (linear(saved=T, segments=2, act=FP32), Op("a", "checkpoint", {"elements": T})),
        "config.json",
        ("a note",),
        eager=True,
    )
    assert Graph.from_json(graph.to_json()) == graph


def test_a_copy_in_another_process_finds_its_own_hash() -> None:
    graph = Graph("x", (Op("a", "linear", {"rows": 1, "inputs": 2, "outputs": 3}),))
    once = hash(graph)
    assert once == hash(graph) == hash(Graph("x", graph.ops)) and len({graph, Graph("x", graph.ops)}) == 1
    assert set(graph.__getstate__()) == {"name", "ops", "source", "notes", "eager"}
    assert copy(graph) == graph and hash(copy(graph)) == once


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": "narrows-graph-2"}', '{"format": "narrows-graph-1", "ops": [1]}', "[" * 100_000]
)
def test_a_bad_graph_file_gives_one_clear_error(text: str) -> None:
    with pytest.raises(NarrowsError, match=r"file\.json"):
        Graph.from_json(text, "file.json")


def test_a_graph_file_with_a_bad_op_names_it() -> None:
    data = json.loads(Graph("g", (linear(),)).to_json())
    data["ops"][0]["dims"]["inputs"] = -3
    with pytest.raises(NarrowsError, match=r"layers\.0\.q"):
        Graph.from_json(json.dumps(data))
