"""Vision serving: laws of queues, a profiler whose clock is known, and which part bounds a server."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.profiling_cost_models.vision_serving_overhead_analysis import Stage, VisionServing, serve

VIT, FAST = capture("vit-b-16"), machine("rtx-4090")


def taking(seconds: float) -> Callable[[int], float]:
    return lambda _: seconds


@given(
    stages=st.lists(st.tuples(st.floats(0.01, 1.0), st.integers(1, 4)), min_size=1, max_size=4),
    clients=st.integers(1, 12),
)
def test_a_closed_line_of_fixed_times_runs_at_its_bound(stages: list[tuple[float, int]], clients: int) -> None:
    """As fast as its slowest stage or as its clients ask; and Little's law."""
    found = serve([Stage(str(i), taking(took), servers) for i, (took, servers) in enumerate(stages)], clients, 300)
    bound = min(clients / sum(took for took, _ in stages), min(servers / took for took, servers in stages))
    assert found.throughput == pytest.approx(bound, rel=0.06)
    assert found.throughput * found.latency == pytest.approx(clients, rel=0.06)
    assert all(0 <= share <= 1 for share in found.busy.values())
    assert found.latency == pytest.approx(sum(found.waiting.values()) + sum(took for took, _ in stages), rel=0.06)


def test_a_device_takes_what_waits_up_to_its_batch() -> None:
    batched = Stage("device", lambda images: 1.0 + 0.1 * images, batch=8)
    assert serve([batched], clients=8, requests=800).throughput == pytest.approx(8 / 1.8)
    assert serve([batched], clients=3, requests=300).throughput == pytest.approx(3 / 1.3)
    assert serve([replace(batched, batch=1)], clients=8, requests=800).throughput == pytest.approx(1 / 1.1)


def test_queues_need_stages_clients_and_requests() -> None:
    for stages, clients, requests in (([], 1, 10), ([Stage("a", taking(1))], 0, 10), ([Stage("a", taking(1))], 1, 1)):
        with pytest.raises(NarrowsError):
            serve(stages, clients, requests)


def test_the_profile_adds_up_where_the_clock_is_known() -> None:
    now = [0.0]

    def work(given: list[str], name: str, took: float) -> list[str]:
        now[0] += took
        return [*given, name]

    stages = {name: partial(work, name=name, took=took) for name, took in (("decode", 3.0), ("inference", 1.0))}
    found = VisionServing().profile(stages, [], runs=3, clock=lambda: now[0])
    assert found.values == pytest.approx({"seconds": 4.0, "attributed": 1.0, "share_outside": 0.75})
    assert VisionServing().baseline().profile(stages, [], runs=3, clock=lambda: now[0]).values["attributed"] == 0.25
    with pytest.raises(NarrowsError, match="inference"):
        VisionServing().profile({"decode": stages["decode"]}, [])


def test_large_images_bound_the_server_until_there_are_cores_enough() -> None:
    large = VisionServing(pixels=3564 * 2880.0, cores=4)
    found = large.measure(VIT, FAST, Step.forward(16)).values
    assert found["overhead_bound"] == 1 and found["lost"] > 0.5
    enough = replace(large, cores=int(found["cores_needed"]), clients=1024)
    assert enough.measure(VIT, FAST, Step.forward(16)).values["lost"] < 0.1
    small = VisionServing(pixels=60 * 70.0).measure(VIT, FAST, Step.forward(16)).values
    assert small["overhead_bound"] == 0 and small["share_outside"] < found["share_outside"]


def test_a_cpu_moves_nothing_and_a_broker_takes_its_time() -> None:
    stages = {row["stage"]: row["seconds"] for row in VisionServing().measure(VIT, machine("xeon-amx"), Step.forward()).rows}
    assert "transfer" not in stages and "broker" not in stages
    brokered = VisionServing(broker_seconds=2e-3).measure(VIT, FAST, Step.forward())
    assert {row["stage"]: row["seconds"] for row in brokered.rows}["broker"] == 2e-3
    assert {row["stage"]: row["seconds"] for row in brokered.rows}["transfer"] == pytest.approx(
        3 * 224**2 * 4 / 31.5e9 + 5e-6, rel=1e-3
    )


def test_it_refuses_what_means_nothing() -> None:
    with pytest.raises(NarrowsError, match="cores"):
        VisionServing(cores=0)
    with pytest.raises(NarrowsError, match="no time"):
        VisionServing().measure(Graph("empty", ()), FAST, Step.forward())
