"""AI and Memory Wall: a table in which every figure has a source, fits with known answers, and the roofline's limits."""

import pytest

from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.graph import BF16, Graph, Op
from narrows.machine import machine
from narrows.plan import parse
from narrows.step import Step
from narrows.techniques.profiling_cost_models import ai_and_memory_wall as wall
from narrows.techniques.profiling_cost_models.ai_and_memory_wall import RESOURCES, MemoryWall, figure, history

A100 = machine("a100-80gb")


def test_every_row_of_the_table_has_a_figure_and_a_source() -> None:
    assert {row["resource"] for row in history()} == set(RESOURCES)
    for row in history():
        assert 1996 <= float(row["year"]) <= 2026 and figure(row) > 0 and row["source"]
        assert bool(row["value"]) != row["source"].startswith("the bundled machine of this name")


@pytest.mark.parametrize("until", [2023.0, 2026.0])
def test_the_trends_hold_whether_the_last_years_are_in_or_not(until: float) -> None:
    found = {resource: MemoryWall(until=until).growth(resource) for resource in RESOURCES}
    assert found == pytest.approx({"compute": 3.0, "memory": 1.6, "interconnect": 1.4}, rel=0.06)


def test_a_trend_that_is_known_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    doubling = tuple({"resource": r, "year": str(y), "name": "", "value": str(n * 2.0 ** (y - 2000)), "source": "made up"}
                     for n, r in enumerate(RESOURCES, 1) for y in range(2000, 2010))  # fmt: skip
    monkeypatch.setattr(wall, "history", lambda: doubling)
    wall._growth.cache_clear()
    assert MemoryWall().growth("memory") == pytest.approx(4.0)
    assert MemoryWall(apart=False).growth("memory") == pytest.approx(4.0)
    wall._growth.cache_clear()


def test_intensity_and_limit_of_one_product() -> None:
    product = Op("p", "linear", {"rows": 8, "inputs": 512, "outputs": 512}, act=BF16, weight=BF16)
    reading = MemoryWall().measure(Graph("g", (product,)), A100, Step.forward())
    moved = 2 * (512 * 512 + 2 * 8 * 512)
    assert reading.values["intensity"] == pytest.approx(2 * 8 * 512 * 512 / moved)
    assert reading.values["seconds"] == pytest.approx(moved / A100.memory.bandwidth_bytes_per_s)
    assert reading.values["ridge"] == pytest.approx(312e12 / 2.039e12, rel=1e-3)
    assert reading.rows[0]["limit"] == "bandwidth"
    assert reading.values["bandwidth_share"] == 1.0


def test_bandwidth_limits_decoding_and_arithmetic_limits_encoding() -> None:
    decode = MemoryWall().measure(capture("gpt2"), A100, Step.decode(1, 512)).values
    encode = MemoryWall().measure(capture("bert-base"), A100, Step.forward(8, 512)).values
    assert decode["bandwidth_share"] > 0.99 and encode["bandwidth_share"] < 0.1
    assert decode["intensity"] < 2 < A100.peak("bf16") / A100.memory.bandwidth_bytes_per_s


def test_lumped_resources_see_arithmetic_alone() -> None:
    values = MemoryWall().baseline().measure(capture("gpt2"), A100, Step.decode(1, 512)).values
    assert values["bandwidth_share"] == 0 and values["intensity"] == values["ridge"]
    assert values["ridge_doubles_years"] == float("inf")


def test_refusals_and_round_trip() -> None:
    with pytest.raises(NarrowsError, match="points of interconnect"):
        MemoryWall(until=2004.0).growth("interconnect")
    with pytest.raises(NarrowsError, match="not a resource"):
        MemoryWall().growth("disks")
    with pytest.raises(NarrowsError, match="does no work"):
        MemoryWall().measure(Graph("empty", ()), A100, Step.forward())
    assert parse("ai-and-memory-wall:until=2023") == MemoryWall(until=2023.0)
    assert eval(repr(MemoryWall(until=2023.0))) == MemoryWall(until=2023.0)  # noqa: S307
