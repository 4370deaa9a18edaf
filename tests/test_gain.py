"""Intervals of gains: what a change leaves alone cancels, what it brings in counts, and as many hold as they say."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.capture import capture
from narrows.costmodel import op_time, rests_on
from narrows.diagnose import prepared
from narrows.gain import NOISE, Parts, gain, parts
from narrows.graph import Graph
from narrows.machine import Machine, machine
from narrows.measured.kernels import format_of, in_format
from narrows.plan import Plan
from narrows.step import Step

A100, DECODE = machine("a100-80gb"), Step.decode(1, 128)
seconds = st.dictionaries(st.sampled_from("abcdef"), st.floats(1e-6, 1.0), min_size=1)
widths = st.floats(0.01, 1.0)


def made(by: dict[str, float], half: float) -> Parts:
    return Parts(math.fsum(by.values()), {name: half * each for name, each in by.items()})


def calibrated(half: float = 0.2) -> Machine:
    known = {"median": 1.0, "low": math.exp(-half), "high": math.exp(half)}
    return replace(machine("desktop-avx2"), efficiency={"step": known, "gain": known}, sources={})


@given(seconds, seconds, widths)
def test_an_interval_lies_around_its_gain_and_is_the_same_backwards(a: dict, b: dict, half: float) -> None:
    ratio, low, high = gain(made(a, half), made(b, half))
    assert low < ratio < high
    assert gain(made(b, half), made(a, half)) == pytest.approx((1 / ratio, 1 / high, 1 / low))
    assert math.log(high / ratio) <= math.hypot(NOISE, math.sqrt(2) * half) * (1 + 1e-9)


@given(seconds, widths, st.floats(0.1, 10))
def test_only_noise_is_left_where_every_part_shrinks_alike(a: dict, half: float, factor: float) -> None:
    ratio, low, high = gain(made(a, half), made({name: each / factor for name, each in a.items()}, half))
    assert (ratio, low, high) == pytest.approx((factor, factor * math.exp(-NOISE), factor * math.exp(NOISE)))


@given(st.floats(0.01, 0.4), st.floats(0.45, 0.9), widths)
def test_the_more_of_a_step_runs_on_other_kernels_the_wider(few: float, many: float, half: float) -> None:
    """A share of the step gets kernels that take half as long."""

    def width(share: float) -> float:
        ratio, _, high = gain(made({"old": 1.0}, half), made({"old": 1 - share, "new": share / 2}, half))
        return math.log(high / ratio)

    assert width(few) < width(many)


def test_as_many_gains_hold_as_the_interval_says() -> None:
    """Constants off by independent normal errors of 8 to 20 %: four of five true gains lie inside."""
    rng, z = np.random.default_rng(0), 1.2816
    before, after = {"a": 0.6, "b": 0.3, "c": 0.1}, {"a": 0.2, "d": 0.25, "c": 0.1}
    off = dict(zip("abcd", (0.08, 0.12, 0.2, 0.1), strict=True))
    one, two = (Parts(sum(by.values()), {k: off[k] * z * each for k, each in by.items()}) for by in (before, after))
    _, low, high = gain(one, two)
    inside = 0
    for _ in range(4000):
        true = {k: math.exp(rng.normal(0, off[k])) for k in off}
        real = sum(each * true[k] for k, each in before.items()) / sum(each * true[k] for k, each in after.items())
        inside += low <= real <= high
    assert 0.77 < inside / 4000 < 0.84


def test_every_second_of_a_step_rests_on_a_constant() -> None:
    graph = prepared(capture("llama-3.1-8b"), DECODE, A100)
    found = parts(graph, calibrated(), DECODE)
    assert math.fsum(found.spread.values()) == pytest.approx(0.2 * found.seconds)
    op = next(op for op in graph if op.name.endswith("q_proj"))
    assert {rests_on(op, cause, A100) for cause in op_time(op, DECODE, A100).causes} == {"memory-bf16-bf16", "launch"}


@pytest.mark.parametrize("where", [A100, calibrated()], ids=["datasheet", "calibrated"])
@pytest.mark.parametrize("text", ["bf16", "awq:group=64", "bf16 + awq:group=64", "bf16 + int8:but=gate_proj:int4g64", "llm-drop"])
def test_a_plan_that_changes_anything_has_a_width(text: str, where: Machine) -> None:
    graph = in_format(capture("smollm2-135m"), format_of("fp32"))
    changed = Plan.parse(text).rewrite(graph)
    ratio, low, high = gain(*(parts(one, where, DECODE) for one in (graph, changed)))
    assert low < ratio < high
    if text != "llm-drop":  # another format for much of the step
        assert math.log(high / low) > 3 * NOISE


# Tokens per second of batch-1 decoding on A100-80GB by format: README of gpt-fast (BSD-3), on so many devices
GPT_FAST = {
    ("llama-2-7b", 1): {"bf16": 104.9, "int8": 155.58, "int4-g32": 196.8},
    ("llama-2-70b", 1): {"int8": 19.13, "int4-g32": 25.25},
    ("llama-3.1-8b", 1): {"bf16": 93.89, "int8": 137.64},
    ("llama-2-70b", 8): {"bf16": 62.5, "int8": 80.44, "int4-g32": 90.77},
    ("llama-3.1-70b", 8): {"bf16": 58.78, "int8": 75.58},
    ("mixtral-8x7b", 4): {"bf16": 155.35, "int8": 216.87},
}


def test_measured_gains_of_formats_lie_inside() -> None:
    """Not so if errors before and after are taken as one: then all but one lie outside."""
    step, held = Step.decode(1, 228), []

    def graph(model: str, form: str, devices: int) -> Graph:
        return prepared(in_format(capture(model), format_of(form)), step, A100, devices)

    for (model, devices), speeds in GPT_FAST.items():
        made = {form: parts(graph(model, form, devices), A100, step) for form in speeds}
        for one, two in combinations(speeds, 2):
            _, low, high = gain(made[one], made[two])
            held.append(low <= speeds[two] / speeds[one] <= high)
    assert len(held) == 10
    assert sum(held) >= 8
