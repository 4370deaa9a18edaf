"""A training step from the times of its distinct operators: laws of the written-out tasks, and profiles that users bring."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.capture.config import from_config
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.kinds import COLLECTIVES
from narrows.layout import Layout
from narrows.machine import cluster
from narrows.simulate.operators import Profile, play_step, stages

SELENE, TOKENS = cluster("selene"), 256


def gpt(layers: int) -> Graph:
    sizes = {"n_embd": 256, "n_layer": layers, "n_head": 8, "vocab_size": 512, "n_positions": TOKENS}
    return from_config({"model_type": "gpt2", "torch_dtype": "float16", "tie_word_embeddings": True, **sizes}, "tiny gpt")


def played(graph: Graph, layout: Layout, profile: Profile | None = None) -> float:
    return play_step(graph, SELENE, layout, stages(graph, SELENE, layout, TOKENS, profile)).seconds


@settings(max_examples=25, deadline=None)
@given(pipeline=st.sampled_from((1, 2, 4, 8)), accumulate=st.integers(1, 12), recompute=st.sampled_from(("none", "full")))
def test_a_step_lies_between_its_slowest_stage_and_all_of_them_in_step(pipeline: int, accumulate: int, recompute: str) -> None:
    layout = Layout(pipeline=pipeline, accumulate=accumulate, recompute=recompute)
    parts = stages(gpt(8), SELENE, layout, TOKENS)
    timeline = play_step(gpt(8), SELENE, layout, parts)
    updates = max(span.end - span.start for span in timeline.spans if span.kind == "update")
    slowest = max(parts.forward) + max(parts.backward)
    least = accumulate * max(f + b for f, b in zip(parts.forward, parts.backward, strict=True))
    assert least <= timeline.seconds <= (accumulate + pipeline - 1) * slowest + updates + 1e-12


def test_one_device_takes_the_sum_of_its_operators() -> None:
    parts = stages(gpt(4), SELENE, Layout(accumulate=3), TOKENS)
    timeline = play_step(gpt(4), SELENE, Layout(accumulate=3), parts)
    (update,) = (span.end - span.start for span in timeline.spans if span.kind == "update")
    assert timeline.seconds == pytest.approx(3 * (parts.forward[0] + parts.backward[0]) + update)
    assert parts.parameters == [gpt(4).parameters]


def test_distinct_operators_do_not_grow_with_the_model_or_the_batch() -> None:
    small, large = (stages(gpt(n), SELENE, Layout(accumulate=n), TOKENS) for n in (2, 16))
    assert small.distinct == large.distinct
    assert large.calls > 50 * small.calls


def test_an_exchange_beside_the_backward_pass_shows_less() -> None:
    beside, after = (Layout(data=64, accumulate=2, overlap=overlap) for overlap in (True, False))
    alone = played(gpt(8), Layout(accumulate=2))
    assert alone < played(gpt(8), beside) < played(gpt(8), after)


def test_a_profile_stands_in_for_the_cost_model(tmp_path: Path) -> None:
    layout = Layout(tensor=2, sequence=True, pipeline=2, data=2, accumulate=4)
    names = [name for name in stages(gpt(4), SELENE, layout, TOKENS).distinct if name[0].split()[0] not in COLLECTIVES]
    rows = [{"op": op, "shape": shape, "seconds": 1e-3} for op, shape in names]
    (tmp_path / "times.json").write_text(json.dumps(rows))
    (tmp_path / "times.csv").write_text("op,shape,seconds\n" + "".join(f"{o},{s},1e-3\n" for o, s in names))
    found = [played(gpt(4), layout, Profile.read(tmp_path / name)) for name in ("times.json", "times.csv")]
    assert found[0] == found[1] > 0.05
    missing = Profile(dict.fromkeys(names[1:], 0.001))
    with pytest.raises(NarrowsError, match=names[0][1]):
        played(gpt(4), layout, missing)


@pytest.mark.parametrize(
    "text", ["op,shape,seconds\nlinear,1x1,-1\n", "op,shape\nlinear,1x1\n", "op,shape,seconds\nlinear,1x1,soon\n"]
)
def test_a_row_that_is_no_time_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "times.csv").write_text(text)
    with pytest.raises(NarrowsError, match="row 1"):
        Profile.read(tmp_path / "times.csv")
    with pytest.raises(NarrowsError, match="read"):
        Profile.read(tmp_path / "nowhere.csv")


@pytest.mark.parametrize(
    "layout", [Layout(data=2, shard=1), Layout(pipeline=2, schedule="zb-1p"), Layout(offload="optimizer")], ids=str
)
def test_what_is_not_written_out_is_refused(layout: Layout) -> None:
    with pytest.raises(NarrowsError, match="written out"):
        stages(gpt(4), SELENE, layout, TOKENS)
