"""What the tracer must know of models of transformers: the inputs of a step, and the operators to take whole."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from inspect import Signature, signature
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from narrows.errors import NarrowsError
from narrows.graph import Op
from narrows.step import Step

if TYPE_CHECKING:
    from narrows.capture.events import Event
    from narrows.capture.tracer import Tracer

_NAME = "narrows_capture"  # of our attention and experts in transformers' tables


def is_model(module: nn.Module) -> bool:
    """Whether transformers built the module (asks without importing it)."""
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(module, library.PreTrainedModel)


@contextmanager
def taken_whole(module: nn.Module, tracer: "Tracer", step: Step) -> Iterator[None]:
    """Let transformers' models hand attention, experts, scans and caches to the tracer as long as the context lasts."""
    models = [m for m in module.modules() if is_model(m)]
    if not models:
        yield
        return
    from transformers import cache_utils, masking_utils, modeling_utils
    from transformers.integrations import moe

    with ExitStack() as stack:
        sources = {sys.modules[type(m).__module__] for m in module.modules()}
        # a model that does not look its attention up in the table calls PyTorch's own, if asked for by this name
        implementation = _NAME if any(hasattr(s, "ALL_ATTENTION_FUNCTIONS") for s in sources) else "sdpa"
        chosen = {"_attn_implementation_internal": implementation, "_experts_implementation_internal": _NAME}
        held = [m.config for m in module.modules() if hasattr(getattr(m, "config", None), "_attn_implementation_internal")]
        patches: list[Any] = [patch.dict(vars(config), chosen) for config in {id(c): c for c in held}.values()]
        patches.append(patch.dict(modeling_utils.AttentionInterface._global_mapping, {_NAME: partial(_attend, tracer)}))
        patches.append(patch.dict(moe.ExpertsInterface._global_mapping, {_NAME: partial(_choose_experts, tracer)}))
        # no mask is made for an implementation that is not listed here: who sees whom, attention is told itself
        patches.append(patch.dict(masking_utils.AttentionMaskInterface._global_mapping, clear=True))
        for cache in (cache_utils.Cache, cache_utils.EncoderDecoderCache):
            for method in ("update", "update_conv_state", "update_recurrent_state"):
                if method in vars(cache):
                    quiet = tracer.unseen if method == "update" else partial(_remember, tracer)
                    patches.append(patch.object(cache, method, quiet(vars(cache)[method])))
        for source in sources:
            for ending, stand_in in _KERNELS.items():
                for name in [n for n in vars(source) if n.endswith(ending)]:
                    patches.append(patch.object(source, name, partial(stand_in, tracer, signature(getattr(source, name)))))
        for change in patches:
            stack.enter_context(change)
        if step.phase in ("prefill", "decode") and is_model(module):
            _keep_last(module, stack)
        yield


def _remember(tracer: "Tracer", update: Callable[..., Any]) -> Callable[..., Any]:
    """A cache's update of a state that convolutions and scans carry themselves: it gives back what it was given."""

    def run(cache: Any, state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with tracer.paused():
            update(cache, state, *args, **kwargs)
        return state

    return run


def _keep_last(model: Any, stack: ExitStack) -> None:
    """Let a model without `logits_to_keep` make the logits of the last token alone, as it does when it generates."""
    keeps = "logits_to_keep" in signature(model.forward).parameters
    last = model.get_output_embeddings() if model.can_generate() and not keeps else None
    if last is not None:
        handle = last.register_forward_pre_hook(lambda _, args: (args[0][:, -1:], *args[1:]))
        stack.callback(handle.remove)


def whole_attention(module: nn.Module, tracer: "Tracer", step: Step) -> Callable[["Event", "Event"], "Event"] | None:
    """How to take attention whole in those models of transformers that still write it out; None for other modules."""
    if not is_model(module):
        return None
    batch, causal = int(step.batch[0]), module.can_generate()

    def join(scores: "Event", values: "Event") -> "Event":
        tracer.causal |= causal
        heads = scores.dims["matrices"] // batch
        new, keys = scores.dims["rows"] // scores.dims["matrices"], scores.dims["outputs"]
        pairs = Step(1, new, max(keys - new, 0))["pairs" if causal else "pairs[full]"]
        dims = {"heads": heads, "kv_heads": heads, "head_dim": scores.dims["inputs"], "value_dim": values.dims["outputs"],
                "queries": batch * new, "pairs": batch * pairs, "context": batch * keys,
                "held": batch * keys * tracer.caching}  # fmt: skip
        sources = list(dict.fromkeys(scores.sources + values.sources))
        return replace(values, kind="attention", label="attention", dims=dims, reads=scores.reads + values.reads,
                       sources=sources, cache=values.act if tracer.caching else None)  # fmt: skip

    return join


def _attend(
    tracer: "Tracer", module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    is_causal: bool | None = None, sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers calls it: query [B, H, T, d], key and value [B, K, S, d] -> ([B, T, H, e], weights)."""
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and attention_mask is None
    cached = tracer.caching and (causal or getattr(module, "is_decoder", False))
    out = tracer.attend(query, key, value, causal, sliding_window, cached, getattr(module, "layer_idx", None) if causal else None)
    return out.transpose(1, 2), None


def _choose_experts(tracer: "Tracer", module: Any, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """A layer of experts on hidden [R, D], of which each row takes those in chosen [R, k] with shares [R, k]."""
    rows, top_k = chosen.shape

    def apply(name: str, x: Tensor) -> Tensor:
        weight, bias = getattr(module, name), getattr(module, f"{name}_bias", None) if module.has_bias else None
        inputs, outputs = weight.shape[1:] if module.is_transposed else weight.shape[:0:-1]
        dims = {"rows": rows, "experts": weight.shape[0], "top_k": top_k, "inputs": inputs, "outputs": outputs,
                "bias": int(bias is not None)}  # fmt: skip
        given = [x, weight] if bias is None else [x, weight, bias]
        return tracer.stand_in(x.new_empty(rows * top_k, outputs), given, "expert", dims)

    wide = apply("gate_up_proj" if module.has_gate else "up_proj", hidden)
    out = apply("down_proj", module._apply_gate(wide) if module.has_gate else module.act_fn(wide))
    return (out.view(rows, top_k, -1) * shares.to(out.dtype)[..., None]).sum(1)


def _convolve(tracer: "Tracer", of: Signature, *args: Any, **kwargs: Any) -> Tensor:
    """A causal convolution over the last positions, each channel on its own: x [B, C, T], weight [C, k] -> [B, C, T]."""
    given = _bound(of, args, kwargs)
    x, weight, bias = given["hidden_states"], given["weight"], given.get("bias")
    (batch, channels, tokens), kernel = x.shape, weight.shape[-1]
    dims = {"positions": batch * tokens, "in_positions": batch * tokens, "in_channels": channels, "out_channels": channels,
            "kernel": kernel, "groups": channels, "bias": int(bias is not None)}  # fmt: skip
    out = tracer.stand_in(x, [t for t in (x, weight, bias) if t is not None], "conv", dims)
    return out if given.get("activation") is None else nn.functional.silu(out)


def _scan(tracer: "Tracer", of: Signature, *args: Any, **kwargs: Any) -> Any:
    """A selective scan, or one step of it: x [B, C, T], [B, T, H, P] or of one token -> the same, and the last state."""
    given = _bound(of, args, kwargs)
    x, gate = given["hidden_states"], given.get("z")
    second = "chunk_size" in given or (x.dim() == 3 and "state" in given)  # Mamba-2 has heads
    state = given["B"].shape[-1 if "state" in given or second else -2]
    last = bool(given.get("return_last_state") or given.get("return_final_states"))
    if "state" in given:
        channels, final = x[0].numel(), None
    elif second:
        channels, final = x.shape[2] * x.shape[3], x.new_empty(x.shape[0], *x.shape[2:], state)
    else:
        channels, final = x.shape[1], x.new_empty(*x.shape[:2], state)
    dims = {"rows": x.numel() // channels, "channels": channels, "state": state, "flop_per_state": 6 if second else 8,
            "held": x.shape[0] if last or "state" in given else 0}  # fmt: skip
    apart = ("z", "state", "initial_states")  # the gate follows; the state is the op's own
    out = tracer.stand_in(x, [t for n, t in given.items() if isinstance(t, Tensor) and n not in apart], "scan", dims)
    out = out if gate is None else out * nn.functional.silu(gate)
    return (out, final) if last else out


def _bound(of: Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by name, those that the function does not have left out."""
    known = {k: v for k, v in kwargs.items() if k in of.parameters}
    given = of.bind(*args, **known).arguments
    first = next(iter(of.parameters))
    return {("hidden_states" if k == first and k != "state" else k): v for k, v in given.items()}


_KERNELS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolve, "causal_conv1d_update": _convolve,
    "selective_scan": _scan, "chunk_scan": _scan, "selective_state_update": _scan,
}  # fmt: skip


def split_of(module: Any) -> Callable[[Op], str]:
    """How tensor parallelism cuts an op of a model, by the plan that transformers states for it; '' without a plan."""
    styles = {"colwise": "column", "packed_colwise": "column", "rowwise": "row", "colwise_gather_output": "vocabulary"}
    plan = {name: styles.get(style, "") for name, style in (getattr(module, "tp_plan", None) or {}).items()}
    cut = "row" in plan.values()  # not the last layer alone
    by_kind = {"attention": "heads", "embedding": "vocabulary", "expert": "experts"} if cut else {}
    return lambda op: by_kind.get(op.kind) or (plan.get(op.name, "") if op.kind == "linear" else "")


def arguments(model: Any, step: Step, tracer: "Tracer") -> dict[str, Any]:
    """The keyword arguments of one step of a transformers model; runs the model once to fill a cache.

    Raises NarrowsError where the model wants an input that is not known here.
    """
    batch, new, past, source = (int(getattr(step, f)[0]) for f in ("batch", "new", "past", "source"))
    known, config = signature(model.forward).parameters, model.config
    tracer.caching = step.phase in ("prefill", "decode") and model.can_generate()
    given: dict[str, Any] = {}
    if "use_cache" in known or model.can_generate():
        given["use_cache"] = tracer.caching
    if "pixel_values" in known and not ("input_ids" in known and model.can_generate()):  # such a one reads text here
        given["pixel_values"] = _pixels(config, batch, model.dtype)
    if "input_features" in known:
        given["input_features"] = torch.empty(batch, config.num_mel_bins, 2 * config.max_source_positions, dtype=model.dtype)
    ids = "input_ids"
    if config.is_encoder_decoder:
        ids = "decoder_input_ids"
        if "input_ids" in known:
            given["input_ids"] = _ids(batch, source)
    if ids in known:
        given[ids] = _ids(batch, new)
    if not given.keys() - {"use_cache"}:
        remedy = f"Give some of {', '.join(known)} as `inputs`."
        raise NarrowsError(f"the inputs of {type(model).__name__} are not known.", remedy=remedy)
    last = {"logits_to_keep": 1} if tracer.caching and "logits_to_keep" in known else {}
    if not (tracer.caching and past):
        return {**given, **last}
    before = model(**{**given, ids: _ids(batch, past)}, **last)
    field = "cache_params" if "cache_params" in known else "past_key_values"
    given[field] = before[field]
    if config.is_encoder_decoder:
        for name in ("input_ids", "input_features"):
            given.pop(name, None)
        given["encoder_outputs"] = (before["encoder_last_hidden_state"],)
    return {**given, **last}


def _ids(batch: int, tokens: int) -> Tensor:
    if tokens < 1:
        raise NarrowsError("the encoder has no tokens.", where="step.source", remedy="Give the step its source length.")
    return torch.zeros(batch, tokens, dtype=torch.long)


def _pixels(config: Any, batch: int, dtype: torch.dtype) -> Tensor:
    """Images [B, C, H, W] of the size that a config states, else of 224 px."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.empty(batch, getattr(vision, "num_channels", 3), height, width, dtype=dtype)


def trim_held(tracer: "Tracer", outputs: Any) -> None:
    """Set what attention keeps to what the cache holds when the step is over: hooks throw some away, hide some, or code it."""
    from transformers.cache_utils import DynamicLayer

    cache = getattr(outputs, "past_key_values", None)
    cache = getattr(cache, "self_attention_cache", cache)
    if cache is None:
        return
    for event in tracer.events:
        layer = cache.layers[event.layer] if event.layer is not None and event.layer < len(cache.layers) else None
        if layer is not None and not layer.is_sliding and isinstance(getattr(layer, "keys", None), Tensor):
            held = layer.keys.shape[0] * layer.keys.shape[-2]
            event.dims["held"] = held if isinstance(layer, DynamicLayer) else min(event.dims["held"], held)
            event.cache = getattr(layer, "stored", event.cache)
