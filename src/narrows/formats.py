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

METHOD, LAYOUT = "compressed-tensors", "pack-quantized"


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
    groups: dict[DType, list[str]] = {}
    for name, layer in packed.items():
        groups.setdefault(layer.form, []).append(name)
        tensors.update({f"{name}.{part}": tensor for part, tensor in _written(layer, dtype).items()})
    if not packed:
        return tensors, {}
    plain = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return tensors, {"quantization_config": _config(groups, plain)}


def from_state(model: "nn.Module", tensors: Mapping[str, "Tensor"], config: Mapping[str, Any]) -> "nn.Module":
    """A freshly built model with plain layers, filled from what `to_state` gave; packed layers take their places.

    Raises NarrowsError for tensors that are missing, left over or of other sizes than the model's.
    """
    from torch import nn

    from narrows.modules.packed_linear import PackedLinear

    rest = dict(tensors)
    names = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    if names and config.get("quantization_config", {}).get("format") != LAYOUT:
        raise NarrowsError("the config does not name the layout of the packed tensors.", where="config.json: quantization_config",
                           remedy=f"Only {METHOD} with format {LAYOUT} is read.")  # fmt: skip
    modules = dict(model.named_modules())
    for name in names:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise NarrowsError("the model has no linear layer of this name.", where=name, remedy="Build the model from the same config.json.")
        parts = {p: rest.pop(f"{name}.{p}", None) for p in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")}
        codes = _read(name, parts, linear.out_features, linear.in_features)
        bias = rest.pop(f"{name}.bias", None)
        if (bias is None) != (linear.bias is None):
            raise NarrowsError("the bias is there on one side only.", where=name, remedy="Build the model from the same config.json.")
        model.set_submodule(name, PackedLinear.of(codes, bias))
    wanted = model.state_dict()
    packed = {f"{name}.{b}" for name in names for b in ("packed", "scales", "bias")}
    wrong = [n for n, t in rest.items() if n not in wanted or wanted[n].shape != t.shape]
    if wrong:
        raise NarrowsError("the model has no such tensor of this size.", where=wrong[0], remedy="Build the model from the same config.json.")
    model.load_state_dict(rest, strict=False, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    known = {t.untyped_storage()._cdata for n, t in model.state_dict().items() if n in rest or n in packed}
    missing = [n for n, t in model.state_dict().items() if n not in rest and n not in packed and t.untyped_storage()._cdata not in known]
    if missing:
        raise NarrowsError("no tensor of this name was stored.", where=missing[0], remedy="Write the directory again.")
    return model


def _written(layer: Any, dtype: Any) -> dict[str, "Tensor"]:
    """One packed layer in the file's layout, with scales in the model's dtype (they are exact in each)."""
    import torch

    codes, eight_bits = layer.codes, layer.form.bits == 8
    if not eight_bits and layer.out_features % 8:
        problem = f"{layer.out_features} outputs do not fill int32s of eight zeros."
        raise NarrowsError(problem, where="pack-quantized", remedy="Leave the layer plain.")
    parts = {
        "weight_packed": _words(codes.codes.int() + 128 if eight_bits else codes.codes, 8 if eight_bits else 4),
        "weight_scale": codes.scale.to(dtype or torch.bfloat16),
        "weight_shape": torch.tensor([layer.out_features, layer.in_features]),
    }
    return parts if eight_bits else {**parts, "weight_zero_point": _words(codes.zero.T.contiguous(), 4).T.contiguous()}


def _read(name: str, parts: Mapping[str, Any], outputs: int, inputs: int) -> Any:
    """The codes of one layer from its stored tensors."""
    import torch

    from narrows.modules.packed_linear import Codes, int4, int8

    packed, scale, zero, shape = (parts[p] for p in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"))
    if scale is None or shape is None or shape.tolist() != [outputs, inputs] or scale.dim() != 2 or len(scale) != outputs:
        raise NarrowsError(f"its shape or scales are not those of [{outputs}, {inputs}].", where=name, remedy="Write the directory again.")
    bits = 8 if zero is None else 4
    if packed.dtype != torch.int32 or tuple(packed.shape) != (outputs, inputs * bits // 32) or inputs % scale.shape[1]:
        problem = f"{tuple(packed.shape)} of {packed.dtype} do not hold {bits} bits of [{outputs}, {inputs}]."
        raise NarrowsError(problem, where=f"{name}.weight_packed", remedy="Write the directory again.")
    numbers = _numbers(packed, bits)
    if zero is None:
        return Codes((numbers - 128).to(torch.int8), scale.float(), torch.zeros_like(scale, dtype=torch.int8), int8())
    zeros = _numbers(zero.T.contiguous(), 4).T.contiguous()
    return Codes(numbers.to(torch.uint8), scale.float(), zeros.to(torch.uint8), int4(inputs // scale.shape[1]))


def _words(numbers: "Tensor", bits: int) -> "Tensor":
    """Non-negative numbers [N, K] of so many bits as int32 [N, K * bits / 32], the first in the lowest bits."""
    import torch

    each = 32 // bits
    grouped = numbers.to(torch.int64).view(len(numbers), -1, each) << torch.arange(0, 32, bits)
    return grouped.sum(-1).to(torch.int32)


def _numbers(words: "Tensor", bits: int) -> "Tensor":
    """What `_words` packed, as int32."""
    import torch

    return ((words[..., None] >> torch.arange(0, 32, bits)) & (2**bits - 1)).view(len(words), -1).to(torch.int32)


def _config(groups: Mapping[DType, list[str]], plain: list[str]) -> dict[str, Any]:
    """The `quantization_config` of layers by format; one format alone names all linear layers but the plain ones."""
    described = {}
    for number, (form, names) in enumerate(groups.items()):
        grouped: dict[str, Any] = {"strategy": "group", "group_size": form.group} if form.group else {"strategy": "channel"}
        weights = {"num_bits": round(form.bits), "type": "int", "symmetric": not form.zero_bits, **grouped}
        targets = ["Linear"] if len(groups) == 1 else names
        described[f"group_{number}"] = {"targets": targets, "weights": weights, "format": LAYOUT}
    return {"quant_method": METHOD, "format": LAYOUT, "quantization_status": "compressed", "config_groups": described, "ignore": plain}
