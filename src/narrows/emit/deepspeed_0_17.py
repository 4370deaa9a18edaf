"""DeepSpeed 0.17: the JSON file that `deepspeed.initialize` reads (deepspeed.ai/docs/config-json)."""

import json
from typing import Any

from narrows.emit.run import Run


def write(run: Run) -> str:
    """The text of a JSON file."""
    layout = run.layout
    run.refuse(layout.offload != "none" and layout.offload_to != "host", "offload_to", "Use host.")
    run.refuse(layout.pipeline > 1, "pipeline", "Give the stages in code, to PipelineModule(num_stages=...).")
    run.refuse(layout.context > 1, "context", "Give context=1.")
    run.refuse(layout.expert > 1, "expert", "Give ep_size in code, to deepspeed.moe.layer.MoE.")
    run.refuse(layout.gradient_bits < 16, "gradient_bits", "Use 16 or 32.")
    run.refuse(layout.offload in ("activations", "both"), "offload", "Use optimizer or none.")
    run.refuse(layout.offload != "none" and not layout.shard, "offload", "Use none, or shard=1 to 3.")
    run.refuse(layout.tensor > 1 and layout.shard == 3, "shard", "With tensor, use 0, 1 or 2.")
    run.refuse(layout.sequence, "sequence", "Leave it out: its tensor parallelism keeps norms whole.")
    zero: dict[str, Any] = {"stage": layout.shard, "overlap_comm": layout.overlap}
    if layout.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    wire = "fp32" if layout.gradient_bits == 32 else run.dtype
    config: dict[str, Any] = {
        "train_batch_size": layout.batch,
        "train_micro_batch_size_per_gpu": layout.microbatch,
        "gradient_accumulation_steps": layout.accumulate,
        "zero_optimization": zero,
        "communication_data_type": wire,
    }
    if run.dtype in ("bf16", "fp16"):
        config[run.dtype] = {"enabled": True}
    if layout.tensor > 1:
        config["tensor_parallel"] = {"autotp_size": layout.tensor}
    if layout.recompute != "none":  # which layers is the model's own choice
        config["activation_checkpointing"] = {"partition_activations": False}
    return json.dumps(config, indent=2) + "\n"
