"""Real runs on ranks over gloo: they do what one process does, in the planned order, and send what the graph says."""

import json
import os
import signal
import subprocess
import sys
import time
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
from narrows.run import checkpoint
from narrows.run.check import Run, check, merged, rank, require, small
from narrows.run.expected import order_of
from narrows.run.launch import launch

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
        "tensor=2,pipeline=2,accumulate=4",
        "tensor=2,context=2",
    ],
)
def test_a_layout_computes_what_one_process_does_in_its_order_with_its_bytes(text: str) -> None:
    found = check(Run(Layout.parse(text)), PATIENCE)
    assert found.error < 1e-9
    assert found.ordered
    assert found.volume == pytest.approx(1, abs=0.02)
    assert found.passed
    if found.run.layout.pipeline > 1:
        planned = order_of(found.run.layout).to_actions()
        assert {r.place["pipeline"]: list(r.executed) for r in found.ran} == planned


def test_a_run_that_leaves_out_its_exchanges_does_not_pass() -> None:
    for text in ("context=2", "tensor=2"):
        found = check(Run(Layout.parse(text), exchange="alone"), PATIENCE)
        assert found.error > 1e-3
        assert not found.passed


def test_the_small_model_is_the_llama_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from narrows.modules.decoder import Stage, seeded

    config = {**small(Layout()), "num_key_value_heads": 2}
    own = seeded(Stage(config, range(config["num_hidden_layers"])))
    theirs = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k != "torch_dtype"}))
    theirs.load_state_dict(own.state_dict())
    tokens = torch.arange(24).view(2, 12)
    torch.testing.assert_close(own(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


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
        ("data=2,expert=2", "expert"),
        ("data=2,shard=1", "shard=2"),
        ("context=2,data=2,shard=3", "context=1"),
        ("pipeline=2,balance=vocabulary,accumulate=2", "balance=none"),
        ("data=2,offload=optimizer", "offload=none"),
    ],
)
def test_what_does_not_run_is_refused_with_what_does(text: str, words: str) -> None:
    with pytest.raises(NarrowsError, match=words):
        require(Run(Layout.parse(text)))


def test_the_command_line_runs_a_plan_and_says_what_is_wrong_with_another(tmp_path: Path) -> None:
    from narrows.layout import dump

    plan = tmp_path / "plan.json"
    plan.write_text(dump(Layout.parse("pipeline=2,accumulate=2"), model="any"))
    done = CliRunner().invoke(cli, ["run", "train", str(plan), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["passed"]
    assert found["sent_bytes"] == found["predicted_bytes"]
    kept = ["run", "train", "data=2", "--folder", str(tmp_path / "kept"), "--every", "1", "--json", "--steps"]
    for steps, more in (("1", 1), ("3", 2)):  # the second run goes on where the first has ended
        done = CliRunner().invoke(cli, [*kept, steps])
        assert done.exit_code == 0, done.output
        assert len(json.loads(done.output)["losses"]) == more
    again = CliRunner().invoke(cli, [*kept, "2"])
    assert "Ask for more steps" in str(again.exception)
    wrong = CliRunner().invoke(cli, ["run", "train", str(plan), "--nproc", "3"])
    assert isinstance(wrong.exception, NarrowsError)
    assert "2 devices, not 3" in str(wrong.exception)


def test_torchrun_starts_the_same_run() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "narrows", "run", "train",
               "tensor=2", "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout)["passed"]
