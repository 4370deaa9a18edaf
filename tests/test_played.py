"""A layout played pass by pass agrees with its closed form, in seconds and in bytes."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.cli import cli
from narrows.layout import SCHEDULES, Layout
from narrows.machine import cluster
from narrows.measured.published import Shape, decoder
from narrows.simulate.memory import memory
from narrows.simulate.network import Axes, network
from narrows.simulate.played import held_over_time, played
from narrows.simulate.training import step_seconds

SELENE = cluster("selene")
GPT = decoder(Shape(4096, 32, 32), 2048)
AFTER = ("gradients", "optimizer", "offload", "host")  # what a step takes once the pipeline has drained


def closed(layout: Layout) -> float:
    return sum(seconds for cause, seconds in step_seconds(GPT, SELENE, layout, 2048).items() if cause not in AFTER)


@settings(max_examples=25, deadline=None)
@given(
    stages=st.sampled_from([2, 4, 8]),
    rounds=st.integers(1, 6),
    chunks=st.sampled_from([1, 2, 4]),
    recompute=st.sampled_from(["none", "full"]),
    schedule=st.sampled_from(["1f1b", "gpipe"]),
)
def test_fixed_orders_take_as_long_and_hold_as_much_as_the_closed_form(
    stages: int, rounds: int, chunks: int, recompute: str, schedule: str
) -> None:
    layout = Layout(
        pipeline=stages,
        accumulate=stages * rounds,
        chunks=chunks if schedule == "1f1b" else 1,
        recompute=recompute,
        schedule=schedule,
    )
    assert played(GPT, SELENE, layout, 2048)[0].seconds == pytest.approx(closed(layout), rel=0.05)
    held, net = held_over_time(GPT, SELENE, layout, 2048), network(GPT, SELENE, layout, 2048)
    for stage in range(stages):
        known = float(memory(net, layout, Axes.of(layout), stage).total)
        assert max(bytes_ for _, bytes_ in held[stage]) == pytest.approx(known, rel=0.05)


@pytest.mark.parametrize("schedule", sorted(set(SCHEDULES) - {"1f1b", "gpipe"}))
def test_planned_orders_are_near_the_closed_form(schedule: str) -> None:
    layout = Layout(pipeline=8, accumulate=32, schedule=schedule)
    timeline = played(GPT, SELENE, layout, 2048)[0]
    assert timeline.longest_seconds == pytest.approx(closed(layout), rel=0.06)
    assert timeline.seconds < played(GPT, SELENE, Layout(pipeline=8, accumulate=32), 2048)[0].seconds * 1.001
    net = network(GPT, SELENE, layout, 2048)
    for stage, levels in held_over_time(GPT, SELENE, layout, 2048).items():
        known = float(memory(net, layout, Axes.of(layout), stage).total)
        assert max(bytes_ for _, bytes_ in levels) == pytest.approx(known, rel=0.1)


def test_what_is_taken_is_freed() -> None:
    for levels in held_over_time(GPT, SELENE, Layout(pipeline=4, accumulate=8), 2048).values():
        assert levels[-1][1] == pytest.approx(levels[0][1])
        assert [at for at, _ in levels] == sorted(at for at, _ in levels)


def test_the_ends_are_balanced_as_whole_layers() -> None:
    ends = Layout(pipeline=8, accumulate=32, balance="layers")
    graph = decoder(Shape(2304, 22, 24, fused=False), 1024)
    whole = step_seconds(graph, SELENE, ends, 1024)
    each = (whole["forward"] + whole["backward"] + whole["launch"]) / 32 / (22 / 8)
    assert whole["ends"] == pytest.approx(32 * (3 - 22 / 8) * each)  # the slowest stage has three layers, the average 2.75


def test_the_command_keeps_a_timeline(tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    asked = ["gpt2", "-c", "dgx-a100", "-n", "8", "-g", "16", "-s", "1024", "--layout", "pipeline=4,data=2,accumulate=8"]
    found = CliRunner().invoke(cli, ["plan", "train", *asked, "--timeline", str(file), "--json"])
    assert found.exit_code == 0, found.output
    events = [e for e in json.loads(file.read_text())["traceEvents"] if e["ph"] == "X"]
    assert len(events) == 4 * 8 * 2
    assert {e["tid"] for e in events} == {0, 1, 2, 3}
    picture = tmp_path / "step.svg"
    assert CliRunner().invoke(cli, ["plan", "train", *asked, "--timeline", str(picture)]).exit_code == 0
    assert picture.read_text().startswith("<svg")
