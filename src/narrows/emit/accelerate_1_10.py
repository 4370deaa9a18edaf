"""PyTorch's DDP and FSDP2 through Accelerate 1.10: the YAML file of `accelerate launch --config_file`."""

from narrows.emit.run import Run


def write(run: Run) -> str:
    """The text of a YAML file."""
    layout = run.layout
    for field in ("tensor", "context", "expert", "pipeline"):
        run.refuse(getattr(layout, field) > 1, field, f"Give {field}=1; it splits over replicas alone.")
    run.refuse(layout.offload != "none" and layout.offload_to != "host", "offload_to", "Use host.")
    run.refuse(layout.shard == 1, "shard", "Use 0 (DDP), 2 (FSDP, weights stay gathered) or 3.")
    run.refuse(not layout.shard and layout.recompute != "none", "recompute", "Use none, or shard=2 or 3.")
    run.refuse(not layout.shard and layout.offload != "none", "offload", "Use none, or shard=2 or 3.")
    run.refuse(layout.recompute == "selective" or bool(layout.recompute_layers), "recompute", "Use full or none.")
    run.refuse(layout.offload not in ("none", "optimizer"), "offload", "Use optimizer or none.")

    def flag(value: bool) -> str:
        return str(value).lower()

    sharding = [
        "fsdp_config:",
        "  fsdp_version: 2",
        "  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP",
        f"  fsdp_reshard_after_forward: {flag(layout.shard == 3)}",
        f"  fsdp_activation_checkpointing: {flag(layout.recompute == 'full')}",
        f"  fsdp_offload_params: {flag(layout.offload == 'optimizer')}",
        "  fsdp_state_dict_type: SHARDED_STATE_DICT",
    ]
    lines = [
        "compute_environment: LOCAL_MACHINE",
        f"distributed_type: {'FSDP' if layout.shard else 'MULTI_GPU'}",
        f"mixed_precision: '{'no' if run.dtype == 'fp32' else run.dtype}'",  # a bare no is a boolean in YAML
        f"num_machines: {run.nodes}",
        f"num_processes: {layout.devices}",
        *(sharding if layout.shard else []),
        "# per_device_train_batch_size and gradient_accumulation_steps of the trainer:",
        f"# {layout.microbatch} and {layout.accumulate}",
    ]
    return "\n".join(lines) + "\n"
