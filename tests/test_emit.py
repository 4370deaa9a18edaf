"""Launch settings: what each framework's own code makes of them, as far as it runs here, and what it would refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from narrows.capture import capture
from narrows.capture.config import from_config
from narrows.emit import emit
from narrows.errors import NarrowsError
from narrows.layout import Layout
from narrows.run.job import small

pytestmark = pytest.mark.xdist_group("ranks")

STEP = """
import json
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import FSDPModule


class Block(torch.nn.Linear):
    pass


class Model(torch.nn.Sequential):
    _no_split_modules = ["Block"]


on = Accelerator(cpu=True)
model = Model(Block(4, 4), Block(4, 4), torch.nn.Linear(4, 1))
on.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # Accelerate shards on GPUs alone: its own function does so here
model = fsdp2_prepare_model(on, model)
optimizer = torch.optim.AdamW(model.parameters())
before = [p.detach().clone() for p in model.parameters()]
on.backward(model(torch.ones(2, 4)).sum())
optimizer.step()
moved = all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))  # asks all ranks
if on.is_main_process:
    sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]
    print(json.dumps({
        "ranks": on.num_processes, "precision": on.mixed_precision, "sharded": len(sharded), "moved": moved,
        "gathered": [m._get_fsdp_state()._fsdp_param_group._reshard_after_forward for m in sharded[1:]],
    }))
"""


def test_accelerate_takes_a_step_as_its_settings_say(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    settings, script = tmp_path / "settings.yaml", tmp_path / "step.py"
    settings.write_text(emit("accelerate", Layout.parse("data=2,shard=2"), from_config(small(Layout()), "small"), 64, 8))
    script.write_text(STEP)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]  # any free port
    done = subprocess.run([*launch, "--config_file", settings, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["ranks"], found["precision"]) == (2, "no")
    assert found["sharded"] == 3  # each block, and the whole
    assert found["gathered"] == [False, False]  # weights stay so after the forward pass; its default is that they do not
    assert found["moved"]


# What the frameworks' own checks say no to: Megatron-LM core_v0.14.0 `validate_args` and `MoELayer`, DeepSpeed 0.17.6
# `DeepSpeedEngine`, torchtitan 0.2.2 `parallelize_llama` and `ParallelDims`.
@pytest.mark.parametrize(
    ("name", "layout", "field"),
    [
        ("megatron", "data=4,tensor=2,expert=2", "sequence"),
        ("deepspeed", "data=4,tensor=2,shard=3", "shard"),
        ("deepspeed", "data=4,tensor=2,sequence", "sequence"),
        ("deepspeed", "data=4,offload=optimizer", "offload"),
        ("torchtitan", "data=4,pipeline=2,accumulate=2", "shard"),
        ("torchtitan", "context=2", "shard"),
        ("torchtitan", "data=4,expert=2", "shard"),
        ("torchtitan", "data=4,recompute=selective", "recompute"),
        ("torchtitan", "data=4,offload=optimizer", "offload"),
        ("accelerate", "data=4,recompute=full", "recompute"),
    ],
)
def test_what_a_framework_would_refuse_is_refused_before(name: str, layout: str, field: str) -> None:
    with pytest.raises(NarrowsError) as caught:
        emit(name, Layout.parse(layout), capture("olmoe-1b-7b"), 1024, 8)
    assert caught.value.where == f"emit: {field}"


def test_megatron_gets_as_many_queues_as_its_sharding_asks_for() -> None:
    graph = capture("llama-3.1-8b")
    plain, sharded = (emit("megatron", Layout.parse(f"data=8,shard={shard}"), graph, 4096, 8) for shard in (1, 3))
    assert plain.startswith("CUDA_DEVICE_MAX_CONNECTIONS=1 ")
    assert sharded.startswith("CUDA_DEVICE_MAX_CONNECTIONS=8 ")
    assert "--ckpt-format fsdp_dtensor" in sharded
    assert "ckpt-format" not in plain


def test_accelerate_s_settings_without_sharding_are_ddp() -> None:
    text = emit("accelerate", Layout.parse("data=8,accumulate=2"), capture("llama-3.1-8b"), 4096, 8)
    assert "distributed_type: MULTI_GPU" in text
    assert "mixed_precision: 'bf16'" in text
    assert "fsdp" not in text
