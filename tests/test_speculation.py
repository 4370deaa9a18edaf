"""Speculative decoding in the engine: tokens a step, what they cost, and the same bits summed as one after another."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.machine import machine
from narrows.simulate.fleet import Group, rules
from narrows.simulate.pace import Pace
from narrows.simulate.requests import Answer
from narrows.simulate.serving import Engine
from narrows.simulate.speculation import Speculation, Speculative
from narrows.simulate.step_times import StepTimes
from narrows.simulate.workload import Lengths, generate

BIG, SMALL, H100 = capture("llama-3.1-8b"), capture("smollm2-135m"), machine("h100-sxm")


def times(speculation: Speculation | None, step: float = 0.0) -> StepTimes:
    sizes = (BIG, H100, 1, 512, 64, 1.0, step, 0.0)
    return Speculative(speculation, *sizes) if speculation else StepTimes(*sizes)


@given(st.integers(1, 8), st.floats(0, 0.99))
def test_tokens_a_step_are_those_of_the_geometric_series(ahead: int, acceptance: float) -> None:
    expected = sum(acceptance**i for i in range(ahead + 1))  # the model's own token, and the i-th if all before it are kept
    assert Speculation(ahead, acceptance).taken == pytest.approx(expected)


def test_a_token_takes_its_share_of_one_check() -> None:
    plain, checked = times(None, 1e-3), times(Speculation(3, 0.5), 1e-3)
    for sequences in (1, 7, 16):
        assert checked.rows(sequences) == pytest.approx(plain.rows(4 * sequences) / 1.875)
        assert checked.outputs(sequences) == pytest.approx(plain.outputs(4 * sequences) / 1.875)
    assert checked.host(5) == pytest.approx(plain.host(5) / 1.875)
    assert (checked.reading(100, 0), checked.host(0, 5)) == (plain.rows(100), plain.host(5))  # a step of prompts is not shared
    assert checked.reading(100, 8) == plain.rows(132) - plain.rows(32)


def test_tokens_that_nobody_keeps_cost_and_those_that_all_are_pay() -> None:
    plain, context = times(None), 64 * 500
    assert times(Speculation(3, 0.0, SMALL)).decode(64, context)[1] > plain.decode(64, context)[1]
    assert times(Speculation(3, 0.9, SMALL)).decode(1, 500)[1] < 0.6 * plain.decode(1, 500)[1]
    assert times(Speculation(3, 0.9, SMALL)).decode(1, 500)[1] > times(Speculation(3, 0.9)).decode(1, 500)[1]  # drafts cost


def test_a_draft_takes_room() -> None:
    group = Group(BIG, H100, rules("vllm-v1"))
    drafted = Group(BIG, H100, rules("vllm-v1"), speculation=Speculation(3, 0.7, SMALL))
    assert drafted.token_bytes() == group.token_bytes() + Group(SMALL, H100, rules("vllm-v1")).token_bytes()
    assert drafted.room() * drafted.token_bytes() < group.room() * group.token_bytes()


class OneByOne(Engine):
    """The engine that takes no run of steps at once."""

    def _next_end(self) -> int:
        return self.steps + 1


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([Speculation(2, 0.6), Speculation(4, 0.8, SMALL)]), st.integers(40, 400))
def test_sums_of_steps_give_the_same_bits_as_one_after_another(seed: int, speculation: Speculation, blocks: int) -> None:
    table, load = times(speculation, 2e-3), list(generate(20.0, 25, Lengths(200, 60, 1.0, 1.0), seed))
    found: list[list[Answer]] = []
    for kind in (Engine, OneByOne):
        answers: list[Answer] = []
        engine = kind(
            table, rules("vllm-v1", max_sequences=16, max_tokens=256), blocks, answers.append, lambda request, why: None
        )
        for request in load:
            engine.advance(request.arrival)
            engine.push(request)
        engine.advance()
        found.append(answers)
    assert found[0] == found[1]


@given(st.lists(st.tuples(st.integers(0, 900), st.integers(1, 900), st.integers(0, 5), st.integers(1, 9))), st.floats(1, 9))
def test_tokens_that_come_at_once_wait_as_long_as_one_after_another(
    events: list[tuple[int, int, int, int]], taken: float
) -> None:
    told = []
    for at_once in (1.0, taken):
        waits: list[tuple[int, int, int, float]] = []
        pace, now = Pace(lambda *wait: waits.append(wait), at_once), 0  # noqa: B023
        for prompts, own, slope, n in events:  # a step with prompts, then n without
            pace.steps(now, prompts + own, 0, 1, 3, own)
            now += prompts + own
            pace.steps(now, own, slope, n, 3)
            now += n * own + slope * (n * (n - 1) // 2)
        told.append((sum(n * many for _, _, n, many in waits),
                     sum((n * first + slope * (n * (n - 1) // 2)) * many for first, slope, n, many in waits)))  # fmt: skip
    assert told[1] == pytest.approx(told[0], abs=3 * sum(n * n for *_, n in events) + 3)  # whole picoseconds


def test_settings_without_sense_are_refused() -> None:
    for ahead, acceptance in ((0, 0.5), (3, 1.0), (3, -0.1)):
        with pytest.raises(NarrowsError, match="ahead"):
            Speculation(ahead, acceptance)
