"""A swarm never does more than the best assignment, wires by speed as the closed form says, and wide layers need links less."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import machine
from narrows.measured.published import Shape, decoder
from narrows.step import Step
from narrows.techniques.training_parallelism.swarm_parallelism import LEAVES, Swarm, load_of


@settings(max_examples=20, deadline=None)
@given(
    peers=st.integers(1, 60),
    stages=st.integers(1, 8),
    wired=st.booleans(),
    every=st.sampled_from([0.0, 300.0]),
    loading=st.floats(0, 2000),
    seed=st.integers(0, 9),
)
def test_no_swarm_beats_the_best_assignment(
    peers: int, stages: int, wired: bool, every: float, loading: float, seed: int
) -> None:
    one = Swarm(min(stages, peers), every, wired=wired, peers=peers, life_seconds=7200.0)
    assert 0 <= one.of_best(4 * 3600.0, loading, seed) <= 1


def test_peers_that_stay_are_used_as_well_as_they_can_be() -> None:
    for wired in (True, False):
        assert Swarm(8, 300.0, wired=wired, peers=60, life_seconds=1e15).of_best(86400.0, 60.0) == pytest.approx(1)


def test_as_many_peers_are_there_on_average_all_the_time() -> None:
    one, seconds = Swarm(), 48 * 3600.0
    events = sorted(event for event in one.preemptions(seconds, 3) if event[0] < seconds)
    there, whole, before = one.peers, 0.0, 0.0
    for at, kind, _ in events:
        whole, before = whole + there * (at - before), at
        there += -1 if kind == LEAVES else 1
    assert whole / before == pytest.approx(one.peers, rel=0.05)


@settings(max_examples=20, deadline=None)
@given(speeds=st.lists(st.floats(0.2, 2), min_size=1, max_size=6))
def test_wiring_by_speed_uses_all_of_it_and_even_wiring_that_of_the_slowest(speeds: list[float]) -> None:
    close = Swarm(round_trip_seconds=0.0)
    rows, many = [speeds] * 3, 2000
    assert close.microbatches_per_second(rows, many) == pytest.approx(sum(speeds), rel=0.05)
    even = replace(close, wired=False).microbatches_per_second(rows, many)
    assert even == pytest.approx(len(speeds) * min(speeds), rel=0.05)


def test_the_wider_the_layer_the_less_its_links_matter() -> None:
    """The square-cube law: compute grows with the square of the width, what is sent with the width."""
    loads = [
        load_of(decoder(Shape(n, 1, n // 128), 512), machine("t4"), Step.train(1, 512), 1) for n in (2048, 4096, 8192, 16384)
    ]
    for narrow, wide in pairwise(loads):
        assert wide.elements == 2 * narrow.elements
        assert 3 < wide.busy_seconds / narrow.busy_seconds <= 4
        assert Swarm().utilization(wide) > 1.5 * Swarm().utilization(narrow)
    assert Swarm().utilization(loads[-1]) < Swarm(bandwidth_bytes_per_s=1e9).utilization(loads[-1]) <= 1


def test_bad_swarms_are_refused() -> None:
    for wrong in (
        {"stages": 0},
        {"peers": 4},
        {"rebalance_seconds": -1.0},
        {"life_seconds": 0.0},
        {"bandwidth_bytes_per_s": 0.0},
    ):
        with pytest.raises(NarrowsError, match="swarm-parallelism"):
            Swarm(**wrong)
    with pytest.raises(NarrowsError, match="no layers"):
        Swarm().measure(Graph("empty", ()), machine("t4"), Step.train(1, 512))
