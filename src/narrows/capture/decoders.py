"""Decoder-only transformers: each family is what its config says, put into the blocks that all of them share."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from narrows.capture.blocks import (
    ACTIVATIONS,
    MLP,
    Attention,
    Block,
    Branch,
    Experts,
    LatentAttention,
    Norm,
    Part,
    Path,
    Reach,
    Stack,
    Work,
    block,
    layer_norm,
)
from narrows.capture.fields import Fields
from narrows.capture.tape import OUTPUTS
from narrows.capture.towers import Dense, Embedding, Network, Tower

CAUSAL = "Causal attention is counted as executed: only the query-key pairs under the mask, about half of T x T."
LATENT = "Latent attention is counted as served: expanded in prefill, absorbed (queries moved into the latent space) in decode."
HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForSequenceClassification", "Model")

GATED = Work(9, 7)  # of gpt-oss: clamp both halves, sigmoid, add one
CAP = Work(6, 3)  # divide, tanh, multiply

Kinds = list[int | None]  # per layer, how far its attention looks back


def base(f: Fields, name: str) -> str:
    """The path of the base model: none where the architecture is the bare `...Model`."""
    return "" if head(f, HEADS) == "Model" else f"{name}."


def head(f: Fields, known: tuple[str, ...]) -> str:
    """Which of the `known` endings the architecture has; the first where the config names none."""
    named = f.words("architectures")
    if not named:
        return known[0]
    for ending in sorted(known, key=len, reverse=True):
        if named[0].endswith(ending):
            return ending
    raise f.wrong(
        "architectures", f"{named[0]!r} has a head that is not known here.", f"Use one of: {', '.join('...' + k for k in known)}."
    )


def labels(f: Fields) -> int:
    """Number of classes of a classification head."""
    return len(f.within("id2label").values) if f.has("id2label") and not f.has("num_labels") else f.size("num_labels", default=2)


def heads(f: Fields, width: int) -> tuple[int, int, int]:
    """Query heads, key-value heads and the size of a head."""
    many = f.size("num_attention_heads", "n_head")
    few = f.size("num_key_value_heads", default=many)
    f.divides(few, many, "num_key_value_heads", "num_attention_heads")
    return many, few, f.maybe("head_dim") or f.divides(many, width, "num_attention_heads", "hidden_size")


def look_back(f: Fields, layers: int, window: int | None, sliding: Callable[[int], bool]) -> Kinds:
    """Per layer the sliding window or None: by `layer_types` where the config lists them, else by the family's pattern."""
    types = f.words("layer_types")
    if not types:
        return [window if sliding(i) else None for i in range(layers)]
    if len(types) != layers:
        raise f.wrong("layer_types", f"{len(types)} types for {layers} layers.", "Give one for each layer.")
    for name in set(types) - {"sliding_attention", "full_attention"}:
        raise f.wrong("layer_types", f"{name!r} is not known here.", "Use sliding_attention or full_attention.")
    return [window if t == "sliding_attention" else None for t in types]


def window(f: Fields, default: int | None = None) -> int | None:
    """The sliding window; `null` means none, an absent field the family's default."""
    return f.maybe("sliding_window") if "sliding_window" in f.values else default


def decoder(
    f: Fields,
    path: str,
    width: int,
    layers: list[Block],
    *,
    norm: Norm | None = None,
    embedding: Embedding | None = None,
    tied: bool = False,
    cap: bool = False,
    before: tuple[Part, ...] = (),
    after: tuple[Part, ...] = (),
    stack: str = "layers",
    lm_head: str = "lm_head",
    narrow: int = 0,
    notes: tuple[str, ...] = (CAUSAL,),
) -> Network:
    """Embedding, layers, last norm, and the head that the architecture names."""
    vocabulary = f.size("vocab_size")
    embedding = embedding or Embedding(((f"{path}embed_tokens", vocabulary),))
    parts: list[Part] = [embedding, *before, Stack(f"{path}{stack}", tuple(layers))]
    if norm:
        parts.append(norm)
    parts.extend(after)
    kind = head(f, HEADS)
    if kind == "ForSequenceClassification":
        parts.append(Dense("score", width, labels(f)))
    elif kind != "Model":
        owner = embedding.tables[0][0] if f.flag("tie_word_embeddings", default=tied) else ""
        parts.append(
            Dense(lm_head, narrow or width, vocabulary, rows=OUTPUTS, tied=owner, split="vocabulary", act=CAP if cap else None)
        )
    return Network((Tower(width, tuple(parts)),), notes)


def attention(f: Fields, width: int, **rest: Any) -> Attention:
    """The attention of a family of the llama kind; `rest` are the fields in which it differs."""
    many, few, size = heads(f, width)
    bias = rest.pop("biased", False)
    part = f.values.get("rope_parameters")
    nested = part.get("partial_rotary_factor") if isinstance(part, dict) else None
    share = f.number("partial_rotary_factor", "rotary_pct", default=rest.pop("share", 1.0 if nested is None else nested))
    return Attention(
        "self_attn",
        many,
        few,
        size,
        **{"reach": Reach.causal(), "bias": (bias,) * 3, "out_bias": bias, "rotary": round(size * min(max(share, 0), 1)), **rest},
    )


def _standard(
    f: Fields,
    *,
    windows: Callable[[int], Kinds] | None = None,
    feed: Callable[[int], Part] | None = None,
    tied: bool = False,
    path: str = "model",
    **differs: Any,
) -> Network:
    """Pre-norm blocks of attention and a gated MLP (or whatever `feed` puts into layer i), as llama has them."""
    width, count = f.size("hidden_size"), f.layers("num_hidden_layers")
    attn = attention(f, width, **differs)
    mlp = feed or _always(MLP("mlp", f.size("intermediate_size"), bias=f.flag("mlp_bias", default=False), work=work(f)))
    reaches = windows(count) if windows else [None] * count
    layers = [
        block((Norm("input_layernorm"), replace(attn, reach=Reach.causal(reach))), (Norm("post_attention_layernorm"), mlp(i)))
        for i, reach in enumerate(reaches)
    ]
    path = base(f, path)
    return decoder(f, path, width, layers, norm=Norm(f"{path}norm"), tied=tied)


def work(f: Fields, *names: str, default: str = "silu") -> Work:
    """What the activation function of the MLPs costs."""
    return f.choice(ACTIVATIONS, *(names or ("hidden_act",)), default=default)


def _always(part: Part) -> Callable[[int], Part]:
    return lambda _: part


def _llama(f: Fields) -> Network:
    return _standard(f, biased=f.flag("attention_bias", default=False))


def _mistral(f: Fields) -> Network:
    return _standard(f, windows=lambda n: [window(f, 4096)] * n)


def _qwen_windows(f: Fields) -> Callable[[int], Kinds]:
    reach = window(f, 4096) if f.flag("use_sliding_window", default=False) else None
    first = f.size("max_window_layers", default=28, least=0)
    return lambda n: look_back(f, n, reach, lambda i: i >= first)


def _qwen2(f: Fields) -> Network:
    return _standard(f, windows=_qwen_windows(f), bias=(True, True, True))


def _qwen3(f: Fields) -> Network:
    biased = f.flag("attention_bias", default=False)
    return _standard(f, windows=_qwen_windows(f), biased=biased, norms=("q_norm", "k_norm"))


def _gemma(f: Fields, outer: Fields | None = None, *, every: int, norms: tuple[str, str] | None = None) -> Network:
    """Norms before and after each part; every `every`-th layer sees all tokens, the others a window."""
    width, count = f.size("hidden_size"), f.layers("num_hidden_layers")
    attn = attention(f, width, biased=f.flag("attention_bias", default=False), norms=norms)
    mlp = MLP("mlp", f.size("intermediate_size"), work=work(f, "hidden_activation", default="gelu_pytorch_tanh"))
    reaches = look_back(f, count, window(f, 4096), lambda i: (i + 1) % every != 0)
    layers = [
        block(
            (Norm("input_layernorm"), replace(attn, reach=Reach.causal(r))),
            (Norm("pre_feedforward_layernorm"), mlp),
            post=(Norm("post_attention_layernorm"), Norm("post_feedforward_layernorm")),
        )
        for r in reaches
    ]
    path = base(outer or f, "model") + ("language_model." if outer else "")
    embedding = Embedding(((f"{path}embed_tokens", f.size("vocab_size")),), scaled=True)
    cap = f.has("final_logit_softcapping") and f.number("final_logit_softcapping") > 0
    return decoder(f, path, width, layers, norm=Norm(f"{path}norm"), embedding=embedding, tied=True, cap=cap)


def _gemma2(f: Fields) -> Network:
    return _gemma(f, every=2)


GEMMA3 = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
}  # published configs leave out what equals these


def _gemma3_text(f: Fields, outer: Fields | None = None) -> Network:
    given = {k: v for k, v in f.values.items() if v is not None or k not in GEMMA3}
    f = Fields({**GEMMA3, **given}, f.where)
    return _gemma(
        f, outer, every=f.size("sliding_window_pattern", "_sliding_window_pattern", default=6), norms=("q_norm", "k_norm")
    )


def _gemma3(f: Fields) -> Network:
    network = _gemma3_text(f.within("text_config"), f)
    return replace(network, notes=(*network.notes, "The text model of a vision-language model: its vision tower is left out."))


def _phi3(f: Fields) -> Network:
    mlp = MLP("mlp", f.size("intermediate_size"), ("gate_up_proj",), act="activation_fn", work=work(f))
    return _standard(f, windows=lambda n: [window(f)] * n, inner=("qkv_proj",), bias=(False,), feed=_always(mlp))


def _plain(hidden: int, inner: str, down: str, *, name: str = "mlp", bias: bool = True, act: str = "act", work: Work) -> MLP:
    return MLP(name, hidden, (inner,), down, gated=False, bias=bias, act=act, work=work)


def _gpt2(f: Fields) -> Network:
    width, path = f.size("n_embd", "hidden_size"), base(f, "transformer")
    many = f.size("n_head", "num_attention_heads")
    size = f.divides(many, width, "n_head", "n_embd")
    attn = Attention("attn", many, many, size, Reach.causal(), ("c_attn",), "c_proj", (True,), True)
    mlp = _plain(f.maybe("n_inner") or 4 * width, "c_fc", "c_proj", work=work(f, "activation_function", default="gelu_new"))
    layers = [block((layer_norm("ln_1"), attn), (layer_norm("ln_2"), mlp))] * f.layers("n_layer", "num_hidden_layers")
    embedding = Embedding(
        ((f"{path}wte", f.size("vocab_size")), (f"{path}wpe", f.size("n_positions", "max_position_embeddings", default=1024)))
    )
    return decoder(f, path, width, layers, norm=layer_norm(f"{path}ln_f"), embedding=embedding, tied=True, stack="h")


def _gpt_neox(f: Fields) -> Network:
    width, path = f.size("hidden_size"), base(f, "gpt_neox")
    bias = f.flag("attention_bias", default=True)
    attn = attention(f, width, share=0.25, inner=("query_key_value",), bias=(bias,), out_bias=bias, output="dense")
    attn = replace(attn, name="attention")
    mlp = _plain(f.size("intermediate_size"), "dense_h_to_4h", "dense_4h_to_h", work=work(f, default="gelu"))
    first, second = (layer_norm("input_layernorm"), attn), (layer_norm("post_attention_layernorm"), mlp)
    layer = block(first, second)
    if f.flag("use_parallel_residual", default=True):
        layer = Block((Branch(tuple(Path(norm, (part,)) for norm, part in (first, second))),))
    embedding = Embedding(((f"{path}embed_in", f.size("vocab_size")),))
    return decoder(
        f, path, width, [layer] * f.layers("num_hidden_layers"), norm=layer_norm(f"{path}final_layer_norm"), embedding=embedding
    )


def _opt(f: Fields) -> Network:
    width, path = f.size("hidden_size"), base(f, "model") + "decoder."
    bias, first = f.flag("enable_bias", default=True), f.flag("do_layer_norm_before", default=True)
    affine = f.flag("layer_norm_elementwise_affine", default=True)
    attn = attention(f, width, biased=bias, output="out_proj", rotary=0)
    mlp = _plain(
        f.size("ffn_dim"),
        "fc1",
        "fc2",
        name="",
        bias=bias,
        act="activation_fn",
        work=work(f, "activation_function", default="relu"),
    )
    parts: list[tuple[Norm, Part]] = [
        (layer_norm("self_attn_layer_norm", affine=affine), attn),
        (layer_norm("final_layer_norm", affine=affine), mlp),
    ]
    layer = block(*parts) if first else Block(tuple(Branch((Path(None, (part,)),), norm) for norm, part in parts))
    # two rows of the position table are never used
    tables = (
        (f"{path}embed_tokens", f.size("vocab_size")),
        (f"{path}embed_positions", f.size("max_position_embeddings", default=2048) + 2),
    )
    narrow = f.size("word_embed_proj_dim", default=width)
    embedding = Embedding(tables)
    before: tuple[Part, ...] = ()
    after: tuple[Part, ...] = ()
    if narrow != width:
        embedding = Embedding(tables[:1], narrow)
        before = (Dense(f"{path}project_in", narrow, width), Embedding(tables[1:]))
        after = (Dense(f"{path}project_out", width, narrow),)
    last = (
        layer_norm(f"{path}final_layer_norm", affine=affine)
        if first and not f.flag("_remove_final_layer_norm", default=False)
        else None
    )
    return decoder(
        f,
        path,
        width,
        [layer] * f.layers("num_hidden_layers"),
        norm=last,
        embedding=embedding,
        tied=True,
        before=before,
        after=after,
        narrow=narrow,
    )


def _bloom(f: Fields) -> Network:
    width, path = f.size("hidden_size", "n_embed"), base(f, "transformer")
    many = f.size("n_head", "num_attention_heads")
    size = f.divides(many, width, "n_head", "hidden_size")
    attn = Attention("self_attention", many, many, size, Reach.causal(), ("query_key_value",), "dense", (True,), True)
    mlp = _plain(4 * width, "dense_h_to_4h", "dense_4h_to_h", act="gelu_impl", work=Work(12, 9))
    layers = [block((layer_norm("input_layernorm"), attn), (layer_norm("post_attention_layernorm"), mlp))]
    embedding = Embedding(((f"{path}word_embeddings", f.size("vocab_size")),))
    return decoder(
        f,
        path,
        width,
        layers * f.layers("n_layer", "num_hidden_layers"),
        norm=layer_norm(f"{path}ln_f"),
        embedding=embedding,
        tied=True,
        before=(layer_norm(f"{path}word_embeddings_layernorm"),),
        stack="h",
    )


def _falcon(f: Fields) -> Network:
    width, path = f.size("hidden_size"), base(f, "transformer")
    many = f.size("num_attention_heads", "n_head")
    new, parallel = f.flag("new_decoder_architecture", default=False), f.flag("parallel_attn", default=True)
    few = f.size("num_kv_heads", "n_head_kv", default=many) if new else 1 if f.flag("multi_query", default=True) else many
    f.divides(few, many, "num_kv_heads", "num_attention_heads")
    size, bias = f.divides(many, width, "num_attention_heads", "hidden_size"), f.flag("bias", default=False)
    attn = Attention(
        "self_attention",
        many,
        few,
        size,
        Reach.causal(),
        ("query_key_value",),
        "dense",
        (bias,),
        bias,
        rotary=0 if f.flag("alibi", default=False) else size,
    )
    mlp = _plain(
        f.maybe("ffn_hidden_size") or 4 * width,
        "dense_h_to_4h",
        "dense_4h_to_h",
        bias=bias,
        work=work(f, "activation", default="gelu"),
    )
    if not parallel:
        layer = block((layer_norm("input_layernorm"), attn), (layer_norm("post_attention_layernorm"), mlp))
    elif f.size("num_ln_in_parallel_attn", default=2 if new else 1) == 2:
        layer = Block((Branch((Path(layer_norm("ln_attn"), (attn,)), Path(layer_norm("ln_mlp"), (mlp,)))),))
    else:
        layer = Block((Branch((Path(layer_norm("input_layernorm"), (attn, mlp)),)),))
    embedding = Embedding(((f"{path}word_embeddings", f.size("vocab_size")),))
    layers = [layer] * f.layers("num_hidden_layers", "n_layer")
    return decoder(f, path, width, layers, norm=layer_norm(f"{path}ln_f"), embedding=embedding, tied=True, stack="h")


def experts(f: Fields, hidden: int, *count: str, name: str = "mlp", **rest: Any) -> Experts:
    """The routed experts; `count` are the names that the family gives their number."""
    many, top = f.size(*count), f.size("num_experts_per_tok", "experts_per_token")
    if top > many:
        raise f.wrong("num_experts_per_tok", f"{top} of {many} experts.", f"Give at most {count[0]}.")
    return Experts(name, many, top, hidden, **{"work": work(f), **rest})


def _mixtral(f: Fields) -> Network:
    feed = experts(f, f.size("intermediate_size"), "num_local_experts", "num_experts")
    return _standard(f, windows=lambda n: [window(f)] * n, feed=_always(feed))


def _qwen3_moe(f: Fields) -> Network:
    feed, every = (
        experts(f, f.size("moe_intermediate_size"), "num_experts", "num_local_experts"),
        f.size("decoder_sparse_step", default=1),
    )
    dense, only = MLP("mlp", f.size("intermediate_size"), work=work(f)), set(f.sizes("mlp_only_layers"))
    reach = window(f, 4096) if f.flag("use_sliding_window", default=False) else None
    return _standard(
        f,
        windows=lambda n: [reach] * n,
        norms=("q_norm", "k_norm"),
        biased=f.flag("attention_bias", default=False),
        feed=lambda i: dense if i in only or (i + 1) % every else feed,
    )


def _olmoe(f: Fields) -> Network:
    feed = experts(f, f.size("intermediate_size"), "num_experts", "num_local_experts")
    return _standard(
        f, norms=("q_norm", "k_norm"), row_norms=True, biased=f.flag("attention_bias", default=False), feed=_always(feed)
    )


def _gpt_oss(f: Fields) -> Network:
    feed = experts(f, f.size("intermediate_size"), "num_local_experts", "num_experts", router="router", bias=True, work=GATED)
    return _standard(
        f,
        windows=lambda n: look_back(f, n, window(f, 128), lambda i: i % 2 == 0),
        sinks=True,
        biased=f.flag("attention_bias", default=True),
        feed=_always(feed),
    )


def _deepseek(f: Fields) -> Network:
    width, count = f.size("hidden_size"), f.layers("num_hidden_layers")
    bias = f.flag("attention_bias", default=False)
    attn = LatentAttention(
        "self_attn",
        f.size("num_attention_heads"),
        f.size("kv_lora_rank"),
        f.size("qk_nope_head_dim"),
        f.size("qk_rope_head_dim"),
        f.size("v_head_dim"),
        Reach.causal(),
        f.maybe("q_lora_rank") or 0,
        bias,
    )
    hidden, together = f.size("moe_intermediate_size"), f.maybe("n_shared_experts", least=0)
    shared = MLP("mlp.shared_experts", hidden * together, work=work(f)) if together else None
    feed, dense = experts(f, hidden, "n_routed_experts", shared=shared), MLP("mlp", f.size("intermediate_size"), work=work(f))
    first = f.size("first_k_dense_replace", least=0)
    layers = [
        block((Norm("input_layernorm"), attn), (Norm("post_attention_layernorm"), dense if i < first else feed))
        for i in range(count)
    ]
    path = base(f, "model")
    notes: tuple[str, ...] = (CAUSAL, LATENT)
    if f.maybe("num_nextn_predict_layers", least=0):
        notes += ("The layers that predict a second token (MTP) are left out.",)
    return decoder(f, path, width, layers, norm=Norm(f"{path}norm"), notes=notes)


DECODERS: dict[str, Callable[[Fields], Network]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3_text": _gemma3_text,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "bloom": _bloom,
    "falcon": _falcon,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "gpt_oss": _gpt_oss,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
}
