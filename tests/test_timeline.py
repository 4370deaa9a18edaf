"""Timelines: their measures on a case worked by hand, the trace file, and the picture."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from narrows.errors import NarrowsError
from narrows.report.gantt import gantt
from narrows.simulate.orders import one_f_one_b
from narrows.simulate.pipeline import Work
from narrows.simulate.schedule import Task, play
from narrows.simulate.timeline import Timeline

# rank 0 works 0-2 and 7-8; a message of 1 s; rank 1 works 3-6 and sends back 1 s later
TASKS = (
    Task("0F0", "F", 0, 2.0, takes_bytes=5.0),
    Task("1F0", "F", 1, 3.0, ((0, 1.0),), takes_bytes=2.0, frees_bytes=2.0),
    Task("0B0", "B", 0, 1.0, ((1, 1.0),), takes_bytes=1.0, frees_bytes=6.0),
)


def test_the_measures_of_a_case_worked_by_hand() -> None:
    timeline = play(TASKS)
    assert timeline.seconds == 8 and timeline.busy_seconds == {0: 3, 1: 3}
    assert timeline.bubble == pytest.approx(10 / 16) and timeline.bubble_rate == pytest.approx(5 / 8)
    assert timeline.longest_seconds == 8 and timeline.peak_bytes == {0: 6, 1: 2}
    assert timeline.idle() == {
        0: {"warm-up": 0, "message": 1, "wait": 4, "drain": 0},
        1: {"warm-up": 3, "message": 0, "wait": 0, "drain": 2},
    }
    assert timeline.critical_path() == [0, 1, 2]


def test_what_runs_on_no_resource_has_no_lane() -> None:
    timeline = play([Task("a", "F", 0, 1.0), Task("all", "barrier", None, 0.5, ((0, 0.0),)), Task("b", "F", 0, 1.0, ((1, 0.0),))])
    assert timeline.lanes == {0: [0, 2]} and timeline.seconds == 2.5


def test_the_trace_holds_every_span_and_loads_again(tmp_path: Path) -> None:
    timeline = one_f_one_b(3, 4).play(Work.of(3, 4, message_seconds=0.25))
    timeline.save_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert [name["args"]["name"] for name in events if name["name"] == "thread_name"] == ["rank 0", "rank 1", "rank 2"]
    assert len(spans) == len(timeline.spans) == 24
    assert max(event["ts"] + event["dur"] for event in spans) == pytest.approx(timeline.seconds * 1e6)
    assert sum(event["dur"] for event in spans) == pytest.approx(sum(timeline.busy_seconds.values()) * 1e6)


def test_the_picture_has_a_block_for_each_span_and_is_well_formed() -> None:
    timeline = one_f_one_b(3, 4).play(Work.of(3, 4))
    root = ElementTree.fromstring(gantt(timeline, "three <ranks>"))
    titles = [title.text or "" for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 24 and titles[0].startswith("0F0: ")
    assert root.get("aria-label") == "three <ranks>"


def test_a_picture_of_many_spans_stays_small() -> None:
    timeline = one_f_one_b(4, 4000).play(Work.of(4, 4000))
    assert gantt(timeline).count("<title>") < 4 * 2 * 960


def test_nothing_is_no_timeline() -> None:
    with pytest.raises(NarrowsError, match="nothing ran"):
        Timeline(())


def test_links_alone_have_no_bubble_and_work_that_takes_no_time_none_either() -> None:
    with pytest.raises(NarrowsError, match="no rank ran anything"):
        _ = play([Task("sent", "send", "0>1", 1.0)]).bubble
    still = play([Task("0F0", "F", 0, 0.0)])
    assert still.bubble == still.bubble_rate == 0
