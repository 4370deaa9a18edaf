"""vLLM 0.19: a `vllm serve` command for each group of replicas (docs.vllm.ai: engine arguments, NixlConnector usage)."""

import json
import shlex

from narrows.emit.deployment import Deployment, command
from narrows.search.deployments import Side
from narrows.simulate.fleet import UTILIZATION

# Found in vllm/engine/arg_utils.py of 0.19.1 and of 0.33.0; a test lets no other flag out.
FLAGS = frozenset({"tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size", "enable-expert-parallel",
                   "max-num-seqs", "max-num-batched-tokens", "gpu-memory-utilization", "max-model-len", "quantization",
                   "kv-cache-dtype", "kv-transfer-config", "speculative-config"})  # fmt: skip
LOOKUP = 5  # tokens that must repeat for `ngram` to propose what followed: vLLM's own default


def write(deployment: Deployment) -> str:
    """A shell script: one command, or one for those that read and one for those that answer."""
    config = deployment.config
    lines = deployment.notes("vllm-v1")
    if config.prefill is None:
        side = config.decode
        if side.experts > 1 and side.replicas > 1:
            lines.append(f"# {side.replicas} of these, each with its own CUDA_VISIBLE_DEVICES and --port")
        return "\n".join([*lines, _serve(deployment, side)])
    for what, side in (("read prompts", config.prefill), ("answer", config.decode)):
        lines.append(f"# {side.replicas} of these, which {what}: each with its own CUDA_VISIBLE_DEVICES, --port and "
                     "VLLM_NIXL_SIDE_CHANNEL_PORT")  # fmt: skip
        lines.append(_serve(deployment, side))
    lines.append("# before them a proxy that sends a request first to one that reads, then to one that answers:")
    lines.append("# tests/v1/kv_connector/nixl_integration/toy_proxy_server.py --prefiller-hosts ... --decoder-hosts ...")
    return "\n".join(lines) + "\n"


def _serve(deployment: Deployment, side: Side) -> str:
    config = deployment.config
    apart, proposed = config.prefill is not None, config.speculation if side is config.decode else None
    alone = apart or side.experts > 1  # vLLM spreads experts over all data-parallel ranks: a command is then one replica
    ranks = side.experts if alone else side.replicas
    draft: dict[str, object] = {}
    if proposed:
        draft = {"method": "draft_model", "model": proposed.draft.name} if proposed.draft else {
            "method": "ngram", "prompt_lookup_max": LOOKUP}  # fmt: skip
    return command(
        f"vllm serve {deployment.model}",
        {
            "tensor-parallel-size": side.tensor,
            "pipeline-parallel-size": side.pipeline if side.pipeline > 1 else None,
            "data-parallel-size": ranks if ranks > 1 else None,
            "enable-expert-parallel": side.experts > 1 or None,
            "max-num-seqs": side.max_sequences * side.pipeline,
            "max-num-batched-tokens": side.max_tokens,
            "gpu-memory-utilization": UTILIZATION,
            "max-model-len": deployment.context or None,
            "quantization": "fp8" if config.precision == "fp8" else None,
            "kv-cache-dtype": "fp8" if config.cache == "fp8" else None,
            "speculative-config": _json({**draft, "num_speculative_tokens": proposed.ahead}) if proposed else None,
            "kv-transfer-config": _json({"kv_connector": "NixlConnector", "kv_role": "kv_both"}) if apart else None,
        },
    )


def _json(value: dict[str, object]) -> str:
    return shlex.quote(json.dumps(value))
