"""Layouts: one string there and back, errors that name the numbers and the nearest legal choice, the algebra of splits."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.capture import bundled, capture
from narrows.cost import cost, total
from narrows.errors import NarrowsError
from narrows.graph import Op, at
from narrows.kinds import COLLECTIVES
from narrows.layout import ALIASES, RECOMPUTE, SCHEDULES, Layout, divisors, dump, load, nearest
from narrows.parallel import boxing, context_parallel, expert_parallel, layer_count, over, tensor_parallel
from narrows.step import Step

LLAMA = capture("llama-3.1-70b")  # 80 layers, 64 heads, 8 key-value heads
MIXTRAL = capture("mixtral-8x7b")  # 32 layers, 8 experts

layouts = st.builds(
    lambda tensor, sequence, data, expert, pipeline, chunks, **rest: Layout(
        tensor=tensor,
        sequence=sequence and tensor > 1,
        data=data * expert,
        expert=expert,
        pipeline=pipeline,
        chunks=chunks if pipeline > 1 else 1,
        **rest,
    ),
    tensor=st.integers(1, 16),
    sequence=st.booleans(),
    data=st.integers(1, 64),
    expert=st.integers(1, 8),
    pipeline=st.integers(1, 64),
    chunks=st.integers(1, 4),
    context=st.integers(1, 8),
    context_by=st.sampled_from(["ring", "ulysses"]),
    shard=st.integers(0, 3),
    overlap=st.booleans(),
    gradient_bits=st.sampled_from([1, 8, 16, 32]),
    balance=st.sampled_from(["none", "layers", "vocabulary"]),
    microbatch=st.integers(1, 64),
    accumulate=st.integers(1, 512),
    recompute=st.sampled_from(RECOMPUTE),
    offload=st.sampled_from(["none", "optimizer", "activations", "both"]),
    offload_to=st.sampled_from(["host", "disk"]),
    groups=st.sampled_from(["", "a", "b+a"]),
)


@given(layouts)
def test_a_layout_is_read_back_from_its_string_and_its_file(layout: Layout) -> None:
    assert Layout.parse(str(layout)) == layout
    assert load(dump(layout, model="x")) == (layout, {"model": "x"})
    assert layout.devices == layout.tensor * layout.context * layout.data * layout.pipeline


def test_the_frameworks_names_mean_the_same() -> None:
    text = "tp=8,sp,pp=8,vpp=2,dp=6,zero=1,mb=2,ga=64"
    assert Layout.parse(text) == Layout(8, True, data=6, shard=1, pipeline=8, chunks=2, microbatch=2, accumulate=64)
    assert set(ALIASES.values()) <= set(Layout.__dataclass_fields__)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tensr=8", "Did you mean tensor"),
        ("tensor=8,tp=4", "twice"),
        ("tensor=x", "whole number"),
        ("tensor=0", "from 1"),
        ("tensor=-2", "whole number"),
        ("sequence=maybe", "true nor false"),
        ("sequence", "tensor=2"),
        ("shard=4", "0, 1, 2, 3"),
        ("schedule=2f2b", "1f1b, gpipe"),
        ("chunks=2", "chunks=1"),
        ("pipeline=4,chunks=2,schedule=gpipe", "not gpipe"),
        ("data=6,expert=4", "expert=3 and expert=6"),
        ("recompute_layers=2", "recompute=full"),
        ("pipeline=2,layers=40", "1 numbers for 2 stages. Give pipeline=1"),
        ("pipeline=2,layers=40+x", "Write it like 26"),
        ("pipeline=2,layers=80+0", "Write it like 26"),
        ("pipeline=2,layers=40+40,balance=layers", "Give balance=none"),
        ("data=8,accumulate=3,shares=4x3,5x1", "no layout has such a part"),
        ("data=8,accumulate=3,shares=4x3+5", "Write it like 8x6"),
        ("data=8,accumulate=3,shares=4x3+5x1", "Give data=9"),
        ("data=8,accumulate=2,shares=4x3+4x1", "Give accumulate=3"),
        ("data=8,accumulate=3,shares=4x3+4x1,pipeline=2", "Give pipeline=1"),
        ("data=8,accumulate=3,shares=6x3+2x1,expert=4", "at a time. The nearest is expert=2"),
        ("data=8,accumulate=3,shares=4x3+4x1,shard=2", "miss their exchanges. Give shard=1"),
    ],
)
def test_a_contradiction_is_named_with_what_is_legal(text: str, says: str) -> None:
    with pytest.raises(NarrowsError, match=says) as caught:
        Layout.parse(text)
    assert caught.value.where.startswith("layout: ")


@pytest.mark.parametrize(
    ("layout", "given", "says"),
    [
        ("tensor=6", {}, "64.* heads .* do not divide over 6. The nearest are tensor=4 and tensor=8"),
        ("pipeline=7", {}, "80 layers do not divide over 7. The nearest are pipeline=5 and pipeline=8"),
        ("pipeline=8,chunks=3,accumulate=8", {}, "10 layers of a stage do not divide over 3"),
        ("pipeline=4,chunks=2,accumulate=6", {}, "accumulate=4 and accumulate=8"),
        ("pipeline=8,balance=layers", {}, "80 layers, embedding and output do not divide over 8"),
        ("tensor=16,context=8,context_by=ulysses", {}, "heads"),
        ("context=4", {"sequence": 8190}, "8190 tokens"),
        ("tensor=8,data=4", {"devices": 64}, "8 x 1 x 4 x 1 .* is 32 devices, not 64. Give data=8"),
        ("tensor=8", {"devices": 60}, "devices=56 and devices=64"),
        ("data=8", {"batch": 64}, "Give accumulate=8"),
        ("data=8", {"batch": 60}, "global batch=56 and global batch=64"),
        ("data=8,expert=8", {}, "has no experts"),
        ("pipeline=2,layers=50+20", {}, "70 layers, and llama-3.1-70b has 80. Give the last stage 30"),
        ("data=8,microbatch=2,accumulate=3,shares=4x3+4x1", {"batch": 30}, "is 32 sequences, not 30. Share out 15"),
        ("pipeline=2,layers=90+20", {}, "110 layers.*Give the stages fewer"),
        (
            "pipeline=2,layers=50+30,chunks=4,accumulate=4",
            {},
            "50 layers of a stage do not divide over 4. .* chunks=2 and chunks=5",
        ),
    ],
)
def test_what_does_not_divide_is_named_with_the_nearest_that_does(layout: str, given: dict[str, int], says: str) -> None:
    with pytest.raises(NarrowsError, match=says):
        Layout.parse(layout).require(LLAMA, **given)


def test_a_legal_layout_passes() -> None:
    text = "tensor=8,sequence,pipeline=4,chunks=2,data=2,accumulate=256"
    Layout.parse(text).require(LLAMA, devices=64, batch=512, sequence=8192)
    Layout.parse("tensor=2,data=8,expert=8,accumulate=2").require(MIXTRAL, devices=16, batch=16, sequence=4096)
    Layout.parse("pipeline=3,layers=38+22+20,groups=a+b").require(LLAMA)
    Layout.parse("data=8,microbatch=2,accumulate=3,shares=4x3+4x1").require(LLAMA, devices=8, batch=32)
    with pytest.raises(NarrowsError, match=r"8 experts .* do not divide over 16"):
        Layout.parse("data=16,expert=16").require(MIXTRAL)


def test_a_plan_of_another_version_names_both() -> None:
    with pytest.raises(NarrowsError, match=r"narrows-train-0.*narrows-train-1"):
        load('{"format": "narrows-train-0", "layout": "data=2"}')
    with pytest.raises(NarrowsError, match="not a training plan"):
        load("[]")


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_nearest_legal_numbers_lie_on_either_side(number: int, wanted: int) -> None:
    legal = divisors(number)
    assert legal == [d for d in range(1, number + 1) if number % d == 0]
    text = nearest("n", wanted, [d for d in legal if d != wanted])
    for said in text.replace(".", "").split(" ")[3:]:
        if said.startswith("n="):
            assert number % int(said[2:]) == 0


@given(st.sampled_from(["partial", "rows", "whole", "features"]), st.sampled_from(["rows", "whole", "features"]))
def test_a_state_is_boxed_by_a_collective_or_for_nothing(have: str, want: str) -> None:
    free = have == want or have == "whole"  # each device has at least what it needs
    assert (boxing(have, want) == "") == free


@pytest.mark.parametrize("name", ["llama-3.1-8b", "mixtral-8x7b", "gpt2-xl", "deepseek-v2-lite", "gemma-2-9b"])
def test_sequence_parallelism_sends_the_same_bytes_and_keeps_a_share(name: str) -> None:
    graph, step = capture(name), Step.train(1, 2048)

    def sent(cut: Any) -> float:
        return sum(float(cost(op, step).link_bytes) for op in cut if op.kind in COLLECTIVES)

    plain, spread = (tensor_parallel(graph, 4, by_tokens) for by_tokens in (False, True))
    assert sent(plain) * 0.99 <= sent(spread) <= sent(plain) * (1.2 if name.startswith("deepseek") else 1.01)  # latents besides
    assert not [op for op in spread if op.kind == "all_reduce"]
    assert float(total(spread, step).flop) <= float(total(plain, step).flop)
    assert sum(_saved(op, step) for op in spread) < sum(_saved(op, step) for op in plain)


def _saved(op: Op, step: Step) -> float:
    return float(at(op.saved, step)) * op.repeat


@pytest.mark.parametrize("name", sorted(set(bundled()) & {"llama-3.1-8b", "deepseek-v2-lite", "mamba-2.8b", "jamba-v0.1"}))
@pytest.mark.parametrize("by", ["ring", "ulysses"])
def test_only_what_needs_other_tokens_meets_the_context_group(name: str, by: str) -> None:
    graph = capture(name)
    cut = context_parallel(graph, 4, by)
    added = [op for op in cut if op.kind in COLLECTIVES]
    assert {over(op) for op in added} == {"context"}
    assert {op.inputs[0] for op in added} == {op.name for op in graph.find("attention", "latent_attention", "scan")}
    assert [op for op in cut if op.kind not in COLLECTIVES] == list(graph.ops)


def test_experts_are_shared_and_tokens_go_there_and_back() -> None:
    graph, step = MIXTRAL, Step.train(1, 2048)
    cut = expert_parallel(graph, 4)
    exchanges = [op for op in cut if op.kind == "all_to_all"]
    assert [op.repeat for op in exchanges] == [32, 32]
    assert {over(op) for op in exchanges} == {"expert"}
    assert float(total(cut, step).flop) == float(total(graph, step).flop)  # a quarter of the experts, of four replicas' tokens
    share = sum(op.parameters for op in cut if op.kind == "expert") / sum(op.parameters for op in graph if op.kind == "expert")
    assert share == 0.25


def test_layers_are_counted_per_stack() -> None:
    found = {name: layer_count(capture(name)) for name in ("llama-3.1-70b", "gemma-2-9b", "deepseek-v3", "t5-base", "gpt2")}
    assert found == {"llama-3.1-70b": 80, "gemma-2-9b": 42, "deepseek-v3": 61, "t5-base": 24, "gpt2": 12}


@given(st.integers(2, 64), st.integers(1, 8), st.integers(1, 512))
def test_schedules_hold_at_least_one_microbatch_and_the_first_stage_most(p: int, v: int, m: int) -> None:
    for name, schedule in SCHEDULES.items():
        held = [schedule.held(p, v if name == "1f1b" else 1, m, s) for s in range(p)]
        assert min(held) >= 1 - 1e-9 and held[0] == max(held), name
        assert 0 <= schedule.bubble <= 1
