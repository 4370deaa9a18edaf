"""Encoders, towers of images and text, and encoder-decoders, from their configs."""

from collections.abc import Callable
from dataclasses import replace

from narrows.capture.blocks import (
    ACTIVATIONS,
    GELU,
    MLP,
    Attention,
    Block,
    Branch,
    Norm,
    Part,
    Path,
    Reach,
    Stack,
    Work,
    block,
    layer_norm,
)
from narrows.capture.decoders import CAUSAL, head, labels, look_back, work
from narrows.capture.fields import Fields
from narrows.capture.tape import OUTPUTS, SEQUENCES, TOKENS
from narrows.capture.towers import Added, Conv, Dense, Embedding, Network, Product, Tower
from narrows.graph import Size

SOURCE = Size.of(source=1)
ENCODED = Size.of(encoded=1)  # sequences whose source is read in this step: none in decode
TANH = Work(4)
FULL = "Attention sees all tokens of a sequence: T x T query-key pairs."


def _heads(f: Fields, width: int, name: str = "num_attention_heads") -> tuple[int, int]:
    many = f.size(name)
    return many, f.divides(many, width, name, "the width")


def _bert(f: Fields) -> Network:
    width = f.size("hidden_size")
    kind = head(f, ("Model", "ForMaskedLM", "ForSequenceClassification"))
    path = "" if kind == "Model" else "bert."
    many, size = _heads(f, width)
    attn = Attention(
        "attention",
        many,
        many,
        size,
        Reach.both(),
        ("self.query", "self.key", "self.value"),
        "output.dense",
        (True,) * 3,
        True,
        values="attention.self.attention",
    )
    mlp = MLP(
        "",
        f.size("intermediate_size"),
        ("intermediate.dense",),
        "output.dense",
        False,
        True,
        "intermediate.intermediate_act_fn",
        work(f, default="gelu"),
    )
    layer = Block(
        (
            Branch((Path(None, (attn,)),), layer_norm("attention.output.LayerNorm")),
            Branch((Path(None, (mlp,)),), layer_norm("output.LayerNorm")),
        )
    )
    words, table = f.size("vocab_size"), f"{path}embeddings.word_embeddings"
    tables = (
        (table, words),
        (f"{path}embeddings.position_embeddings", f.size("max_position_embeddings", default=512)),
        (f"{path}embeddings.token_type_embeddings", f.size("type_vocab_size", default=2)),
    )
    parts: list[Part] = [
        Embedding(tables),
        layer_norm(f"{path}embeddings.LayerNorm"),
        Stack(f"{path}encoder.layer", (layer,) * f.layers("num_hidden_layers")),
    ]
    if kind == "ForMaskedLM":
        parts += [
            Dense("cls.predictions.transform.dense", width, width, True, act=work(f, default="gelu")),
            layer_norm("cls.predictions.transform.LayerNorm"),
            Dense("cls.predictions.decoder", width, words, True, tied=table, split="vocabulary"),
        ]
    else:
        parts.append(Dense(f"{path}pooler.dense", width, width, True, SEQUENCES, act=TANH))
    if kind == "ForSequenceClassification":
        parts.append(Dense("classifier", width, labels(f), True, SEQUENCES))
    return Network((Tower(width, tuple(parts)),), (FULL,))


def _modernbert(f: Fields) -> Network:
    width, count = f.size("hidden_size"), f.layers("num_hidden_layers")
    kind = head(f, ("Model", "ForMaskedLM", "ForSequenceClassification"))
    path = "" if kind == "Model" else "model."
    many, size = _heads(f, width)
    bias, affine = f.flag("attention_bias", default=False), f.flag("norm_bias", default=False)
    attn = Attention("attn", many, many, size, Reach.both(), ("Wqkv",), "Wo", (bias,), bias, rotary=size)
    mlp = MLP(
        "mlp",
        f.size("intermediate_size"),
        ("Wi",),
        "Wo",
        bias=f.flag("mlp_bias", default=False),
        act="act",
        work=work(f, "hidden_activation", default="gelu"),
    )
    half = f.size("local_attention", default=128, least=2) // 2
    every = f.size("global_attn_every_n_layers", default=3)
    first = layer_norm("attn_norm", affine)
    layers = tuple(
        block((first if i else None, replace(attn, reach=Reach.both(near))), (layer_norm("mlp_norm", affine), mlp))
        for i, near in enumerate(look_back(f, count, half, lambda i: i % every != 0))
    )
    words, table = f.size("vocab_size"), f"{path}embeddings.tok_embeddings"
    parts: list[Part] = [
        Embedding(((table, words),)),
        layer_norm(f"{path}embeddings.norm", affine),
        Stack(f"{path}layers", layers),
        layer_norm(f"{path}final_norm", affine),
    ]
    if kind != "Model":
        rows = SEQUENCES if kind == "ForSequenceClassification" else TOKENS
        after: list[Part] = [
            Dense("head.dense", width, width, f.flag("classifier_bias", default=False), act=GELU),
            layer_norm("head.norm", affine),
        ]
        if kind == "ForMaskedLM":
            own = not f.flag("tie_word_embeddings", default=True)
            after.append(
                Dense(
                    "decoder", width, words, f.flag("decoder_bias", default=True), tied="" if own else table, split="vocabulary"
                )
            )
        else:
            after.append(Dense("classifier", width, labels(f), True))
        parts.append(Tower(width, tuple(after), rows, joined=True))
    return Network((Tower(width, tuple(parts)),), (FULL,))


def _pixels(f: Fields, name: str, default: int) -> tuple[int, int]:
    """Height and width, where a config may give one number for both."""
    if isinstance(f.get(name, default=default), list | tuple):
        pair = f.sizes(name, least=1)
        if len(pair) != 2:
            raise f.wrong(name, f"{len(pair)} sides.", "Give one number, or height and width.")
        return pair[0], pair[1]
    side = f.size(name, default=default)
    return side, side


def _patches(f: Fields, name: str, bias: bool, patch: int = 16) -> tuple[int, Conv]:
    """How many patches an image has, and the convolution that makes them."""
    (high, wide), (tall, broad) = _pixels(f, "image_size", 224), _pixels(f, "patch_size", patch)
    if tall > high or broad > wide:
        raise f.wrong(
            "patch_size", f"a patch of {tall} x {broad} in an image of {high} x {wide}.", "Give patches smaller than the image."
        )
    count = (high // tall) * (wide // broad)
    before = SEQUENCES * (high * wide)
    return count, Conv(name, before, f.size("num_channels", default=3), tall * broad, bias, positions=SEQUENCES * count)


def _vit(f: Fields) -> Network:
    width = f.size("hidden_size")
    kind = head(f, ("Model", "ForImageClassification"))
    path = "" if kind == "Model" else "vit."
    many, size = _heads(f, width)
    count, conv = _patches(f, f"{path}embeddings.patch_embeddings.projection", True)
    rows, bias = count + 1, f.flag("qkv_bias", default=True)
    attn = Attention("attention", many, many, size, Reach.fixed(rows), bias=(bias,) * 3, out_bias=True)
    mlp = MLP("mlp", f.size("intermediate_size"), ("fc1",), "fc2", gated=False, bias=True, work=work(f, default="gelu"))
    layer = block((layer_norm("layernorm_before"), attn), (layer_norm("layernorm_after"), mlp))
    parts: list[Part] = [
        conv,
        Added(f"{path}embeddings", (rows + 1) * width, 2),
        Stack(f"{path}layers", (layer,) * f.layers("num_hidden_layers")),
        layer_norm(f"{path}layernorm"),
    ]
    if kind == "Model":
        parts.append(Dense("pooler.dense", width, f.size("pooler_output_size", default=width), True, SEQUENCES, act=TANH))
    else:
        parts.append(Dense("classifier", width, labels(f), True, SEQUENCES))
    return Network((Tower(width, tuple(parts), SEQUENCES * rows),), (f"Each sequence is an image of {rows - 1} patches.", FULL))


def _clip(f: Fields) -> Network:
    text, vision, shared = (
        f.within("text_config", default={}),
        f.within("vision_config", default={}),
        f.size("projection_dim", default=512),
    )
    head(f, ("Model",))

    def layers(own: Fields, path: str, width: int, hidden: int, heads: int, reach: Reach) -> Stack:
        filled = Fields({"num_attention_heads": heads, **{k: v for k, v in own.values.items() if v is not None}}, own.where)
        many, size = _heads(filled, width)
        attn = Attention("self_attn", many, many, size, reach, output="out_proj", bias=(True,) * 3, out_bias=True)
        mlp = MLP(
            "mlp",
            own.size("intermediate_size", default=hidden),
            ("fc1",),
            "fc2",
            False,
            True,
            "activation_fn",
            work(own, default="quick_gelu"),
        )
        layer = block((layer_norm("layer_norm1"), attn), (layer_norm("layer_norm2"), mlp))
        return Stack(f"{path}.encoder.layers", (layer,) * own.layers("num_hidden_layers", default=12))

    narrow, wide = text.size("hidden_size", default=512), vision.size("hidden_size", default=768)
    tables = (
        ("text_model.embeddings.token_embedding", text.size("vocab_size", default=49408)),
        ("text_model.embeddings.position_embedding", text.size("max_position_embeddings", default=77)),
    )
    words = Tower(
        narrow,
        (
            Embedding(tables),
            layers(text, "text_model", narrow, 2048, 8, Reach.causal(cached=False)),
            layer_norm("text_model.final_layer_norm"),
            Dense("text_projection", narrow, shared, rows=SEQUENCES),
        ),
    )
    count, conv = _patches(vision, "vision_model.embeddings.patch_embedding", False, 32)
    rows = count + 1
    image = Tower(
        wide,
        (
            conv,
            Added("vision_model.embeddings", (rows + 1) * wide),
            layer_norm("vision_model.pre_layrnorm"),
            layers(vision, "vision_model", wide, 3072, 12, Reach.fixed(rows)),
            Tower(wide, (layer_norm("vision_model.post_layernorm"),), SEQUENCES, joined=True),
            Dense("visual_projection", wide, shared, rows=SEQUENCES),
        ),
        SEQUENCES * rows,
    )
    compare = Tower(1, (Product("logits", shared), Added("logit_scale", 1)), SEQUENCES, joined=True)
    notes = (
        f"Each sequence is one text of T tokens and one image of {rows - 1} patches.",
        CAUSAL,
        "Each image is compared with its own text.",
    )
    return Network((words, image, compare), notes)


def _t5(f: Fields) -> Network:
    width, many, size, hidden = f.size("d_model"), f.size("num_heads"), f.size("d_kv"), f.size("d_ff")
    kind = head(f, ("ForConditionalGeneration", "LMHeadModel", "EncoderModel", "Model"))
    alone = kind == "EncoderModel"
    act = f.word("feed_forward_proj", default="relu")
    gated = act.startswith("gated-")
    plain = "gelu_new" if act == "gated-gelu" else act.removeprefix("gated-")
    costs = Fields({"feed_forward_proj": plain}, f.where).choice(ACTIVATIONS, "feed_forward_proj")
    words, buckets = f.size("vocab_size"), f.size("relative_attention_num_buckets", default=32)

    def stack(side: str, count: int, reach: Reach, cross: Reach | None) -> Stack:
        own = Attention("layer.0.SelfAttention", many, many, size, reach, ("q", "k", "v"), "o")
        last = 2 if cross else 1
        mlp = MLP(
            f"layer.{last}.DenseReluDense", hidden, ("wi_0", "wi_1") if gated else ("wi",), "wo", gated, act="act", work=costs
        )
        middle: list[tuple[Norm | None, Part]] = []
        if cross:
            memory = replace(
                own, name="layer.1.EncDecAttention", reach=cross, memory="encoder.final_layer_norm", memory_rows=SOURCE
            )
            middle = [(Norm("layer.1.layer_norm"), memory)]
        first, later = (
            block((Norm("layer.0.layer_norm"), a), *middle, (Norm(f"layer.{last}.layer_norm"), mlp))
            for a in (replace(own, buckets=buckets), own)
        )
        return Stack(f"{side}.block", (first, *[later] * (count - 1)))

    layers = f.layers("num_layers")
    within = Reach.both() if alone else Reach(Size.of(source_pairs=1), SOURCE)
    encoder = Tower(
        width,
        (Embedding((("shared", words),)), stack("encoder", layers, within, None), Norm("encoder.final_layer_norm")),
        TOKENS if alone else SOURCE,
    )
    if alone:
        return Network((encoder,), (FULL,))
    across = Reach(*(Size.of({f"{what}[source]": 1.0}) for what in ("pairs", "context", "held")))
    parts: list[Part] = [
        Embedding((("decoder.embed_tokens", words),), tied="shared"),
        stack("decoder", f.layers("num_decoder_layers", default=layers), Reach.causal(), across),
        Norm("decoder.final_layer_norm"),
    ]
    if kind != "Model":
        tied = "shared" if f.flag("tie_word_embeddings", default=True) else ""
        parts.append(Dense("lm_head", width, words, rows=OUTPUTS, tied=tied, split="vocabulary"))
    return Network(
        (encoder, Tower(width, tuple(parts))), (CAUSAL, "The encoder reads the step's source; in decode it does not run.")
    )


def _whisper(f: Fields) -> Network:
    width = f.size("d_model")
    kind = head(f, ("ForConditionalGeneration", "Model"))
    path = "" if kind == "Model" else "model."
    length = f.size("max_source_positions", default=1500)
    encoded = ENCODED * length
    act = work(f, "activation_function", default="gelu")

    def layers(side: str, reach: Reach, cross: Reach | None) -> Stack:
        many, size = _heads(f, width, f"{side}_attention_heads")
        own = Attention("self_attn", many, many, size, reach, output="out_proj", bias=(True, False, True), out_bias=True)
        mlp = MLP("", f.size(f"{side}_ffn_dim"), ("fc1",), "fc2", False, True, "activation_fn", act)
        middle: list[tuple[Norm | None, Part]] = []
        if cross:
            memory = replace(own, name="encoder_attn", reach=cross, memory=f"{path}encoder.layer_norm", memory_rows=encoded)
            middle = [(layer_norm("encoder_attn_layer_norm"), memory)]
        layer = block((layer_norm("self_attn_layer_norm"), own), *middle, (layer_norm("final_layer_norm"), mlp))
        return Stack(f"{path}{side}.layers", (layer,) * f.layers(f"{side}_layers"))

    mel, twice = f.size("num_mel_bins", default=80), ENCODED * (2 * length)
    encoder = Tower(
        width,
        (
            Conv(f"{path}encoder.conv1", twice, mel, 3, act=GELU, positions=twice),
            Conv(f"{path}encoder.conv2", twice, width, 3, act=GELU),
            Added(f"{path}encoder.embed_positions", length * width),
            layers("encoder", Reach.fixed(length, "encoded"), None),
            layer_norm(f"{path}encoder.layer_norm"),
        ),
        encoded,
    )
    across = Reach(TOKENS * length, SEQUENCES * length, SEQUENCES * length)
    words, table = f.size("vocab_size"), f"{path}decoder.embed_tokens"
    tables = ((table, words), (f"{path}decoder.embed_positions", f.size("max_target_positions", default=448)))
    parts: list[Part] = [Embedding(tables), layers("decoder", Reach.causal(), across), layer_norm(f"{path}decoder.layer_norm")]
    if kind != "Model":
        tied = table if f.flag("tie_word_embeddings", default=True) else ""
        parts.append(Dense("proj_out", width, words, rows=OUTPUTS, tied=tied, split="vocabulary"))
    notes = (CAUSAL, f"Each sequence is one window of audio, {length} encoder positions; in decode the encoder does not run.")
    return Network((encoder, Tower(width, tuple(parts))), notes)


ENCODERS: dict[str, Callable[[Fields], Network]] = {
    "bert": _bert,
    "modernbert": _modernbert,
    "vit": _vit,
    "clip": _clip,
    "t5": _t5,
    "whisper": _whisper,
}
