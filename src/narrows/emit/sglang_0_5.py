"""SGLang 0.5: a `launch_server` command for each group of replicas (docs.sglang.io: server arguments, PD disaggregation)."""

import shlex

from narrows.emit.deployment import Deployment, command
from narrows.search.deployments import Side

# Found among the fields of ServerArgs of 0.5.23 (python/sglang/srt/arg_groups/fields), and of sglang-router 0.3.2; a test
# lets no other flag out.
FLAGS = frozenset({"model-path", "tp-size", "pp-size", "dp-size", "attn-dp-size", "ep-size", "max-running-requests",
                   "chunked-prefill-size", "context-length", "quantization", "kv-cache-dtype", "disaggregation-mode",
                   "disaggregation-transfer-backend", "speculative-algorithm", "speculative-draft-model-path",
                   "speculative-num-steps", "speculative-eagle-topk", "speculative-num-draft-tokens",
                   "pd-disaggregation", "prefill", "decode"})  # fmt: skip


def write(deployment: Deployment) -> str:
    """A shell script: one command, or one for those that read, one for those that answer, and the router before them."""
    config = deployment.config
    lines = deployment.notes("sglang")
    deployment.refuse(config.speculation is not None and config.decode.experts > 1, "speculation", config.speculation,
                      "Speculate with tensor parallelism alone.")  # fmt: skip
    if config.prefill is None:
        if config.decode.experts > 1 and config.decode.replicas > 1:
            lines.append(f"# {config.decode.replicas} of these, each with its own CUDA_VISIBLE_DEVICES and --port")
        return "\n".join([*lines, _serve(deployment, config.decode, "")])
    for mode, side in (("prefill", config.prefill), ("decode", config.decode)):
        lines.append(f"# {side.replicas} of these, each with its own CUDA_VISIBLE_DEVICES and --port")
        lines.append(_serve(deployment, side, mode))
    urls = ("--prefill http://HOST:PORT",) * config.prefill.replicas + ("--decode http://HOST:PORT",) * config.decode.replicas
    lines.append(command("python -m sglang_router.launch_router --pd-disaggregation", {}, urls))
    return "\n".join(lines)


def _serve(deployment: Deployment, side: Side, mode: str) -> str:
    config = deployment.config
    proposed = config.speculation if side is config.decode else None
    draft = proposed.draft if proposed else None
    replicas = side.replicas if not mode and side.experts == 1 else 1
    spread = side.experts if side.experts > 1 else None
    return command(
        f"python -m sglang.launch_server --model-path {deployment.model}",
        {
            "tp-size": side.tensor * side.experts,
            "pp-size": side.pipeline if side.pipeline > 1 else None,
            "dp-size": replicas if replicas > 1 else None,
            "attn-dp-size": spread,
            "ep-size": spread,
            "max-running-requests": side.max_sequences * side.batches,  # of all ranks and stages
            "chunked-prefill-size": side.max_tokens * side.experts,  # of all ranks
            "context-length": deployment.context or None,
            "quantization": "fp8" if config.precision == "fp8" else None,
            "kv-cache-dtype": "fp8_e4m3" if config.cache == "fp8" else None,
            "speculative-algorithm": ("STANDALONE" if draft else "NGRAM") if proposed else None,
            "speculative-draft-model-path": shlex.quote(draft.name) if draft else None,
            "speculative-num-steps": proposed.ahead if proposed and draft else None,
            "speculative-eagle-topk": 1 if draft else None,
            "speculative-num-draft-tokens": proposed.ahead + 1 if proposed else None,
            "disaggregation-mode": mode or None,
            "disaggregation-transfer-backend": "nixl" if mode else None,
        },
    )
