"""Searching layouts: nothing is lost by pruning, errors name the nearest choice, JSON is stable, settings say the layout."""

import json
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from narrows.capture import capture
from narrows.cli import cli
from narrows.emit import TEMPLATES, emit
from narrows.errors import NarrowsError
from narrows.free import cast
from narrows.graph import FP16, Graph
from narrows.layout import Layout, load
from narrows.machine import Cluster, Link, cluster
from narrows.search.priced import Job, price
from narrows.search.train import Space, _shared, plan_train, unbeaten
from narrows.simulate.memory import memory
from narrows.simulate.network import Axes, wire
from narrows.simulate.played import played
from narrows.simulate.training import step_seconds
from narrows.site import Site, site

SELENE, DGX = cluster("selene"), cluster("dgx-h100")
SMALL, MIXTRAL = capture("gpt2"), capture("olmoe-1b-7b")
NO_INNER = Space(sequence=(False,), context_by=("ring",), recompute=("none", "full"))


def job(graph: Graph = SMALL, devices: int = 16, batch: int = 32, sequence: int = 1024, capacity: float = 0) -> Job:
    return Job(graph, SELENE, devices, batch, sequence, capacity)


@settings(max_examples=12, deadline=None)
@given(
    graph=st.sampled_from([SMALL, MIXTRAL]),
    devices=st.sampled_from([4, 8, 16]),
    batch=st.integers(1, 24),
    sequence=st.sampled_from([512, 1024, 4096]),
    capacity=st.sampled_from([3e9, 10e9, 80e9]),
    keep=st.integers(1, 4),
)
def test_pruning_loses_none_of_the_best(
    graph: Graph, devices: int, batch: int, sequence: int, capacity: float, keep: int
) -> None:
    one = job(graph, devices, batch, sequence, capacity)
    quick, whole = (plan_train(one, NO_INNER, keep, prune=prune) for prune in (True, False))
    assert [c.seconds for c in quick.best] == [c.seconds for c in whole.best]
    assert quick.evaluated <= whole.evaluated


def test_the_best_is_the_fastest_of_all_layouts_priced_one_by_one() -> None:
    one = job(devices=4, batch=4, capacity=4e9)
    space = Space(sequence=(True,), context_by=("ring",), shard=(0, 3), recompute=("none", "full"))
    fastest = plan_train(one, space, keep=1).best[0]
    found = []
    for tensor in (1, 2, 4):
        for pipeline in (1, 2, 4):
            for micro in (1, 2, 4):
                for shard in (0, 3):
                    for recompute in ("none", "full"):
                        for chunks in (1, 2, 3, 6, 12):
                            data = 4 // (tensor * pipeline)
                            if not data or 4 % (data * micro) or (chunks > 1 and pipeline == 1) or (shard and data == 1):
                                continue
                            layout = Layout(tensor, tensor > 1, data=data, shard=shard, pipeline=pipeline, chunks=chunks,
                                            microbatch=micro, accumulate=4 // (data * micro), recompute=recompute)  # fmt: skip
                            try:
                                choice = price(one, layout)
                            except NarrowsError:
                                continue
                            if choice.memory.total <= one.capacity_bytes:
                                found.append((choice.seconds, str(layout)))
    assert fastest.seconds == pytest.approx(min(found)[0])


def test_the_ledger_adds_up_and_what_is_chosen_fits_and_is_legal() -> None:
    one = job(MIXTRAL, 32, 64, 2048, 20e9)
    found = plan_train(one, NO_INNER, keep=8)
    assert len(found.best) == 8
    assert [c.seconds for c in found.best] == sorted(c.seconds for c in found.best)
    for choice in found.best:
        assert sum(choice.ledger.values()) == choice.seconds
        assert float(choice.memory.total) <= 20e9
        assert choice.interval[0] <= choice.seconds <= choice.interval[1]
        assert 0 < choice.mfu < 1
        assert choice.joules and choice.joules > 0
        choice.layout.require(MIXTRAL, devices=32, batch=64, sequence=2048)
        assert price(one, Layout.parse(str(choice.layout))).seconds == pytest.approx(choice.seconds)


@pytest.mark.parametrize("name", ["qwen2-vl-7b", "sdxl-unet", "mamba-2.8b"])
def test_other_networks_than_decoders_are_planned(name: str) -> None:
    best = plan_train(Job(capture(name), DGX, 8, 16, 1024), NO_INNER, keep=1).best[0]
    assert best.layout.devices == 8 and best.seconds == sum(best.ledger.values()) > 0


def test_what_does_not_fit_says_by_how_much() -> None:
    found = plan_train(Job(capture("llama-3.1-70b"), SELENE, 8, 8, 4096))
    assert found.best == ()
    assert "need more than 85.9 GB a device; the leanest of them" in found.why_not[0]
    lean = plan_train(Job(capture("llama-3.1-70b"), SELENE, 8, 8, 4096), Space(offload=("none", "optimizer")), keep=1)
    assert lean.best[0].layout.offload == "optimizer"
    assert lean.best[0].ledger["offload"] > 0


def test_nothing_beats_a_point_of_the_front() -> None:
    found = plan_train(job(devices=16, batch=16), NO_INNER, keep=1, pareto=True)
    points = [(c.layout.devices, c.seconds, float(c.memory.total), c.joules or 0.0) for c in found.pareto]
    assert len({devices for devices, *_ in points}) > 2
    for a in points:
        assert not any(b != a and all(x <= y for x, y in zip(b, a, strict=True)) for b in points)
    assert min(s for _, s, *_ in points) == pytest.approx(found.best[0].seconds)
    leanest = min(found.pareto, key=lambda c: c.joules or 0.0)
    assert leanest.seconds > found.best[0].seconds  # it is there for its energy: fewer devices, or nothing is done again


@given(arrays(np.float64, st.tuples(st.integers(1, 40), st.just(3)), elements=st.integers(0, 6).map(float)))
def test_the_front_is_what_enumeration_gives(points: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> None:
    rows = [tuple(row) for row in points.tolist()]
    kept = {row for row in rows if not any(o != row and all(a <= b for a, b in zip(o, row, strict=True)) for o in rows)}
    found = [rows[at] for at in unbeaten(points)]
    assert sorted(found) == sorted(kept)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"devices": 12}, "devices=8 and devices=16"),
        ({"batch": 0}, "above 0"),
        ({"framework": "megatrn"}, "Did you mean megatron"),
        ({"graph": capture("t5-base")}, "an encoder beside"),
        ({"cluster": replace(SELENE, nodes=1, scale_out=None)}, "no link between nodes"),
    ],
)
def test_a_job_that_cannot_be_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(NarrowsError, match=says):
        replace(job(), **changes)


def of_two(one: Cluster, other: Cluster, link: Link | None = None) -> Site:
    """A site of two groups, a and b, joined by a link of its own, or by the first one's."""
    link = link or one.scale_out
    assert link is not None
    return Site("two", "two groups", (replace(one, name="a"), replace(other, name="b")), ((frozenset("ab"), link),))


A100, V100 = cluster("dgx-a100"), cluster("dgx-v100")
TWIN = replace(A100, machine=replace(A100.machine, title="the same, bought a year later"))
DISTANT = Link("ethernet", 4e8, 3e-5)
PAIRS = {"twins": of_two(A100, TWIN), "unlike": of_two(A100, V100), "distant": of_two(A100, A100, DISTANT)}


@settings(max_examples=6, deadline=None)
@given(
    graph=st.sampled_from([SMALL, MIXTRAL]),
    batch=st.sampled_from([8, 12, 16]),
    capacity=st.sampled_from([0.0, 10e9]),
    nodes=st.sampled_from([(1, 1), (1, 2)]),
)
def test_a_cluster_told_as_two_groups_is_the_same_cluster(
    graph: Graph, batch: int, capacity: float, nodes: tuple[int, int]
) -> None:
    whole = Job(graph, replace(A100, nodes=sum(nodes)), 8 * sum(nodes), batch, 1024, capacity)
    halves = replace(whole, cluster=of_two(*(replace(A100, nodes=n) for n in nodes)))
    one, two = (plan_train(job, NO_INNER, keep=2) for job in (whole, halves))
    assert [c.seconds for c in one.best] == [c.seconds for c in two.best]
    assert [c.layout for c in one.best] == [c.layout for c in two.best]


@settings(max_examples=20, deadline=None)
@given(
    tensor=st.sampled_from([1, 2, 4]),
    pipeline=st.sampled_from([1, 2, 3, 4, 6]),
    context=st.sampled_from([1, 2]),
    shard=st.integers(0, 3),
    graph=st.sampled_from([SMALL, MIXTRAL]),
    recompute=st.sampled_from(["none", "full"]),
    framework=st.sampled_from(["megatron", "fsdp"]),
)
def test_twins_that_are_not_known_to_be_equal_take_as_long_as_one_group(
    tensor: int, pipeline: int, context: int, shard: int, graph: Graph, recompute: str, framework: str
) -> None:
    if 16 % (tensor * pipeline * context) and pipeline not in (3, 6):
        return
    devices = 48 if pipeline in (3, 6) else 16  # a stage of three lies across both groups
    data = devices // (tensor * pipeline * context)
    layers = {"gpt2": 12, "olmoe-1b-7b": 16}[graph.name]
    if layers % pipeline:
        return
    text = f"tensor={tensor},context={context},data={data},shard={shard},pipeline={pipeline},accumulate=4,recompute={recompute}"
    layout = Layout.parse(text)
    half = replace(A100, nodes=devices // 16)
    whole = Job(graph, replace(A100, nodes=devices // 8), devices, layout.batch, 4096, 0.0, framework)
    twins = replace(whole, cluster=of_two(half, replace(TWIN, nodes=devices // 16)))
    one, two = price(whole, layout), price(twins, layout)
    assert one.seconds == pytest.approx(two.seconds, rel=1e-12)
    assert one.ledger == pytest.approx(two.ledger, rel=1e-12)
    assert float(one.memory.total) == float(two.memory.total)
    assert (
        one.mfu == pytest.approx(two.mfu)
        and one.joules == pytest.approx(two.joules)
        and one.dollars == pytest.approx(two.dollars)
    )


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("graph", [SMALL, MIXTRAL], ids=lambda graph: graph.name)
def test_more_devices_never_make_the_plan_slower(name: str, graph: Graph) -> None:
    pair = Job(graph, PAIRS[name], 16, 16, 1024)
    both = plan_train(pair, NO_INNER, keep=1).best[0]
    for group in pair.site.groups:
        alone = plan_train(Job(graph, group, 8, 16, 1024), NO_INNER, keep=1).best[0]
        assert both.seconds <= alone.seconds
    assert price(pair, both.layout).seconds == both.seconds == sum(both.ledger.values())


@settings(max_examples=5, deadline=None)
@given(
    pair=st.sampled_from(sorted(PAIRS)),
    graph=st.sampled_from([SMALL, MIXTRAL]),
    batch=st.sampled_from([8, 16]),
    capacity=st.sampled_from([0.0, 8e9]),
    keep=st.integers(1, 3),
)
def test_pruning_loses_none_of_the_best_on_a_site(pair: str, graph: Graph, batch: int, capacity: float, keep: int) -> None:
    one = Job(graph, PAIRS[pair], 16, batch, 1024, capacity)
    quick, whole = (plan_train(one, NO_INNER, keep, prune=prune) for prune in (True, False))
    assert [c.seconds for c in quick.best] == [c.seconds for c in whole.best]
    assert quick.evaluated <= whole.evaluated


def splits(pipeline: int) -> Iterator[str]:
    """Every way to give 12 layers to the stages of two groups, those of a group equally many; '' for all alike."""
    half = pipeline // 2
    yield ""
    for first, rest in product(range(1, 12), repeat=2):
        if half and first != rest and first * half + rest * half == 12:
            yield "+".join([str(first)] * half + [str(rest)] * half)


def shares(data: int, many: int) -> Iterator[tuple[str, int]]:
    """Every way to give so many microbatches to the replicas of two groups, and the most that one gets."""
    half = data // 2
    for first, rest in product(range(1, many), repeat=2):
        if half and first != rest and (first + rest) * half == many:
            yield f"{half}x{first}+{half}x{rest}", max(first, rest)


@pytest.mark.parametrize("name", ["unlike", "distant"])
def test_the_best_on_a_site_is_the_fastest_of_all_layouts_priced_one_by_one(name: str) -> None:
    pair = PAIRS[name]
    one = Job(SMALL, replace(pair, groups=tuple(replace(group, devices_per_node=4) for group in pair.groups)), 8, 8, 1024)
    found = {}
    for groups, tensor, pipeline, micro in product(("a", "b", "a+b", "b+a"), (1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8)):
        data, both = 4 * len(groups.split("+")) // (tensor * pipeline), "+" in groups
        if not data or 8 % (data * micro):
            continue
        base = {
            "tensor": tensor,
            "sequence": tensor > 1,
            "data": data,
            "pipeline": pipeline,
            "microbatch": micro,
            "groups": groups,
        }
        ways: list[dict[str, Any]] = [
            {"accumulate": 8 // (data * micro), "layers": layers, "chunks": chunks}
            for layers, chunks in product(splits(pipeline) if both else [""], (1, 2, 3, 4, 6, 12))
        ]
        if both and pipeline == 1:
            ways += [{"accumulate": most, "shares": share} for share, most in shares(data, 8 // micro)]
        for way in ways:
            try:
                choice = price(one, Layout(**base, **way))
            except NarrowsError:
                continue
            if float(choice.memory.total) <= choice.room:
                found[str(choice.layout)] = choice.seconds
    best = plan_train(one, Space(sequence=(True,), context_by=("ring",), shard=(0,), recompute=("none",)), keep=1).best[0]
    assert best.seconds == pytest.approx(min(found.values()))
    assert any("layers=" in text for text in found) and any("shares=" in text for text in found)


@settings(max_examples=300)
@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from([0.5, 1.0, 3.0])), min_size=1, max_size=3),
    st.sampled_from([np.inf, 4.0, 9.0]),
)
def test_a_whole_is_shared_out_in_every_way_below_the_limit(total: int, kinds: list[tuple[int, float]], limit: float) -> None:
    counts, seconds = [count for count, _ in kinds], [each for _, each in kinds]
    found = _shared(total, counts, seconds, limit)
    if len(kinds) == 1:
        assert found.tolist() == [[total / counts[0]]] * (total / counts[0] * seconds[0] <= limit)
        return
    every = product(range(1, total + 1), repeat=len(kinds))
    legal = [row for row in every if sum(map(mul, row, counts)) == total and max(map(mul, row, seconds)) <= limit]
    assert sorted(map(tuple, found.tolist())) == legal


def test_a_collective_is_as_slow_as_the_seam_it_crosses() -> None:
    inside, across = (wire(A100, 2, 4, seams=((at, DISTANT),)) for at in (8, 4))
    assert inside == wire(A100, 2, 4)
    assert across.link is not None and across.link.name == "ethernet"
    assert across.link.bandwidth_bytes_per_s == 4 * DISTANT.bandwidth_bytes_per_s  # four members in a node, each with a card
    near, far = (price(Job(SMALL, pair, 16, 16, 1024), Layout.parse("data=16")) for pair in (PAIRS["twins"], PAIRS["distant"]))
    assert far.ledger["gradients"] > 10 * near.ledger["gradients"] and far.ledger["forward"] == near.ledger["forward"]


def test_the_fullest_rank_is_found_in_every_group() -> None:
    one, layout = Job(MIXTRAL, PAIRS["twins"], 16, 16, 1024), Layout.parse("data=4,pipeline=4,accumulate=4,layers=3+2+8+3")
    net = one.network(layout)
    ranks = [float(memory(net, layout, replace(Axes.of(layout), size=0), stage).total) for stage in range(4)]
    assert float(price(one, layout).memory.total) == max(ranks) == ranks[2]


def test_slower_replicas_get_fewer_microbatches() -> None:
    graph = cast(capture("llama-3.2-1b"), FP16)
    pair = Job(graph, site("a100-v100"), 64, 512, 4096)
    choice = plan_train(pair, Space(shard=(1,)), keep=1).best[0]
    (fast, most), (slow, few) = choice.layout.rounds
    assert choice.layout.groups == "a100+v100" and fast == slow and most > few
    assert price(pair, replace(choice.layout, shares="", accumulate=(most + few) // 2)).seconds > 1.2 * choice.seconds
    with pytest.raises(NarrowsError, match="32 and 32 replicas"):
        price(pair, replace(choice.layout, shares="16x14+48x6", accumulate=14))


def test_slower_devices_get_fewer_layers_and_what_they_can_hold() -> None:
    graph = cast(capture("llama-3.1-8b"), FP16)
    pair = Job(graph, site("a100-v100"), 64, 64, 4096)
    choice = plan_train(pair, keep=1).best[0]
    split, groups = choice.layout.split, choice.layout.groups.split("+")
    assert set(groups) == {"a100", "v100"}
    fast, slow = (split[groups.index(name) * len(split) // 2] for name in ("a100", "v100"))
    assert fast > slow
    evenly = price(pair, replace(choice.layout, layers="", chunks=1))
    assert evenly.seconds > 1.2 * choice.seconds
    leaner = plan_train(replace(pair, capacity_bytes=16e9), keep=1).best[0]
    assert float(leaner.memory.total) <= leaner.room == 16e9


@pytest.mark.parametrize("layout", ["groups=v100+a100,layers=8+24", "groups=a100+v100,layers=20+12", "groups=v100+a100"])
def test_a_step_on_unlike_groups_is_near_the_one_that_is_played(layout: str) -> None:
    where, graph = site("a100-v100"), cast(capture("llama-3.1-8b"), FP16)
    chosen = Layout.parse(f"context=2,data=16,shard=1,pipeline=2,accumulate=8,{layout}")
    spent = step_seconds(graph, where, chosen, 4096)
    passes = sum(seconds for cause, seconds in spent.items() if cause not in ("gradients", "optimizer", "offload", "host"))
    assert passes == pytest.approx(played(graph, where, chosen, 4096)[0].seconds, rel=0.06)


@pytest.mark.parametrize(
    ("layout", "devices", "says"),
    [
        ("data=8,groups=c", 16, "'c' is no group of two"),
        ("data=8", 16, "is 8 devices, not 16. Give data=16"),
        ("data=16,groups=a", 16, "is 16 devices, not 8. Give data=8"),
        ("data=8,accumulate=2,groups=a+a", 16, "twice"),
    ],
)
def test_a_layout_that_does_not_fit_a_site_is_refused(layout: str, devices: int, says: str) -> None:
    with pytest.raises(NarrowsError, match=says):
        price(Job(SMALL, PAIRS["unlike"], devices, 16, 1024), Layout.parse(layout))


def test_what_needs_one_kind_of_device_says_so() -> None:
    pair = Job(SMALL, PAIRS["unlike"], 16, 16, 1024)
    with pytest.raises(NarrowsError, match="groups a, b"):
        _ = pair.single
    with pytest.raises(NarrowsError, match="7 devices are no group: a has 8, b has 8"):
        replace(pair, devices=7)
    with pytest.raises(NarrowsError, match="on one group"):
        emit("megatron", Layout.parse("pipeline=2,layers=8+4"), SMALL, 1024, 8)


def test_a_batch_that_cannot_be_split_names_the_nearest() -> None:
    with pytest.raises(NarrowsError, match=r"7 sequences cannot be split: .* 5 replicas. The nearest are batch=5 and batch=10"):
        plan_train(job(devices=5, batch=7, sequence=512))


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["plan", "train", *args])


def test_the_command_prints_the_contract() -> None:
    asked = ("llama-3.1-70b", "--cluster", "dgx-h100", "--devices", "64", "--global-batch", "64", "--seq", "4096", "--top", "2")
    found = json.loads(run(*asked, "--json").stdout)
    assert {"evaluated", "seconds", "best", "why_not"} <= set(found)
    best = found["best"][0]
    names = {"config", "step_seconds", "interval", "tokens_per_second", "mfu", "memory_bytes", "ledger"}
    assert names <= set(best)
    assert best["step_seconds"] == sum(best["ledger"].values())
    assert best["tokens_per_second"] * best["step_seconds"] == pytest.approx(64 * 4096)
    assert Layout.parse(best["config"]).devices == 64
    said = run(*asked, "--layout", best["config"])
    assert said.exit_code == 0 and "Where the time of the fastest goes" in said.stdout and best["config"][:20] in said.stdout


def test_the_command_plans_on_a_site(tmp_path: Path) -> None:
    asked = ("gpt2", "--cluster", "a100-v100", "--global-batch", "64", "--seq", "1024", "--top", "1")
    found = json.loads(run(*asked, "--pareto", "--json").stdout)
    best = found["best"][0]
    assert found["cluster"] == "a100-v100" and found["devices"] == 64
    assert best["memory_bytes"] <= best["room_bytes"] and best["step_seconds"] == sum(best["ledger"].values())
    assert len({point["devices"] for point in found["pareto"]}) == 2
    said = run(*asked, "--pareto", "--timeline", f"{tmp_path}/step.svg").stdout
    assert "32 a100-80gb and 32 v100-sxm2-32gb" in said and "each a tenth leaner" in " ".join(said.split())
    assert (tmp_path / "step.svg").read_text().startswith("<svg")


def test_a_plan_is_kept_and_read(tmp_path: object) -> None:
    file = f"{tmp_path}/plan.json"
    asked = ("gpt2", "--cluster", "dgx-a100", "--devices", "8", "--global-batch", "16", "--seq", "1024", "--out", file)
    assert run(*asked).exit_code == 0
    with open(file) as opened:
        layout, about = load(opened.read())
    assert layout.batch == 16 and about["model"] == "gpt2"
    wrong = run("gpt2", "--cluster", "dgx-a100", "--global-batch", "16", "--layout", "tensor=5")
    assert isinstance(wrong.exception, NarrowsError) and "tensor=4 and tensor=6" in str(wrong.exception)


def test_training_is_in_16_bits_unless_it_is_said() -> None:
    asked = ("gpt2", "--cluster", "dgx-v100", "--global-batch", "8", "--seq", "1024", "--json")
    usual, half, full = (
        json.loads(run(*asked, *more).stdout)["best"][0] for more in ((), ("--dtype", "fp16"), ("--dtype", "fp32"))
    )
    assert usual["step_seconds"] == half["step_seconds"] < full["step_seconds"]  # a V100 has no bf16


MEGATRON = "tensor=8,sequence,context=2,data=2,shard=1,pipeline=4,chunks=2,accumulate=16,recompute=full"


def test_megatron_s_flags_say_the_layout() -> None:
    text = emit("megatron", Layout.parse(MEGATRON), capture("llama-3.1-70b"), 8192, 8)
    assert text.startswith("CUDA_DEVICE_MAX_CONNECTIONS=1 torchrun --nnodes 16 --nproc-per-node 8 pretrain_gpt.py")
    for flag in ("tensor-model-parallel-size 8", "pipeline-model-parallel-size 4", "num-virtual-stages-per-pipeline-rank 2",
                 "context-parallel-size 2", "sequence-parallel", "use-distributed-optimizer", "global-batch-size 32",
                 "recompute-granularity full"):  # fmt: skip
        assert f"--{flag} \\\n" in text, flag


def test_each_framework_s_file_parses_and_says_the_layout() -> None:
    graph = capture("llama-3.1-8b")
    zero3 = Layout.parse("data=16,shard=3,microbatch=2,accumulate=4,recompute=full")
    deepspeed = json.loads(emit("deepspeed", zero3, graph, 4096, 8))
    assert deepspeed["zero_optimization"]["stage"] == 3 and deepspeed["train_batch_size"] == 128
    assert "fsdp_reshard_after_forward: true" in emit("accelerate", zero3, graph, 4096, 8)
    staged = Layout.parse("tensor=2,sequence,data=2,shard=3,pipeline=4,chunks=2,microbatch=2,accumulate=8")
    titan = tomllib.loads(emit("torchtitan-0.2", staged, graph, 4096, 8))
    assert titan["parallelism"]["pipeline_parallel_schedule"] == "Interleaved1F1B"
    assert titan["parallelism"]["pipeline_parallel_layers_per_stage"] == 4
    assert titan["training"]["local_batch_size"] == 16 and titan["training"]["global_batch_size"] == 32
    spread = titan["parallelism"]
    product = 1
    for name in ("data_parallel_replicate", "data_parallel_shard", "tensor_parallel", "context_parallel", "pipeline_parallel"):
        product *= spread[f"{name}_degree"]
    assert product == staged.devices


@pytest.mark.parametrize(
    ("name", "layout", "field"),
    [
        ("megatron", "pipeline=4,schedule=zb-v", "schedule"),
        ("megatron", "data=4,pipeline=2,shard=3", "shard"),
        ("deepspeed", "pipeline=2", "pipeline"),
        ("torchtitan", "tensor=2", "sequence"),
        ("torchtitan", "data=2,shard=1", "shard"),
        ("accelerate", "tensor=2,data=2,shard=3", "tensor"),
    ],
)
def test_what_a_framework_lacks_is_refused_by_name(name: str, layout: str, field: str) -> None:
    with pytest.raises(NarrowsError) as caught:
        emit(name, Layout.parse(layout), SMALL, 1024, 8)
    assert caught.value.where == f"emit: {field}"


def test_templates_are_found_by_name_with_or_without_version() -> None:
    layout = Layout.parse("data=8,shard=3")
    for name in TEMPLATES:
        assert emit(name, layout, SMALL, 1024, 8) == emit(name.partition("-")[0], layout, SMALL, 1024, 8)
    with pytest.raises(NarrowsError, match="Did you mean"):
        emit("megatrn", layout, SMALL, 1024, 8)
