"""Coded layers as files that transformers and vLLM load: two layouts of compressed-tensors.

Codes and scales are written as they are. `pack-quantized`: a `PackedLinear` `x` of [N, K] becomes `x.weight_packed` (int32,
eight 4-bit or four 8-bit codes each along K), `x.weight_scale` [N, G], `x.weight_zero_point` (int32, eight zeros each along
N; 4 bits only) and `x.weight_shape`. `float-quantized`: a `CodedLinear` of e4m3 numbers becomes `x.weight` (fp8),
`x.weight_scale` [N, 1] and, where its inputs are rounded at a fixed scale, `x.input_scale` [1].
"""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from narrows.errors import NarrowsError

if TYPE_CHECKING:
    from torch import Tensor, nn

PACKED, FLOAT = "pack-quantized", "float-quantized"
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
FLOAT_PARTS = ("weight", "weight_scale", "input_scale")


class Layout(NamedTuple):
    """How the layers of one layout are written and read: the tensors it stores for each, the first of which names it."""

    parts: tuple[str, ...]
    mark: str
    write: "Callable[[Any, Any], dict[str, Tensor]]"
    read: "Callable[[str, list[Tensor | None]], dict[str, Tensor]]"


def layout_of(layer: "nn.Module") -> str:
    """The layout in which other programs read a layer's weights; '' where it is plain or there is none."""
    from narrows.modules.coded_linear import CodedLinear
    from narrows.modules.packed_linear import PackedLinear

    if isinstance(layer, PackedLinear):
        return PACKED
    if not isinstance(layer, CodedLinear):
        return ""
    coding = layer.coding
    scaled = coding.inputs is None or (coding.per in ("tensor", "token") and not coding.zero)
    e4m3 = {str(form) for form in (coding.weights, coding.inputs) if form} == {"e4m3"}
    return FLOAT if e4m3 and scaled and not coding.group else ""


def to_state(model: "nn.Module") -> dict[str, "Tensor"]:
    """The tensors that a file holds, by name, of a model with or without coded layers; tied tensors come once."""
    coded = {name: m for name, m in model.named_modules() if layout_of(m)}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if (owner in coded and leaf != "bias") or tensor.untyped_storage()._cdata in seen:
            continue
        seen.add(tensor.untyped_storage()._cdata)
        tensors[name] = tensor.contiguous()
    for name, layer in coded.items():
        parts = LAYOUTS[layout_of(layer)].write(layer, dtype)
        tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
    return tensors


def config_of(model: "nn.Module") -> dict[str, Any]:
    """What a model's coded layers change in its config.json: the `quantization_config`; {} where none has a layout.

    Raises NarrowsError for layers of two layouts.

    The commonest scheme is that of every linear layer; the others come first and name theirs (vLLM reads several schemes,
    transformers 5.23 raises). `dequantize` is for transformers: its default expects zeros that are not packed.
    """
    from torch import nn

    layers: dict[str, list[str]] = {}
    for name, layer in model.named_modules():
        if layout_of(layer):
            layers.setdefault(json.dumps(_scheme(layer)), []).append(name)
    if not layers:
        return {}
    schemes = [json.loads(scheme) for scheme in sorted(layers, key=lambda scheme: len(layers[scheme]))]
    layouts = {scheme["format"] for scheme in schemes}
    if len(layouts) > 1:
        problem = f"its layers have the layouts {' and '.join(sorted(layouts))}."
        raise NarrowsError(problem, where=type(model).__name__, remedy="Use one technique for the weights.")
    groups = {
        f"group_{i}": {"targets": ["Linear"] if i + 1 == len(schemes) else layers[json.dumps(scheme)], **scheme}
        for i, scheme in enumerate(schemes)
    }
    (layout,) = layouts
    plain = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    found = {"quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
             "config_groups": groups, "ignore": plain}  # fmt: skip
    return {"quantization_config": {**found, "dequantize": True} if layout == PACKED else found}


def _scheme(layer: Any) -> dict[str, Any]:
    """How the format of a layer is told in `config_groups`."""
    layout = layout_of(layer)
    if layout == PACKED:
        form = layer.form
        shared = {"strategy": "group", "group_size": form.group} if form.group else {"strategy": "channel"}
        weights = {"num_bits": round(form.bits), "type": "int", "symmetric": not form.zero_bits, **shared}
        return {"weights": weights, "format": layout}
    eight = {"num_bits": 8, "type": "float", "symmetric": True}
    inputs = {**eight, "strategy": layer.coding.per, "dynamic": layer.coding.per == "token"} if layer.coding.inputs else None
    return {"weights": {**eight, "strategy": "channel"}, "input_activations": inputs, "format": layout}


def from_state(tensors: Mapping[str, "Tensor"], config: Mapping[str, Any]) -> dict[str, "Tensor"]:
    """The state_dict of the model that `to_state` was given, from a file's tensors and its config.json.

    Raises NarrowsError naming the tensor whose sizes or type do not fit the others.
    """
    stated = config.get("quantization_config", {}).get("format")
    state = dict(tensors)
    for known, layout in LAYOUTS.items():
        names = [name.removesuffix(f".{layout.mark}") for name in tensors if name.endswith(f".{layout.mark}")]
        if known == FLOAT and stated != FLOAT:
            continue  # scales beside something else than fp8 weights
        if names and stated != known:
            where = "config.json: quantization_config: format"
            raise NarrowsError(f"{stated!r} is not the layout of the packed tensors.", where=where, remedy=f"It is {known}.")
        for name in names:
            parts = [state.pop(f"{name}.{part}", None) for part in layout.parts]
            state.update({f"{name}.{part}": tensor for part, tensor in layout.read(name, parts).items()})
    return state


def _unfit(name: str, parts: Iterable[str]) -> NarrowsError:
    problem = f"{', '.join(parts)} do not fit each other, or some are missing."
    return NarrowsError(problem, where=name, remedy="Write the directory again.")


def _write_packed(layer: Any, dtype: Any) -> dict[str, "Tensor"]:
    """A PackedLinear in the file's layout, with scales in the model's dtype (they are exact in each)."""
    import torch

    codes, bits = layer.codes, round(layer.form.bits)
    numbers = codes.codes if layer.form.zero_bits else codes.codes.view(torch.uint8) ^ 128  # stored as number + 128
    shape = torch.tensor([layer.out_features, layer.in_features])
    parts = [_words(numbers, bits), codes.scale.to(dtype or torch.bfloat16), shape]
    if layer.form.zero_bits:
        parts.append(_words(codes.zero.T, bits).T.contiguous())
    return dict(zip(PARTS, parts, strict=False))


def _read_packed(name: str, parts: "list[Tensor | None]") -> "dict[str, Tensor]":
    """What a PackedLinear keeps, from its stored tensors."""
    import torch

    from narrows.modules.packed_linear import Codes, PackedLinear, int4, int8

    packed, scale, shape, zero = parts
    bits = 8 if zero is None else 4
    if packed is None or scale is None or shape is None or shape.shape != (2,) or scale.dim() != 2:
        raise _unfit(name, PARTS)
    (outputs, inputs), groups = shape.tolist(), scale.shape[1]
    fits = packed.dtype == torch.int32 and packed.shape == (outputs, -(-inputs * bits // 32)) and len(scale) == outputs
    if zero is None:
        fits = fits and groups == 1
    else:
        fits = fits and zero.dtype == torch.int32 and zero.shape == (-(-outputs // 8), groups) and inputs % max(groups, 1) == 0
    if not fits or not groups:
        raise _unfit(name, PARTS)
    numbers = _numbers(packed, bits)[:, :inputs]
    if zero is None:
        codes = Codes((numbers ^ 128).view(torch.int8), scale.float(), torch.zeros(outputs, 1, dtype=torch.int8), int8())
    else:
        zeros = _numbers(zero.T.contiguous(), 4)[:, :outputs].T.contiguous()
        codes = Codes(numbers, scale.float(), zeros, int4(inputs // groups))
    layer = PackedLinear.of(codes)
    return {"packed": layer.packed, "scales": layer.scales}


def _write_float(layer: Any, dtype: Any) -> dict[str, "Tensor"]:
    """A CodedLinear of e4m3 numbers in the file's layout, its scales in fp32."""
    import torch

    parts = {"weight": layer.bits8.view(torch.float8_e4m3fn), "weight_scale": layer.scales, "input_scale": layer.input_scale}
    return {part: t.view(torch.bfloat16).float() if "scale" in part else t for part, t in parts.items() if t is not None}


def _read_float(name: str, parts: "list[Tensor | None]") -> "dict[str, Tensor]":
    """What a CodedLinear keeps, from its stored tensors."""
    import torch

    weight, scale, inputs = parts
    if weight is None or weight.dtype != torch.float8_e4m3fn or weight.dim() != 2 or scale is None:
        raise _unfit(name, FLOAT_PARTS)
    if scale.shape != (len(weight), 1) or (inputs is not None and inputs.shape != (1,)):
        raise _unfit(name, FLOAT_PARTS)
    scales = {"scales": scale} if inputs is None else {"scales": scale, "input_scale": inputs}
    return {"bits8": weight.view(torch.uint8), **{n: t.to(torch.bfloat16).view(torch.int16) for n, t in scales.items()}}


LAYOUTS = {
    PACKED: Layout(PARTS, "weight_packed", _write_packed, _read_packed),
    FLOAT: Layout(FLOAT_PARTS, "weight_scale", _write_float, _read_float),
}


def _words(numbers: "Tensor", bits: int) -> "Tensor":
    """uint8 numbers [N, K] of 4 or 8 bits as int32 [N, K * bits / 32], the first in the lowest bits, padded with 0."""
    import torch

    padded = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % (32 // bits)))
    packed = padded if bits == 8 else padded[:, ::2] | padded[:, 1::2] << 4
    return packed.flatten().view(torch.int32).view(len(numbers), -1)


def _numbers(words: "Tensor", bits: int) -> "Tensor":
    """What `_words` packed, with the padding."""
    import torch

    packed = words.flatten().view(torch.uint8).view(len(words), -1)
    return packed if bits == 8 else torch.stack((packed & 15, packed >> 4), -1).view(len(words), -1)
