"""torchtitan 0.2: the sections of its TOML file that a layout decides (torchtitan/config/job_config.py)."""

from typing import Any

from narrows.emit.run import Run

_SCHEDULES = {"1f1b": "1F1B", "gpipe": "GPipe", "zb-v": "ZBVZeroBubble"}


def write(run: Run) -> str:
    """The text of a TOML file."""
    layout, staged = run.layout, run.layout.pipeline > 1
    run.refuse(layout.offload != "none" and layout.offload_to != "host", "offload_to", "Use host.")
    run.refuse(layout.shard == 1, "shard", "Use 0, 2 (weights stay gathered) or 3.")
    inner = layout.devices // layout.data > 1 or layout.expert > 1
    run.refuse(not layout.shard and layout.data > 1 and inner, "shard", "Use 2 or 3: its DDP goes with no other dimension.")
    run.refuse(not layout.shard and layout.context > 1, "shard", "Use 2 or 3: it shards over context ranks.")
    run.refuse(layout.recompute == "selective", "recompute", "Use none or full: its selective mode keeps other results.")
    run.refuse(layout.tensor > 1 and not layout.sequence, "sequence", "Use sequence=true: it always splits norms.")
    run.refuse(layout.context_by == "ulysses" and layout.context > 1, "context_by", "Use ring.")
    run.refuse(layout.schedule not in _SCHEDULES, "schedule", f"Use {', '.join(_SCHEDULES)}.")
    run.refuse(layout.balance == "vocabulary", "balance", "Use layers or none.")
    run.refuse(bool(layout.recompute_layers), "recompute_layers", "Use 0: all layers of a stage.")
    run.refuse(layout.offload not in ("none", "optimizer"), "offload", "Use optimizer or none.")
    run.refuse(layout.offload != "none" and not layout.shard, "offload", "Use none, or shard=2 or 3.")
    run.refuse(layout.gradient_bits < 16, "gradient_bits", "Use 16 or 32.")
    parallel: dict[str, Any] = {
        "data_parallel_replicate_degree": 1 if layout.shard else layout.data,
        "data_parallel_shard_degree": layout.data if layout.shard else 1,
        "tensor_parallel_degree": layout.tensor,
        "context_parallel_degree": layout.context,
        "expert_parallel_degree": layout.expert,
        "pipeline_parallel_degree": layout.pipeline,
    }
    if layout.shard:
        parallel["fsdp_reshard_after_forward"] = "always" if layout.shard == 3 else "never"
    if layout.context > 1:
        parallel["context_parallel_rotate_method"] = "alltoall"
    if staged:
        parts, less = 2 if layout.schedule == "zb-v" else layout.chunks, int(layout.balance == "layers")
        parallel |= {
            "pipeline_parallel_schedule": "Interleaved1F1B" if layout.chunks > 1 else _SCHEDULES[layout.schedule],
            "pipeline_parallel_microbatch_size": layout.microbatch,
            "pipeline_parallel_layers_per_stage": (run.layers + 2 * less) // (layout.pipeline * parts),
            "pipeline_parallel_first_stage_less_layers": less,
            "pipeline_parallel_last_stage_less_layers": less,
        }
    training = {
        "local_batch_size": layout.microbatch * (layout.accumulate if staged else 1),
        "global_batch_size": layout.batch,
        "seq_len": run.sequence,
        "mixed_precision_param": "float32" if run.dtype == "fp32" else "bfloat16",
        "mixed_precision_reduce": "float32" if layout.gradient_bits == 32 else "bfloat16",
        "enable_cpu_offload": layout.offload == "optimizer",
    }
    sections = {"parallelism": parallel, "training": training, "activation_checkpoint": {"mode": layout.recompute}}
    head = f"# torchrun --nnodes {run.nodes} --nproc-per-node {run.per_node} -m torchtitan.train --job.config_file <this file>"
    return "\n".join([head, *(_section(name, values) for name, values in sections.items())])


def _section(name: str, values: dict[str, Any]) -> str:
    def plain(value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)

    return "\n".join([f"\n[{name}]", *(f"{key} = {plain(value)}" for key, value in values.items()), ""])
