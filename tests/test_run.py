"""Real runs on ranks over gloo: they do what one process does, in the planned order, and send what the graph says."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner

from narrows.cli import cli
from narrows.errors import NarrowsError
from narrows.layout import Layout
from narrows.machine import Link, Machine, machine
from narrows.run import checkpoint
from narrows.run.check import check, merged, rank
from narrows.run.expected import Seconds, forecast
from narrows.run.job import Run, require, small
from narrows.run.launch import launch
from narrows.run.timing import timed
from narrows.simulate.orders import gpipe, interleaved, one_f_one_b
from narrows.simulate.pipeline import Order, Work
from narrows.simulate.planned import v_shaped, zero_bubble

pytestmark = pytest.mark.xdist_group("ranks")
PATIENCE = 60.0


@pytest.mark.parametrize(
    "text",
    [
        "data=2",
        "tensor=2,sequence=true,recompute=full",
        "context=2",
        "context=4,context_by=ulysses",
        "data=2,shard=3,accumulate=2",
        "pipeline=2,accumulate=4,schedule=gpipe",
        "pipeline=2,chunks=2,accumulate=4",
        "pipeline=2,accumulate=4,schedule=zb-1p",
        "pipeline=2,accumulate=6,schedule=zb-v",
        "pipeline=2,accumulate=5,schedule=v-half,recompute=full",
        "pipeline=2,accumulate=4,balance=layers,recompute=full,recompute_layers=1",
        "pipeline=2,accumulate=2,layers=3+1",
        "tensor=2,pipeline=2,accumulate=4",
        "tensor=2,context=2",
        "data=4,expert=2",
        "data=2,expert=2,pipeline=2,accumulate=2,recompute=full",
        "data=2,shard=3,offload=optimizer,offload_to=disk",
        "tensor=2,recompute=selective,offload=optimizer,offload_to=disk",
    ],
)
def test_a_layout_computes_what_one_process_does_in_its_order_with_its_bytes(text: str) -> None:
    found = check(Run(Layout.parse(text)), PATIENCE)
    assert found.error < 1e-9
    assert found.ordered
    assert found.volume == pytest.approx(1, abs=0.02)
    assert found.passed


@pytest.mark.parametrize(
    ("text", "planned"),
    [
        ("pipeline=2,accumulate=4,schedule=gpipe", lambda: gpipe(2, 4)),
        ("tensor=2,pipeline=2,accumulate=4", lambda: one_f_one_b(2, 4)),
        ("pipeline=2,chunks=2,accumulate=4", lambda: interleaved(2, 4, 2)),
        ("pipeline=2,accumulate=4,schedule=zb-1p", lambda: zero_bubble(Work.of(2, 4), 2)),
        ("pipeline=2,accumulate=6,schedule=zb-v", lambda: v_shaped(Work.of(4, 6), shape="zero")),
    ],
)
def test_torch_runs_the_passes_that_were_planned(text: str, planned: Callable[[], Order]) -> None:
    found = check(Run(Layout.parse(text)), PATIENCE)
    assert {r.place["pipeline"]: list(r.executed) for r in found.ran} == planned().to_actions()


def test_a_run_that_leaves_out_its_exchanges_does_not_pass() -> None:
    for text in ("context=2", "tensor=2"):
        found = check(Run(Layout.parse(text), exchange="alone"), PATIENCE)
        assert found.error > 1e-3
        assert not found.passed


@pytest.mark.parametrize("layout", [Layout(), Layout(data=2, expert=2)])
def test_the_small_models_are_those_of_transformers(layout: Layout) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from narrows.modules.decoder import Stage, seeded

    config = {**small(layout), "num_key_value_heads": 2}
    own = seeded(Stage(config, range(config["num_hidden_layers"])))
    kept = {k: v for k, v in config.items() if k not in ("torch_dtype", "model_type")}
    turning = {"rope_type": "default", "rope_theta": 10000.0}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], rope_parameters=turning, **kept))
    theirs.load_state_dict(own.state_dict())
    tokens = torch.arange(24).view(2, 12)
    torch.testing.assert_close(own(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_what_is_computed_again_is_not_kept() -> None:
    from narrows.modules.decoder import Stage, again, causal, seeded

    def kept(recompute: int, selective: bool = False) -> int:
        config, bytes_ = small(Layout()), [0]
        stage = seeded(Stage(config, range(4), mix=again(causal) if selective else causal))
        stage.recompute = recompute

        def pack(x: torch.Tensor) -> torch.Tensor:
            bytes_[0] += x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            stage(torch.arange(64).view(1, 64))
        return bytes_[0]

    none, *some = [kept(layers) for layers in range(5)]
    assert none - some[0] == pytest.approx(some[2] - some[3])
    assert some == sorted(some, reverse=True)
    assert some[3] < none / 4
    assert some[3] < kept(0, selective=True) < none


def test_a_forecast_adds_up_and_knows_what_ranks_share() -> None:
    here = replace(machine("desktop-avx2"), links=(Link("gloo", 1e9, 1e-4),))

    def step(text: str, cores: int = 8, host: float = 0.0, on: Machine = here) -> Seconds:
        return forecast(Run(Layout.parse(text), dtype="fp32"), on, cores, host).median

    one, two = step("data=1"), step("data=2")
    assert one.exchange == pytest.approx(0, abs=1e-12)
    assert two.busy > one.busy  # gradients are copied together and apart
    assert step("data=4", cores=2).step == pytest.approx(step("data=4").step + step("data=4").busy)
    assert step("data=2", host=1.0).step == pytest.approx(two.step + 1)
    slower = replace(here, links=(Link("gloo", 5e8, 2e-4),))
    for text in ("data=2", "tensor=2", "data=2,shard=3", "data=2,expert=2", "context=2"):
        assert step(text, on=slower).exchange == pytest.approx(2 * step(text).exchange, rel=0.01)
    assert step("data=2,shard=3").exchange > two.exchange
    staged = step("pipeline=2,accumulate=4")
    assert staged.exchange > staged.busy / 5  # the bubble, of one microbatch in five
    assert step("pipeline=2,accumulate=4", cores=1).step > staged.step
    assert step("tensor=2,recompute=full").step > step("tensor=2").step


def _counted(elements: int) -> dict[str, tuple[float, float]]:
    """(bytes that Traffic counts, bytes that the kernel says were written) of this rank, by call."""
    from narrows.run.traffic import Traffic, written_bytes

    ranks, here = dist.get_world_size(), dist.get_rank()
    x = torch.ones(elements)

    def pass_on() -> None:
        got = torch.empty_like(x)
        ops = [dist.P2POp(dist.isend, x, (here + 1) % ranks), dist.P2POp(dist.irecv, got, (here - 1) % ranks)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    calls = {
        "all_reduce": lambda: dist.all_reduce(x),
        "all_gather": lambda: dist.all_gather_into_tensor(torch.empty(elements * ranks), x),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(x), x),
        "send": pass_on,
    }
    found = {}
    for name, call in calls.items():
        dist.barrier()
        before = written_bytes()
        with Traffic() as traffic:
            call()
        dist.barrier()
        assert traffic.calls == {name: 1}
        found[name] = (traffic.total_bytes, written_bytes() - before)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_counted_bytes_are_those_that_the_kernel_saw_written(ranks: int) -> None:
    for row in launch(_counted, ranks, 100_000, patience=PATIENCE):
        for counted, written in row.values():
            assert written == pytest.approx(counted, rel=0.01)


def _fails(how: str) -> None:
    dist.barrier()
    if dist.get_rank() == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("it lost its way")
    dist.all_reduce(torch.ones(3))
    dist.all_reduce(torch.ones(3))


@pytest.mark.parametrize(("how", "words"), [("killed", "SIGKILL"), ("raised", "it lost its way")])
def test_a_rank_that_dies_is_named_and_the_others_are_stopped(how: str, words: str) -> None:
    launch(_counted, 2, 1000)  # the server that forks ranks is up
    start = time.monotonic()
    with pytest.raises(NarrowsError, match=rf"rank 1 of 4: .*{words}"):
        launch(_fails, 4, how, patience=PATIENCE)
    assert time.monotonic() - start < 10


def _waits() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def test_ranks_that_do_not_end_are_named() -> None:
    with pytest.raises(NarrowsError, match="ranks 0"):
        launch(_waits, 2, patience=3.0)


def _same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    run = Run(Layout.parse("tensor=2"), steps=4)
    whole = merged(launch(rank, 2, run, patience=PATIENCE), "state")
    kept = replace(run, folder=str(tmp_path), every=1)
    with pytest.raises(NarrowsError, match="rank 1 of 2: SIGKILL"):
        launch(rank, 2, replace(kept, dies=(1, 2)), patience=PATIENCE)
    assert 1 <= checkpoint.latest(tmp_path) <= 3
    assert _same(merged(launch(rank, 2, kept, patience=PATIENCE), "state"), whole)


def test_experts_that_were_shared_resume_where_they_are_not(tmp_path: Path) -> None:
    spread, staged = (Layout.parse(text) for text in ("data=2,expert=2", "data=2,pipeline=2"))
    run = Run(spread, config=small(spread), steps=2, folder=str(tmp_path), every=2)
    launch(rank, 2, run, patience=PATIENCE)
    found = check(replace(run, layout=staged, steps=3), PATIENCE)
    assert len(found.losses) == 1  # the last step alone: the others were in the checkpoint
    assert found.passed


def test_a_checkpoint_that_is_torn_or_damaged_never_loads(tmp_path: Path) -> None:
    run = Run(Layout(), steps=2, folder=str(tmp_path), every=1)
    launch(rank, 1, run, patience=PATIENCE)
    assert checkpoint.latest(tmp_path) == 2
    newest = checkpoint.folder_of(tmp_path, 2)
    atoms = tmp_path / "atoms" / "step-00000002"
    assert checkpoint.consolidate(newest, atoms) == len(checkpoint.Source(newest).places) // 4
    with pytest.raises(NarrowsError, match=r"has no model\.nowhere"):
        checkpoint.Source(atoms).states("model.nowhere")
    file = newest / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(NarrowsError, match="do not have its digest"):
        checkpoint.Source(newest)
    file.unlink()
    with pytest.raises(NarrowsError, match="0 files"):
        checkpoint.Source(newest)
    file.with_suffix(".json").unlink()  # as if it had been killed before it was on the disk
    assert checkpoint.latest(tmp_path) == 1
    (newest / checkpoint.MANIFEST).unlink()
    with pytest.raises(NarrowsError, match="missing or damaged"):
        checkpoint.Source(newest)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data=2,expert=2,shard=2", "shard=0"),
        ("data=2,expert=2,tensor=2", "tensor=1"),
        ("data=2,shard=1", "shard=2"),
        ("context=2,data=2,shard=3", "context=1"),
        ("pipeline=2,balance=vocabulary,accumulate=2", "balance=layers"),
        ("data=2,offload=optimizer", "offload_to=disk"),
        ("data=2,offload=activations,offload_to=disk", "offload=optimizer"),
        ("context=2,recompute=selective", "recompute=full"),
        ("pipeline=2,chunks=2,accumulate=4,recompute=full,recompute_layers=1", "recompute_layers=0"),
        ("data=2,gradient_bits=1", "gradient_bits=16"),
    ],
)
def test_what_does_not_run_is_refused_with_what_does(text: str, words: str) -> None:
    with pytest.raises(NarrowsError, match=words):
        require(Run(Layout.parse(text)))


def test_the_command_line_runs_a_plan_and_says_what_is_wrong_with_another(tmp_path: Path) -> None:
    from narrows.layout import dump

    plan = tmp_path / "plan.json"
    plan.write_text(dump(Layout.parse("pipeline=2,accumulate=2"), model="any"))
    done = CliRunner().invoke(cli, ["run", "train", str(plan), "--timed", "0", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["passed"]
    assert found["sent_bytes"] == found["predicted_bytes"]
    assert found["timed"] is None
    kept = ["run", "train", "data=2", "--timed", "0", "--folder", str(tmp_path / "kept"), "--every", "1", "--json", "--steps"]
    for steps, more in (("1", 1), ("3", 2)):  # the second run goes on where the first has ended
        done = CliRunner().invoke(cli, [*kept, steps])
        assert done.exit_code == 0, done.output
        assert len(json.loads(done.output)["losses"]) == more
    again = CliRunner().invoke(cli, [*kept, "2"])
    assert "Ask for more steps" in str(again.exception)
    wrong = CliRunner().invoke(cli, ["run", "train", str(plan), "--nproc", "3"])
    assert isinstance(wrong.exception, NarrowsError)
    assert "2 devices, not 3" in str(wrong.exception)


def test_the_command_line_times_a_plan_beside_its_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linked = replace(machine("desktop-avx2"), links=(Link("gloo", 1e9, 1e-4),))
    monkeypatch.setattr("narrows.run.timing.linked", lambda *_: linked)
    monkeypatch.setenv("NARROWS_HOME", str(tmp_path))
    machine("desktop-avx2").save(tmp_path / "here.toml")
    done = CliRunner().invoke(cli, ["run", "train", "data=2", "--seq", "16", "--timed", "2", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)["timed"]
    assert found["steps"] == 2
    for one in (found["measured"], found["predicted"], found["low"], found["high"]):
        assert one["step_seconds"] == pytest.approx(one["busy_seconds"] + one["queued_seconds"] + one["exchange_seconds"])
    assert 0 < found["measured"]["busy_seconds"] < found["measured"]["step_seconds"]
    assert found["low"]["step_seconds"] <= found["predicted"]["step_seconds"] <= found["high"]["step_seconds"]
    assert found["host_seconds"] < found["predicted"]["busy_seconds"]
    shown = CliRunner().invoke(cli, ["run", "train", "data=2", "--seq", "16", "--timed", "1"])
    assert "interval" in shown.output
    assert "wait for a core" in shown.output
    wrong = CliRunner().invoke(cli, ["run", "train", "data=1", "--machine", "h100-sxm"])
    assert "is a gpu" in str(wrong.exception)
    on_disk = CliRunner().invoke(cli, ["run", "train", "data=1,offload=optimizer,offload_to=disk"])
    assert on_disk.exit_code == 0
    assert "not timed" in on_disk.output
    with pytest.raises(NarrowsError, match="--timed 0"):
        timed(Run(Layout.parse("offload=optimizer,offload_to=disk")), linked)


def test_torchrun_starts_the_same_run() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "narrows", "run", "train", "tensor=2", "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"]
