"""vLLM 0.19: a `vllm serve` command for each group of replicas (docs.vllm.ai: engine arguments, NixlConnector usage)."""

from narrows.emit.deployment import Deployment, command
from narrows.search.screen import OWN, Side
from narrows.simulate.fleet import UTILIZATION

_TRANSFER = """--kv-transfer-config '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}'"""


def write(deployment: Deployment) -> str:
    """A shell script: one command, or one for those that read and one for those that answer."""
    config = deployment.config
    deployment.refuse(config.engine != "vllm-v1", "engine", config.engine, "Plan with --engine vllm-v1.")
    deployment.refuse(config.precision not in (OWN, "fp8", "int8"), "weights", config.precision, "Use own, fp8 or int8.")
    deployment.refuse(config.cache not in (OWN, "fp8"), "cache", config.cache, "Use own or fp8.")
    lines = []
    if config.precision == "int8":
        lines.append("# MODEL is a checkpoint with int8 weights (W8A16, compressed-tensors): vLLM knows it by its config")
    if config.prefill is None:
        return "\n".join([*lines, _serve(deployment, config.decode)])
    for what, side in (("read prompts", config.prefill), ("answer", config.decode)):
        lines.append(f"# {side.replicas} of these, which {what}: each with its own CUDA_VISIBLE_DEVICES, --port and "
                     "VLLM_NIXL_SIDE_CHANNEL_PORT")  # fmt: skip
        lines.append(_serve(deployment, side))
    lines.append("# before them a proxy that sends a request first to one that reads, then to one that answers:")
    lines.append("# tests/v1/kv_connector/nixl_integration/toy_proxy_server.py --prefiller-hosts ... --decoder-hosts ...")
    return "\n".join(lines) + "\n"


def _serve(deployment: Deployment, side: Side) -> str:
    config = deployment.config
    together = config.prefill is None
    return command(
        f"vllm serve {deployment.model}",
        {
            "tensor-parallel-size": side.tensor,
            "data-parallel-size": side.replicas if together and side.replicas > 1 else None,
            "max-num-seqs": side.max_sequences,
            "max-num-batched-tokens": side.max_tokens,
            "gpu-memory-utilization": UTILIZATION,
            "max-model-len": deployment.context or None,
            "quantization": "fp8" if config.precision == "fp8" else None,
            "kv-cache-dtype": "fp8" if config.cache == "fp8" else None,
        },
        () if together else (_TRANSFER,),
    )
