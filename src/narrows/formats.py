"""Packed layers as files that transformers and vLLM load: the `pack-quantized` layout of compressed-tensors.

Integers, scales and zeros are written as they are. A packed layer `x` of [N, K] becomes `x.weight_packed` (int32, eight
4-bit or four 8-bit codes each along K), `x.weight_scale` [N, G], `x.weight_zero_point` (int32, eight zeros each along
N; 4 bits only) and `x.weight_shape`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from narrows.errors import NarrowsError
from narrows.graph import DType

if TYPE_CHECKING:
    from torch import Tensor, nn

LAYOUT = "pack-quantized"
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def to_state(model: "nn.Module") -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """(tensors by name, changes to config.json) of a model with or without packed layers; tied tensors come once.

    A model without packed layers changes nothing in its config. Raises NarrowsError for outputs that do not fill int32s.
    """
    from torch import nn

    from narrows.modules.packed_linear import PackedLinear

    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if (owner in packed and leaf != "bias") or tensor.untyped_storage()._cdata in seen:
            continue
        seen.add(tensor.untyped_storage()._cdata)
        tensors[name] = tensor.contiguous()
    for name, layer in packed.items():
        tensors.update({f"{name}.{part}": tensor for part, tensor in _written(name, layer, dtype).items()})
    plain = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return tensors, {"quantization_config": _config(packed, plain)} if packed else {}


def from_state(tensors: Mapping[str, "Tensor"], config: Mapping[str, Any]) -> dict[str, "Tensor"]:
    """The state_dict that `to_state` was given, from a file's tensors and its config.json.

    Raises NarrowsError naming the tensor whose sizes or type do not fit the others.
    """
    from narrows.modules.packed_linear import PackedLinear

    names = [name.removesuffix(f".{PARTS[0]}") for name in tensors if name.endswith(f".{PARTS[0]}")]
    layout = config.get("quantization_config", {}).get("format")
    if names and layout != LAYOUT:
        where = "config.json: quantization_config: format"
        raise NarrowsError(f"{layout!r} is not the layout of the packed tensors.", where=where, remedy=f"It is {LAYOUT}.")
    state = dict(tensors)
    for name in names:
        layer = PackedLinear.of(_read(name, [state.pop(f"{name}.{part}", None) for part in PARTS]))
        state.update({f"{name}.packed": layer.packed, f"{name}.scales": layer.scales})
    return state


def _written(name: str, layer: Any, dtype: Any) -> dict[str, "Tensor"]:
    """One packed layer in the file's layout, with scales in the model's dtype (they are exact in each)."""
    import torch

    codes, bits = layer.codes, round(layer.form.bits)
    if layer.form.zero_bits and layer.out_features % 8:
        problem = f"{layer.out_features} outputs do not fill int32s of eight zeros."
        raise NarrowsError(problem, where=name, remedy="Leave the layer plain.")
    numbers = codes.codes.int() + (0 if layer.form.zero_bits else 2 ** (bits - 1))
    shape = torch.tensor([layer.out_features, layer.in_features])
    parts = [_words(numbers, bits), codes.scale.to(dtype or torch.bfloat16), shape]
    if layer.form.zero_bits:
        parts.append(_words(codes.zero.T, bits).T.contiguous())
    return dict(zip(PARTS, parts, strict=False))


def _read(name: str, parts: "list[Tensor | None]") -> Any:
    """The codes of one layer from its stored tensors."""
    import torch

    from narrows.modules.packed_linear import Codes, int4, int8

    packed, scale, shape, zero = parts
    bits = 8 if zero is None else 4
    problem = f"{', '.join(PARTS)} do not fit each other, or some are missing."
    unfit = NarrowsError(problem, where=name, remedy="Write the directory again.")
    if packed is None or scale is None or shape is None or shape.shape != (2,) or scale.dim() != 2:
        raise unfit
    (outputs, inputs), groups = shape.tolist(), scale.shape[1]
    fits = packed.dtype == torch.int32 and packed.shape == (outputs, inputs * bits // 32) and len(scale) == outputs
    if zero is None:
        fits = fits and groups == 1
    else:
        fits = fits and zero.dtype == torch.int32 and zero.shape == (outputs // 8, groups) and inputs % max(groups, 1) == 0
    if not fits or not groups:
        raise unfit
    numbers = _numbers(packed, bits)
    if zero is None:
        return Codes((numbers - 128).to(torch.int8), scale.float(), torch.zeros(outputs, 1, dtype=torch.int8), int8())
    zeros = _numbers(zero.T.contiguous(), 4).T.contiguous()
    return Codes(numbers.to(torch.uint8), scale.float(), zeros.to(torch.uint8), int4(inputs // groups))


def _words(numbers: "Tensor", bits: int) -> "Tensor":
    """Non-negative numbers [N, K] of so many bits as int32 [N, K * bits / 32], the first in the lowest bits."""
    import torch

    each = 32 // bits
    grouped = numbers.to(torch.int64).reshape(len(numbers), -1, each) << torch.arange(0, 32, bits)
    return grouped.sum(-1).to(torch.int32)


def _numbers(words: "Tensor", bits: int) -> "Tensor":
    """What `_words` packed, as int32."""
    import torch

    return ((words[..., None] >> torch.arange(0, 32, bits)) & (2**bits - 1)).view(len(words), -1).to(torch.int32)


def _config(packed: Mapping[str, Any], plain: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a model with these packed layers, and these linear ones that stay plain.

    The commonest format is that of every linear layer; the others come first and name theirs (vLLM reads several formats,
    transformers 5.23 raises). `dequantize` is for transformers: its default expects zeros that are not packed.
    """
    layers: dict[DType, list[str]] = {}
    for name, layer in packed.items():
        layers.setdefault(layer.form, []).append(name)
    groups: dict[str, Any] = {}
    for form in sorted(layers, key=lambda form: len(layers[form])):
        grouped: dict[str, Any] = {"strategy": "group", "group_size": form.group} if form.group else {"strategy": "channel"}
        weights = {"num_bits": round(form.bits), "type": "int", "symmetric": not form.zero_bits, **grouped}
        named = layers[form] if len(groups) + 1 < len(layers) else ["Linear"]
        groups[f"group_{len(groups)}"] = {"targets": named, "weights": weights, "format": LAYOUT}
    return {"quant_method": "compressed-tensors", "format": LAYOUT, "quantization_status": "compressed",
            "config_groups": groups, "ignore": plain, "dequantize": True}  # fmt: skip
