"""SGLang 0.5: a `launch_server` command for each group of replicas (docs.sglang.io: server arguments, PD disaggregation)."""

from narrows.emit.deployment import Deployment, command
from narrows.search.screen import OWN, Side


def write(deployment: Deployment) -> str:
    """A shell script: one command, or one for those that read, one for those that answer, and the router before them."""
    config = deployment.config
    deployment.refuse(config.engine != "sglang", "engine", config.engine, "Plan with --engine sglang.")
    deployment.refuse(config.precision not in (OWN, "fp8", "int8"), "weights", config.precision, "Use own, fp8 or int8.")
    deployment.refuse(config.cache not in (OWN, "fp8"), "cache", config.cache, "Use own or fp8.")
    lines = []
    if config.precision == "int8":
        lines.append("# MODEL is a checkpoint with int8 weights (W8A16, compressed-tensors): SGLang knows it by its config")
    if config.prefill is None:
        return "\n".join([*lines, _serve(deployment, config.decode, "")])
    for mode, side in (("prefill", config.prefill), ("decode", config.decode)):
        lines.append(f"# {side.replicas} of these, each with its own CUDA_VISIBLE_DEVICES and --port")
        lines.append(_serve(deployment, side, mode))
    urls = ("--prefill http://HOST:PORT",) * config.prefill.replicas + ("--decode http://HOST:PORT",) * config.decode.replicas
    lines.append(command("python -m sglang_router.launch_router --pd-disaggregation", {}, urls))
    return "\n".join(lines)


def _serve(deployment: Deployment, side: Side, mode: str) -> str:
    config = deployment.config
    return command(
        f"python -m sglang.launch_server --model-path {deployment.model}",
        {
            "tp-size": side.tensor,
            "dp-size": side.replicas if not mode and side.replicas > 1 else None,
            "max-running-requests": side.max_sequences,
            "chunked-prefill-size": side.max_tokens,
            "context-length": deployment.context or None,
            "quantization": "fp8" if config.precision == "fp8" else None,
            "kv-cache-dtype": "fp8_e4m3" if config.cache == "fp8" else None,
            "disaggregation-mode": mode or None,
            "disaggregation-transfer-backend": "nixl" if mode else None,
        },
    )
