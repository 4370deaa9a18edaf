"""Megatron-LM with Megatron Core 0.14: a torchrun command for `pretrain_gpt.py` (megatron/training/arguments.py)."""

from narrows.emit.run import Run

_SHARDING = {2: "optim_grads", 3: "optim_grads_params"}


def write(run: Run) -> str:
    """A shell command; the model's own arguments and the data go where it says so."""
    layout = run.layout
    run.refuse(layout.offload != "none" and layout.offload_to != "host", "offload_to", "Use host.")
    run.refuse(layout.schedule != "1f1b", "schedule", "Use 1f1b; chunks interleave it.")
    run.refuse(layout.balance == "vocabulary", "balance", "Use layers or none.")
    run.refuse(layout.gradient_bits < 16, "gradient_bits", "Use 16 or 32.")
    run.refuse(layout.offload in ("activations", "both"), "offload", "Use optimizer or none.")
    run.refuse(layout.shard >= 2 and layout.pipeline > 1, "shard", "With stages, use 0 or 1.")
    run.refuse(layout.tensor > 1 and layout.expert > 1 and not layout.sequence, "sequence", "Experts need sequence=true.")
    flags: list[tuple[str, object]] = [
        ("tensor-model-parallel-size", layout.tensor),
        ("pipeline-model-parallel-size", layout.pipeline),
        ("micro-batch-size", layout.microbatch),
        ("global-batch-size", layout.batch),
        ("seq-length", run.sequence),
    ]
    wanted: list[tuple[object, str, object]] = [
        (layout.sequence, "sequence-parallel", None),
        (layout.context > 1, "context-parallel-size", layout.context),
        (layout.context > 1, "cp-comm-type", {"ring": "p2p", "ulysses": "a2a"}[layout.context_by]),
        (layout.expert > 1, "expert-model-parallel-size", layout.expert),
        (layout.chunks > 1, "num-virtual-stages-per-pipeline-rank", layout.chunks),
        (layout.balance == "layers", "account-for-embedding-in-pipeline-split", None),
        (layout.balance == "layers", "account-for-loss-in-pipeline-split", None),
        (layout.shard or layout.offload == "optimizer", "use-distributed-optimizer", None),
        (layout.shard >= 2, "use-megatron-fsdp", None),
        (layout.shard >= 2, "data-parallel-sharding-strategy", _SHARDING.get(layout.shard)),
        (layout.shard >= 2, "ckpt-format", "fsdp_dtensor"),
        (layout.overlap and layout.data > 1, "overlap-grad-reduce", None),
        (layout.overlap and layout.data > 1 and layout.shard, "overlap-param-gather", None),
        (layout.gradient_bits == 16 and run.dtype == "bf16", "grad-reduce-in-bf16", None),
        (layout.recompute != "none", "recompute-granularity", layout.recompute),
        (layout.recompute == "full", "recompute-method", "block" if layout.recompute_layers else "uniform"),
        (layout.recompute == "full", "recompute-num-layers", layout.recompute_layers or 1),
        (layout.offload == "optimizer", "optimizer-cpu-offload", None),
        (layout.offload == "optimizer", "use-precision-aware-optimizer", None),
        (run.dtype != "fp32", run.dtype, None),
    ]
    flags += [(name, value) for use, name, value in wanted if use]
    queues = 8 if layout.shard >= 2 else 1  # its FSDP asks for several, tensor and context parallelism before Blackwell for one
    start = f"torchrun --nnodes {run.nodes} --nproc-per-node {run.per_node} pretrain_gpt.py"
    lines = [f"CUDA_DEVICE_MAX_CONNECTIONS={queues} {start}"]
    lines += [f"  --{name}" + ("" if value is None else f" {value}") for name, value in flags]
    return " \\\n".join([*lines, '  "${MODEL_ARGS[@]}" "${DATA_ARGS[@]}"']) + "\n"
