"""BLOOM's account beyond its claims: the parts add up, options move them as they should, and what is refused."""

from dataclasses import replace

import pytest

from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.profiling_cost_models.bloom_carbon_footprint import LifeCycle, rated_joules

A100 = machine("a100-80gb")


def test_a_step_has_its_share_of_idling_and_of_the_hardware() -> None:
    read = {scope: LifeCycle(scope=scope).measure(capture("gpt2"), A100, Step.decode(8, 512)) for scope in ("life", "dynamic")}
    parts = {row["origin"]: row["grams"] for row in read["life"].rows}
    assert set(parts) == {"dynamic", "idle", "embodied"}
    assert sum(parts.values()) == pytest.approx(read["life"].values["grams"])
    assert read["dynamic"].values["grams"] == pytest.approx(parts["dynamic"])
    assert read["life"].values["grams_per_sequence"] == pytest.approx(read["life"].values["grams"] / 8)


def test_making_the_hardware_does_not_depend_on_the_grid() -> None:
    clean, dirty = (LifeCycle(grid).grams(1000.0, rated_joules(1000.0, A100)) for grid in (20.0, 475.0))
    assert clean["embodied"] == dirty["embodied"]
    assert dirty["dynamic"] / clean["dynamic"] == pytest.approx(475 / 20)
    assert dirty["dynamic"] == pytest.approx(1000 * 0.4 * 475)  # hours x kW x g/kWh


def test_a_machine_without_power_is_refused() -> None:
    unknown = replace(A100, power_watts=None)
    with pytest.raises(NarrowsError, match="power_watts"):
        LifeCycle().measure(capture("gpt2"), unknown, Step.decode(1, 128))
    with pytest.raises(NarrowsError, match="power_watts"):
        rated_joules(1.0, unknown)
    with pytest.raises(NarrowsError, match="scope"):
        LifeCycle(scope="all")
