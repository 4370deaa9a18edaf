"""I/O of attention: closed forms equal the counted loops, the choice of schedule, and known answers on real graphs."""

import math

import pytest

from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.experiments.attention_i_o_lower_bounds import FastMemory, run
from narrows.machine import machine
from narrows.plan import parse
from narrows.step import Step
from narrows.techniques.attention.attention_i_o_lower_bounds import SCHEDULES, AttentionIO, bound, side, strip

HERE = machine("a100-80gb")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("n", "d", "memory"), [(40, 8, 64), (33, 7, 500), (64, 24, 101), (17, 5, 4000)])
def test_the_closed_form_is_the_count_and_the_output_is_attention_s(schedule: str, n: int, d: int, memory: int) -> None:
    moved, error = run(schedule, n, d, memory)
    assert moved == SCHEDULES[schedule](n, n, d, memory)
    assert error < 1e-12
    assert moved >= 0.5 * bound(n, n, d, memory)


def test_tiles_are_the_largest_that_fit() -> None:
    for memory in (100, 1000, 4099):
        rows, b = strip(8, memory), side(memory)
        assert rows * 19 + 16 <= memory < (rows + 1) * 19 + 16
        assert b * b + 4 * b <= memory < (b + 1) ** 2 + 4 * (b + 1)


def test_a_fast_memory_holds_no_more_than_it_can() -> None:
    with pytest.raises(NarrowsError, match="fast memory"):
        FastMemory(10).reserve(11)


def test_strips_where_they_are_thick_and_tiles_where_they_are_thin() -> None:
    best = AttentionIO()
    assert best.choose(4096, 4096, 128, 4 * 128**2) == "flash"
    assert best.choose(4096, 4096, 128, 128**2 // 8) == "tiles"
    assert math.isnan(AttentionIO("flash").crossover(4096, 4096, 128))


def test_flash_on_a_gpu_moves_a_few_times_the_bound_and_rows_hundreds() -> None:
    graph, step = capture("llama-3.2-1b"), Step.prefill(1, 8192)
    best, rows = (t.measure(graph, HERE, step) for t in (AttentionIO(), AttentionIO("rows")))
    assert {row["schedule"] for row in best.rows} == {"flash"}
    assert 1 <= best.values["over_bound"] < 8
    assert rows.values["bytes"] > 100 * best.values["bytes"]
    assert best.values["share_small"] == 0


def test_work_adds_up_over_sequences() -> None:
    graph = capture("bert-base")
    one, four = (AttentionIO().measure(graph, HERE, Step.forward(n, 512)).values["bytes"] for n in (1, 4))
    assert four == 4 * one


def test_without_attention_nothing_moves() -> None:
    assert AttentionIO().measure(capture("resnet-50"), HERE, Step.forward(8)).values["bytes"] == 0


def test_refusals_name_the_field() -> None:
    with pytest.raises(NarrowsError, match="schedule"):
        AttentionIO("spiral")
    with pytest.raises(NarrowsError, match="fit"):
        AttentionIO("flash").choose(64, 64, 64, 200)


def test_round_trip() -> None:
    assert parse("attention-i-o-lower-bounds:schedule=flash") == AttentionIO("flash")
