"""vTrain's choice of a plan: within its bounds, and never dearer than the usual one."""

import pytest

from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.layout import Layout
from narrows.machine import machine
from narrows.step import Step
from narrows.technique import technique

VTrain = technique("vtrain")


@pytest.mark.parametrize("slower", [0.0, 0.3])
def test_the_cheapest_plan_keeps_to_its_bounds(slower: float) -> None:
    read = VTrain(devices=16, slower=slower).measure(capture("llama-3.2-1b"), machine("h100-sxm"), Step.train(32, 1024))
    found = read.values
    assert found["seconds"] <= (1 + slower) * found["usual_seconds"]
    assert found["price"] <= found["usual_price"]
    assert found["devices"] <= 16
    dollars = machine("h100-sxm").price_per_hour / 3600
    for row in read.rows:
        assert Layout.parse(row["plan"]).batch == 32
        assert row["price"] == pytest.approx(row["devices"] * row["seconds"] * dollars)
    assert min(row["price"] for row in read.rows if row["seconds"] <= (1 + slower) * found["usual_seconds"]) == found["price"]


def test_no_plan_and_no_link_are_refused() -> None:
    with pytest.raises(NarrowsError, match="fits"):
        VTrain(devices=1).measure(capture("llama-3.1-70b"), machine("h100-sxm"), Step.train(1, 64))
    with pytest.raises(NarrowsError, match="link"):
        VTrain().measure(capture("gpt2"), machine("desktop-avx2"), Step.train(1, 64))
