"""Steps of models that lie outside of their device: cases worked by hand, bounds that no policy beats, and refusals."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows import host as module
from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.host import FIGURES, Host, host, hosts
from narrows.machine import machine
from narrows.simulate.offload import PLACES, Block, Policy, alone, offloaded, play_offloaded

HOST = Host(
    "h", "a host", 1e12, 1e12, link_bytes_per_s=10.0, read_bytes_per_s=6.0, write_bytes_per_s=6.0, adam_per_s=5.0, sources={}
)
BLOCK = Block(3, parameters=5.0, updated=5.0, forward=1.0, backward=2.0, kept_bytes=0.0)
policies = st.builds(
    Policy,
    *(st.sampled_from(PLACES) for _ in range(3)),
    ahead=st.integers(0, 3),
    early=st.booleans(),
    piped=st.booleans(),
    gradients=st.sampled_from(PLACES[1:]),
)


def test_all_on_the_device_takes_the_device_s_time() -> None:
    assert play_offloaded(BLOCK, HOST, Policy("device", "device", "device")).seconds == 3 * (1 + 2)


def test_a_serial_step_is_the_sum_of_its_parts() -> None:
    """10 bytes of weights take 1 s each way; 60 bytes of states 10 s to read and to write; 5 parameters 1 s to update."""
    serial = Policy("host", "disk", "device", ahead=0, early=False, piped=False)
    assert play_offloaded(BLOCK, HOST, serial).seconds == pytest.approx(3 * (1 + 1) + 3 * (1 + 2) + 1 + 3 * (10 + 1 + 10))


def test_early_updates_hide_behind_the_backward_pass() -> None:
    long = replace(BLOCK, backward=30.0)
    early, late = (play_offloaded(long, HOST, Policy("host", "disk", "device", early=e)) for e in (True, False))
    assert early.seconds == pytest.approx(1 + 3 + 3 * 30 + 1 + 10 + 1 + 10)  # the first block's weights, and the last's update
    assert late.seconds == pytest.approx(early.seconds + 20)  # the states of two blocks more


@given(policies)
def test_no_policy_beats_its_busiest_resource_or_loses_work(policy: Policy) -> None:
    timeline = play_offloaded(replace(BLOCK, kept_bytes=4.0, gather=0.5), HOST, policy)
    assert timeline.seconds >= max(timeline.busy_seconds.values()) - 1e-9
    assert timeline.busy_seconds["device"] == pytest.approx(9.0)
    updates = [span for span in timeline.spans if span.kind == "update"]
    assert len(updates) == (0 if policy.states == "device" else 3)
    assert all(a.end <= b.start + 1e-9 for a, b in _in_turn(timeline.spans, "backward"))


def _in_turn(spans: tuple, kind: str) -> list:  # type: ignore[type-arg]
    found = sorted((span for span in spans if span.kind == kind), key=lambda span: span.start)
    return list(pairwise(found))


def test_bytes_lie_where_the_policy_puts_them() -> None:
    gpu = machine("rtx-4090")
    model = offloaded(capture("gpt2"), alone(gpu), 1, 2, 128)
    assert model.parameters == pytest.approx(124e6, rel=0.02)
    disk = model.held(Policy("disk", "disk", "disk"))
    near = model.held(Policy("host", "host", "host"))
    assert disk["host"] == 0
    assert near["disk"] == 0
    assert disk["disk"] == near["host"] >= 14 * model.parameters
    late = model.held(Policy("disk", "disk", "disk", early=False, gradients="host"))
    assert late["host"] == 4 * model.parameters
    assert model.held(Policy(tiles=4))["device"] < model.held(Policy())["device"]
    assert model.fits(gpu, host("1-ssd"), Policy())
    assert not model.fits(gpu, replace(HOST, disk_bytes=1.0), Policy())


def test_what_is_no_place_or_no_block_is_refused() -> None:
    with pytest.raises(NarrowsError, match="tape"):
        Policy(states="tape")
    with pytest.raises(NarrowsError, match="0 blocks"):
        play_offloaded(replace(BLOCK, count=0), HOST, Policy())


@pytest.mark.parametrize("name", hosts())
def test_a_bundled_host_says_where_each_figure_comes_from(name: str) -> None:
    found = host(name)
    assert found.name == name and set(found.sources) == set(FIGURES)


def test_a_host_of_ones_own_is_read_and_what_is_wrong_in_it_is_named(tmp_path: Path) -> None:
    content = (Path(module.__file__).parent / "data" / "hosts" / "1-ssd.toml").read_text()
    (tmp_path / "mine.toml").write_text(content.replace('name = "1-ssd"', 'name = "mine"'))
    assert host(tmp_path / "mine.toml").read_bytes_per_s == host("1-ssd").read_bytes_per_s
    (tmp_path / "bad.toml").write_text(content.replace("128e9", "-1"))
    for asked, problem in ((tmp_path / "bad.toml", "memory_bytes"), ("1-sdd", "there is no host '1-sdd'")):
        with pytest.raises(NarrowsError, match=problem):
            host(asked)
