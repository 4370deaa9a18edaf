"""Build a model of transformers or diffusers from its config on the meta device, and capture it for every step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from narrows.capture.generalize import generalize
from narrows.capture.torch import from_module
from narrows.errors import NarrowsError, closest
from narrows.graph import Graph
from narrows.step import Step

_MOST_LAYERS = 10_000
# the first that fits
_TASKS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_CLASSIFICATION", "MASKED_LM", "")
_BUILD_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, ImportError, OSError)


def from_transformers(config: Mapping[str, Any], name: str, where: str = "config.json") -> Graph:
    """The symbolic Graph of any model that transformers can build from the fields of its config.json.

    No weights, no network and no code but transformers' own. `architectures` chooses the class, else the family's
    causal language model, classifier or plain model. Vision models follow `sequences` (one image each, of the size
    the config states), language models `tokens` and what else a Step has; `prefill` decides what outputs there are.
    Raises NarrowsError naming the field that transformers refuses.
    """
    import transformers

    family = config.get("model_type")
    if not isinstance(family, str) or family not in transformers.CONFIG_MAPPING:
        raise NarrowsError(f"transformers knows no model type {family!r}.", where=f"{where}: model_type",
                           remedy=closest(str(family), list(transformers.CONFIG_MAPPING)))  # fmt: skip
    fields = {k: v for k, v in _plain(config, where).items() if k != "model_type"}
    dtype = _dtype(config.get("dtype") or config.get("torch_dtype") or "bfloat16", where)
    try:
        settings = transformers.AutoConfig.for_model(family, **fields)
        with torch.device("meta"):
            model = _class(transformers, settings, where)._from_config(settings, dtype=dtype)
    except _BUILD_FAILURES as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NarrowsError(f"transformers refuses it: {reason}", where=where, remedy="Correct that field.") from error
    windows = sorted({w for w in _values(config, "sliding_window", "local_attention") if isinstance(w, int) and w > 0})
    graph = generalize(lambda step: from_module(model, step, name=name), _probes(model, windows), windows)
    return replace(graph, source=f"transformers {transformers.__version__}: {type(model).__name__}")


def _plain(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields that describe a model: none that choose code or kernels, and no more layers than there can be."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        place = f"{where}: {key}"
        if "implementation" in key or key in ("auto_map", "quantization_config", "torch_dtype", "dtype"):
            continue
        if "layer" in key or "depth" in key:
            counts = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)]
            if max(counts, default=0) > _MOST_LAYERS:
                raise NarrowsError(f"{value} layers.", where=place, remedy=f"There are at most {_MOST_LAYERS}.")
        out[key] = _plain(value, place) if isinstance(value, Mapping) else value
    return out


def _class(transformers: Any, settings: Any, where: str) -> Any:
    for name in settings.architectures or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    auto = transformers.models.auto.modeling_auto
    for task in _TASKS:
        mapping = getattr(auto, f"MODEL_FOR_{task}_MAPPING" if task else "MODEL_MAPPING")
        if type(settings) in mapping:
            found = mapping[type(settings)]
            return found[0] if isinstance(found, (tuple, list)) else found
    raise NarrowsError("no class builds it.", where=f"{where}: architectures", remedy="Name one of transformers' model classes.")


def _dtype(name: Any, where: str) -> torch.dtype:
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        remedy = "Write bfloat16, float16 or float32."
        raise NarrowsError(f"{name!r} is no floating-point format.", where=f"{where}: dtype", remedy=remedy)
    return found


def _values(config: Mapping[str, Any], *fields: str) -> list[Any]:
    """What some fields hold, in a config and in those nested in it."""
    own = [v for k, v in config.items() if k in fields]
    return own + [v for part in config.values() if isinstance(part, Mapping) for v in _values(part, *fields)]


def _probes(model: Any, windows: Sequence[int]) -> list[Step]:
    """Steps that tell the fields of a Step apart, some longer than every window.

    Each has more than one token, so that the same operators run in all of them.
    """
    beyond = max(windows, default=0)
    if model.main_input_name == "pixel_values" and not hasattr(model.config, "text_config"):
        return [Step.forward(batch) for batch in (2, 3, 5)]
    if model.config.is_encoder_decoder:
        sizes = ((2, 53, 61), (3, 101, 37), (5, 71, 89), (7, 37, 131), (11, 59, 43))
        return [Step.prefill(batch, tokens, source=source) for batch, tokens, source in sizes]
    if not model.can_generate():
        pairs = ((2, 53), (3, beyond + 101), (5, 61), (7, beyond + 37), (11, 43))
        return [Step.forward(batch, tokens) for batch, tokens in pairs]
    steps = ((2, 53, 0), (3, 101 + beyond, 0), (5, 61, 37), (7, 71, 13 + beyond), (11, 89, 211 + beyond), (13, 47 + beyond, 31))
    return [Step.prefill(batch, tokens, past=past) for batch, tokens, past in steps]


def _unet(config: Any, batch: int, pixels: int, text: int) -> dict[str, Any]:
    given = {"sample": _image(config, batch, pixels), "timestep": torch.ones(batch),
             "encoder_hidden_states": torch.ones(batch, text or 77, config.cross_attention_dim)}  # fmt: skip
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        given["added_cond_kwargs"] = {"text_embeds": torch.ones(batch, pooled), "time_ids": torch.ones(batch, 6)}
    return given


def _flux(config: Any, batch: int, pixels: int, text: int) -> dict[str, Any]:
    patches, text = (pixels // 16) ** 2, text or 512
    guidance = {"guidance": torch.ones(batch)} if config.guidance_embeds else {}
    return {"hidden_states": torch.ones(batch, patches, config.in_channels), "timestep": torch.ones(batch),
            "encoder_hidden_states": torch.ones(batch, text, config.joint_attention_dim), "txt_ids": torch.ones(text, 3),
            "pooled_projections": torch.ones(batch, config.pooled_projection_dim), "img_ids": torch.ones(patches, 3),
            **guidance}  # fmt: skip


def _sd3(config: Any, batch: int, pixels: int, text: int) -> dict[str, Any]:
    return {"hidden_states": _image(config, batch, pixels), "timestep": torch.ones(batch),
            "encoder_hidden_states": torch.ones(batch, text or 333, config.joint_attention_dim),
            "pooled_projections": torch.ones(batch, config.pooled_projection_dim)}  # fmt: skip


def _dit(config: Any, batch: int, pixels: int, text: int) -> dict[str, Any]:
    labels = torch.zeros(batch, dtype=torch.long)
    return {"hidden_states": _image(config, batch, pixels), "timestep": labels, "class_labels": labels}


def _image(config: Any, batch: int, pixels: int) -> Tensor:
    """A latent image [B, C, H, W]: the autoencoder of all four makes one number of 8 x 8 pixels."""
    return torch.ones(batch, config.in_channels, pixels // 8, pixels // 8)


# one denoising step: the inputs for (config, batch, pixels, text tokens; 0: as the published pipeline has them)
DIFFUSION: dict[str, Callable[[Any, int, int, int], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet, "FluxTransformer2DModel": _flux, "SD3Transformer2DModel": _sd3,
    "DiTTransformer2DModel": _dit,
}  # fmt: skip


def from_diffusers(
    config: Mapping[str, Any], name: str, pixels: int = 1024, dtype: str = "bfloat16", text: int = 0, where: str = "config.json"
) -> Graph:
    """The Graph of one denoising step of a diffusers model, symbolic in `sequences` (images of `pixels` x `pixels`).

    `text` tokens condition each image (0: as many as the published pipeline has). Raises NarrowsError for a class
    whose inputs are not known here, and for a config that diffusers refuses.
    """
    import diffusers

    kind = config.get("_class_name")
    if not isinstance(kind, str) or kind not in DIFFUSION:
        raise NarrowsError(f"{kind!r} is not a diffusion model known here.", where=f"{where}: _class_name",
                           remedy=closest(str(kind), list(DIFFUSION)))  # fmt: skip
    if pixels < 16 or pixels % 16:
        raise NarrowsError(f"images of {pixels} px do not divide into patches.", where="pixels", remedy="Give a multiple of 16.")
    try:
        with torch.device("meta"):
            model: nn.Module = getattr(diffusers, str(kind)).from_config(_plain(config, where)).to(_dtype(dtype, where))
    except _BUILD_FAILURES as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NarrowsError(f"diffusers refuses it: {reason}", where=where, remedy="Correct that field.") from error

    def build(step: Step) -> Graph:
        with torch.device("meta"):
            given = DIFFUSION[str(kind)](model.config, int(step.batch[0]), pixels, text)
        floats = {k: _cast(v, _dtype(dtype, where)) for k, v in given.items()}
        return from_module(model, step, floats, name)

    graph = generalize(build, [Step.forward(batch) for batch in (2, 3, 5)])
    note = f"One denoising step at {pixels} px, without a second pass for guidance, text encoders and autoencoder."
    return replace(graph, source=f"diffusers {diffusers.__version__}: {kind}", notes=(*graph.notes, note))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Mapping):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return value.to(dtype) if value.is_floating_point() else value
