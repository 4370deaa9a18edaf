import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.graph import FP32, Graph, Op
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.sparsity_pruning.sparse_distributed_representation_dendri import SparseRepresentation, mixture, overlaps


@given(st.integers(1, 60), st.data())
def test_overlaps_follow_the_hypergeometric_law(population: int, data: st.DataObject) -> None:
    marked, drawn = (data.draw(st.integers(0, population)) for _ in range(2))
    chances = overlaps(population, marked, drawn)
    exact = [
        math.comb(marked, k) * math.comb(population - marked, drawn - k) / math.comb(population, drawn) for k in range(drawn + 1)
    ]
    assert chances == pytest.approx(exact, rel=1e-9, abs=1e-15)


@given(st.integers(2, 40), st.integers(1, 5), st.data())
def test_a_mixture_covers_what_random_sets_cover_on_average(inputs: int, patterns: int, data: st.DataObject) -> None:
    wires = data.draw(st.integers(1, inputs))
    sizes = mixture(inputs, wires, patterns)
    assert sizes.sum() == pytest.approx(1)
    assert sizes @ range(len(sizes)) == pytest.approx(inputs * (1 - (1 - wires / inputs) ** patterns))


def test_the_chosen_unit_is_the_sparsest_that_holds_both_errors() -> None:
    ours = SparseRepresentation(error=1e-6)
    wires, threshold = ours.fewest(4096, 82)
    assert ours.false_positives(4096, 82, wires)[threshold] <= 1e-6 >= ours.false_negatives(82, wires)[threshold]
    for fewer in range(1, wires):
        alarms, misses = ours.false_positives(4096, 82, fewer), ours.false_negatives(82, fewer)
        assert all(alarms[t] > 1e-6 or misses[t] > 1e-6 for t in range(fewer + 1))


def test_a_reading_thins_wide_layers_and_leaves_narrow_ones_whole() -> None:
    def linear(name: str, inputs: int) -> Op:
        return Op(name, "linear", {"rows": 1, "inputs": inputs, "outputs": 10}, act=FP32, weight=FP32)

    reading = SparseRepresentation().measure(
        Graph("two", (linear("wide", 4096), linear("narrow", 8))), machine("a10"), Step.forward()
    )
    wide, narrow = reading.rows
    assert wide["bytes"] == wide["wires"] * (4 + 2) * 10 < wide["dense_bytes"] / 10
    assert (narrow["wires"], narrow["bytes"], narrow["threshold"]) == (8, 8 * 4 * 10, 0)
    assert reading.values["bytes"] == wide["bytes"] + narrow["bytes"]


def test_more_noise_or_more_patterns_take_more_wires() -> None:
    step, chip, graph = Step.decode(1, 100), machine("a10"), capture("llama-3.2-1b")
    shares = [t.measure(graph, chip, step).values["share"] for t in
              (SparseRepresentation(noise=0), SparseRepresentation(), SparseRepresentation(patterns=4))]  # fmt: skip
    assert shares == sorted(set(shares))


@pytest.mark.parametrize("wrong", [{"density": 0}, {"noise": 1}, {"error": 0}, {"patterns": 0}, {"tail": "fat"}])
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(NarrowsError):
        SparseRepresentation(**wrong)


def test_a_graph_without_layers_is_refused() -> None:
    with pytest.raises(NarrowsError, match="no layer"):
        SparseRepresentation().measure(Graph("empty", ()), machine("a10"), Step.forward())
