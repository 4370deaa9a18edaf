"""A model as one gguf file, which llama.cpp and transformers read: packed weights go over exactly, in gguf's own blocks.

int8 with a scale per output becomes Q8_0 (the same scale in each block of 32), 4-bit groups of a multiple of 32 become Q4_1
(a scale and a minimum for each block of 32: the same numbers). Plain weights keep their dtype; norms are fp32.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrows.directory import is_standard
from narrows.errors import NarrowsError
from narrows.plan import Plan
from narrows.staging import Explained, replacing_file

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from narrows.modules.packed_linear import PackedLinear

ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2"}  # model_type, and the name of its tensor map in the gguf package
BLOCK = 32
# What tells llama.cpp how text is cut before the merges, by a piece of the tokenizer's own description; the first that is there.
CUTS = {r"\p{N}{1,3}": "llama-bpe", '"Digits"': "smollm", r"\p{N}|": "qwen2", '"use_regex": true': "gpt-2"}
_ELSE = "Write a directory instead."


def save_gguf(
    model: "nn.Module", tokenizer: Any, out: str | Path, plan: Plan, source: str = "", *, overwrite: bool = False
) -> int:
    """Write a causal language model under a plan as a gguf file, whole or not at all; gives its bytes.

    Scales are rounded to fp16, which leaves all above 2 ** -17 as they are. Raises NarrowsError for a family, a layer or a
    tokenizer that has no place in gguf, before anything is written.
    """
    import gguf

    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", "")
    if family not in ARCHITECTURES or getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        problem = f"a {family or type(model).__name__} with these parts is not exported to gguf."
        raise NarrowsError(problem, where=str(out), remedy=f"Export one of {', '.join(ARCHITECTURES)} without biases of its own.")
    if not is_standard(model):
        problem = f"{plan} gives it a structure that gguf has no words for."
        raise NarrowsError(problem, where=str(out), remedy=_ELSE)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "default":
        raise NarrowsError(f"its positions are scaled ({rope['rope_type']}).", where=str(out), remedy=_ELSE)
    tensors = _tensors(model, family, config)
    fields = _tokenizer_fields(tokenizer)
    with replacing_file(out, overwrite) as staging, Explained(Path(out), _ELSE):
        writer = gguf.GGUFWriter(staging, family)
        writer.add_string("narrows.plan", str(plan))
        writer.add_string("narrows.source", source)
        writer.add_uint32(f"{family}.block_count", config.num_hidden_layers)
        writer.add_uint32(f"{family}.context_length", config.max_position_embeddings)
        writer.add_uint32(f"{family}.embedding_length", config.hidden_size)
        writer.add_uint32(f"{family}.feed_forward_length", config.intermediate_size)
        writer.add_uint32(f"{family}.attention.head_count", config.num_attention_heads)
        writer.add_uint32(f"{family}.attention.head_count_kv", config.num_key_value_heads)
        writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
        writer.add_uint32(f"{family}.rope.dimension_count", _head_size(config))
        writer.add_float32(f"{family}.rope.freq_base", rope["rope_theta"])
        writer.add_uint32(f"{family}.vocab_size", config.vocab_size)
        for key, value in fields.items():
            add = {int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[type(value)]
            add(key, value)
        for name, (kind, array) in tensors.items():
            writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return os.path.getsize(out)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _tensors(model: "nn.Module", family: str, config: Any) -> "dict[str, tuple[str, np.ndarray[Any, Any]]]":
    """(type, array) by gguf's name: numbers of that type, or the bytes of its blocks [N, bytes]."""
    import gguf

    from narrows.modules.packed_embedding import PackedEmbedding
    from narrows.modules.packed_linear import PackedLinear

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[family]], config.num_hidden_layers)
    packed = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    owners = {name.removesuffix(".weight") for name in packed}
    plain = {name: t for name, t in model.state_dict().items() if name.rpartition(".")[0] not in owners or name.endswith(".bias")}
    embeddings = [name for name, m in model.named_modules() if isinstance(m, PackedEmbedding)]
    if config.tie_word_embeddings:  # gguf keeps the embedding alone
        plain.pop("lm_head.weight", None)
        packed = {f"{embeddings[0]}.weight" if embeddings and name == "lm_head.weight" else name: m for name, m in packed.items()}
    found = {}
    for name, value in {**plain, **packed}.items():
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise NarrowsError("has no place in gguf.", where=name, remedy=_ELSE)
        kind, array = _plain(value) if name in plain else _blocks(name, value)  # type: ignore[arg-type]
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):  # there the two halves of a head alternate
            half = _head_size(config) // 2
            array = array.reshape(-1, 2, half, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        found[place] = (kind, array)
    return found


def _plain(tensor: "Tensor") -> "tuple[str, np.ndarray[Any, Any]]":
    import torch

    if tensor.dim() == 1 or tensor.dtype == torch.float32:
        return "F32", tensor.detach().float().numpy()
    if tensor.dtype == torch.float16:
        return "F16", tensor.detach().numpy()
    return "BF16", tensor.detach().bfloat16().view(torch.uint8).numpy()


def _blocks(name: str, layer: "PackedLinear") -> "tuple[str, np.ndarray[Any, Any]]":
    """The blocks of a packed layer, row by row, as bytes."""
    import torch

    codes = layer.codes
    if layer.in_features % BLOCK or codes.format.group % BLOCK:
        problem = f"{layer.in_features} inputs in groups of {codes.format.group or 'all'} are no blocks of {BLOCK}."
        raise NarrowsError(problem, where=name, remedy=_ELSE)
    outputs, count = layer.out_features, layer.in_features // BLOCK
    repeat = count // codes.scale.shape[1]
    scale = codes.scale.repeat_interleave(repeat, 1)[..., None]
    if codes.format.bits == 8:
        numbers = codes.codes.view(outputs, count, BLOCK)
        heads = [scale.half().view(torch.uint8)]
        kind = "Q8_0"
    else:
        halves = codes.codes.view(outputs, count, 2, BLOCK // 2)
        numbers = halves[:, :, 0] | halves[:, :, 1] << 4
        least = -(codes.scale * codes.zero).repeat_interleave(repeat, 1)[..., None]
        heads = [scale.half().view(torch.uint8), least.half().view(torch.uint8)]
        kind = "Q4_1"
    return kind, torch.cat([*heads, numbers.view(torch.uint8)], -1).view(outputs, -1).numpy()


def _tokenizer_fields(tokenizer: Any) -> dict[str, Any]:
    """gguf's fields of a byte-level BPE tokenizer; {} where there is none."""
    if tokenizer is None:
        return {}
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    model, description = told["model"], json.dumps(told["pre_tokenizer"], ensure_ascii=False).replace("\\\\", "\\")
    cut = next((name for piece, name in CUTS.items() if piece in description), "")
    if model["type"] != "BPE" or '"ByteLevel"' not in description or not cut:
        problem = f"its tokenizer ({model['type']}) is no byte-level BPE that llama.cpp has a name for."
        raise NarrowsError(problem, where="tokenizer", remedy=_ELSE)
    tokens = dict(sorted((i, token) for token, i in tokenizer.get_vocab().items()))
    added = {token["id"]: 3 if token["special"] else 4 for token in told["added_tokens"]}  # control, or the user's
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    ends = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unknown": tokenizer.unk_token_id}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": cut,
        "tokenizer.ggml.tokens": list(tokens.values()),
        "tokenizer.ggml.token_type": [added.get(i, 1) for i in tokens],
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{name}_token_id": i for name, i in ends.items() if i is not None},
    }
