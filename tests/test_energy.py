"""The power model: held-back measurements, bounds, and the curve along the clock."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.capture import capture
from narrows.diagnose import as_json, diagnose
from narrows.energy import LOWEST_CLOCK, Curve, carbon_grams, power
from narrows.errors import NarrowsError
from narrows.machine import machine
from narrows.step import Step
from narrows.validate import ROOT

MEASURED = ROOT.parent / "shared" / "data"
SHARE = st.floats(0, 1)


@pytest.mark.skipif(not (MEASURED / "splitwise_a100.csv").is_file(), reason="the measurements are not at hand")
def test_watts_of_held_back_phases_are_far_nearer_than_one_constant() -> None:
    pytest.importorskip("scipy")
    spec = importlib.util.spec_from_file_location("fit_energy", Path(__file__).parents[1] / "bench" / "fit_energy.py")
    assert spec and spec.loader
    fit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fit)
    model, rows = power(machine("a100-80gb")), fit.points(MEASURED)
    assert model
    rest = [p for p in rows if p.half]
    assert len(rest) > 20
    measured = np.array([p.measured for p in rest])
    error = np.abs([model.watts(p.compute_use, p.memory_use) / model.rated for p in rest] / measured - 1)
    constant = np.median([p.measured for p in rows if not p.half])
    assert error.mean() < 0.08
    assert np.abs(constant / measured - 1).mean() > 3 * error.mean()


@given(SHARE, SHARE, SHARE, SHARE)
def test_more_use_never_draws_less(a: float, b: float, c: float, d: float) -> None:
    model = power(machine("a100-80gb"))
    assert model
    little, much = model.watts(min(a, b), min(c, d)), model.watts(max(a, b), max(c, d))
    assert model.idle < little <= much <= model.ceiling * model.rated


@given(st.floats(100, 700), st.floats(0.05, 0.9), SHARE, st.floats(1.5, 3.0), st.floats(LOWEST_CLOCK, 1.0))
def test_a_cap_at_the_watts_of_a_clock_gives_that_clock(
    watts: float, idle: float, sensitive: float, exponent: float, clock: float
) -> None:
    curve = Curve(watts, idle * watts, sensitive, exponent)
    assert curve.clock_under(curve.watts_at(clock)) == pytest.approx(clock, rel=1e-6)
    assert 1.0 <= curve.slowdown(clock) <= 1 / clock + 1e-12
    assert curve.idle < curve.watts_at(clock) <= watts * (1 + 1e-12)


def test_a_clock_outside_of_the_range_is_refused() -> None:
    with pytest.raises(NarrowsError, match=r"clock: a clock of 0\.2"):
        Curve(300, 60, 0.5, 2.5).slowdown(0.2)


def test_a_cap_below_reach_gives_the_lowest_clock() -> None:
    assert Curve(300, 60, 0.5, 2.5).clock_under(10.0) == LOWEST_CLOCK


def test_a_step_draws_between_idle_and_rated_and_its_joules_are_watts_times_seconds() -> None:
    there, graph = machine("a100-80gb"), capture("llama-3.1-8b")
    prefill, decode = (diagnose(graph, there, step, 2) for step in (Step.prefill(1, 2048), Step.decode(1, 2048)))
    for found in (prefill, decode):
        spent, data = found.energy, as_json(found)
        assert spent
        assert spent.joules == pytest.approx(spent.watts * found.seconds)
        assert data["energy_joules"] == pytest.approx(2 * spent.joules)
        assert data["energy_interval"][0] < data["energy_joules"] < data["energy_interval"][1]
        assert data["watts_interval"][0] < data["watts"] < data["watts_interval"][1]
        assert 0.2 * 400 < spent.watts < 1.05 * 400
    assert prefill.energy and decode.energy
    assert prefill.energy.watts > decode.energy.watts
    assert prefill.energy.curve.sensitive > 0.5 > decode.energy.curve.sensitive


def test_a_machine_without_power_has_no_energy() -> None:
    found = diagnose(capture("resnet-50"), replace(machine("a100-80gb"), power_watts=None), Step.forward(8, 1))
    assert found.energy is None
    assert as_json(found)["energy_joules"] is None


def test_the_machine_s_own_idle_power_comes_first() -> None:
    own, assumed = power(machine("tpu-v4")), power(machine("tpu-v5e"))
    assert own and own.idle == 90
    assert assumed and assumed.idle == pytest.approx(0.2 * assumed.rated)


def test_carbon_of_a_kilowatt_hour() -> None:
    assert carbon_grams(3.6e6, 57.0) == 57.0
    assert carbon_grams(1.8e6, 400.0, overhead=1.2) == pytest.approx(240.0)
