"""Searching layouts: nothing is lost by pruning, errors name the nearest choice, JSON is stable, settings say the layout."""

import json
import tomllib
from dataclasses import replace

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.capture import capture
from narrows.cli import cli
from narrows.emit import TEMPLATES, emit
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.layout import Layout, load
from narrows.machine import cluster
from narrows.search.train import Job, Space, plan_train, price

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


def test_what_does_not_fit_says_by_how_much() -> None:
    found = plan_train(Job(capture("llama-3.1-70b"), SELENE, 8, 8, 4096))
    assert found.best == ()
    assert "need more than 85.9 GB a device; the leanest of them" in found.why_not[0]
    lean = plan_train(Job(capture("llama-3.1-70b"), SELENE, 8, 8, 4096), Space(offload=("none", "optimizer")), keep=1)
    assert lean.best[0].layout.offload == "optimizer"
    assert lean.best[0].ledger["offload"] > 0


def test_nothing_beats_a_point_of_the_front() -> None:
    found = plan_train(job(devices=16, batch=16), NO_INNER, keep=1, pareto=True)
    points = [(c.layout.devices, c.seconds, float(c.memory.total)) for c in found.pareto]
    assert len({devices for devices, _, _ in points}) > 2
    for a in points:
        assert not any(b != a and all(x <= y for x, y in zip(b, a, strict=True)) for b in points)
    assert min(s for _, s, _ in points) == pytest.approx(found.best[0].seconds)


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
    assert text.startswith("torchrun --nnodes 16 --nproc-per-node 8 pretrain_gpt.py")
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
