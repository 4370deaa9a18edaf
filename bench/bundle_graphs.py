"""Write the Graph files that ship with narrows, of models that only transformers and diffusers can build.

    python bench/bundle_graphs.py [NAME ...]

Needs the extras `torch` and `hf`; no weights, no network. Each file is checked against the published number of
parameters. Configs hold the fields of the published config.json that differ from the library's defaults.
"""

import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from narrows.capture.generalize import generalize
from narrows.capture.hf import from_diffusers, from_transformers
from narrows.capture.torch import from_module
from narrows.graph import Graph, Op, Size, at
from narrows.step import Step

MODELS = Path(__file__).parents[1] / "src" / "narrows" / "data" / "models"

# name: published parameters, config, dtype of the published weights
VISION: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet-50": (25_557_032, {"model_type": "resnet", "num_labels": 1000, "dtype": "float32"}),
    "convnext-t": (28_589_128, {"model_type": "convnext", "num_labels": 1000, "dtype": "float32"}),
    "swin-t": (28_288_354, {"model_type": "swin", "num_labels": 1000, "dtype": "float32"}),
}
# name: parameters, pixels, dtype, config
DIFFUSION: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    # 675 M in the paper; diffusers gives each of the 28 blocks its own embedding of step and label
    "dit-xl-2": (749_826_464, 256, "float16", {
        "_class_name": "DiTTransformer2DModel", "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4,
        "out_channels": 8, "num_layers": 28,
        "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False, "activation_fn": "gelu-approximate", "attention_bias": True}),
    "flux.1-dev": (11_901_408_320, 1024, "bfloat16", {
        "_class_name": "FluxTransformer2DModel", "attention_head_dim": 128, "guidance_embeds": True, "in_channels": 64,
        "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38, "patch_size": 1,
        "pooled_projection_dim": 768}),
    "sd3-medium": (2_028_328_000, 1024, "float16", {
        "_class_name": "SD3Transformer2DModel", "attention_head_dim": 64, "caption_projection_dim": 1536, "in_channels": 16,
        "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 24, "out_channels": 16, "patch_size": 2,
        "pooled_projection_dim": 2048, "pos_embed_max_size": 192, "sample_size": 128}),
    "sdxl-unet": (2_567_463_684, 1024, "float16", {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048, "in_channels": 4,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "out_channels": 4,
        "layers_per_block": 2,
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128, "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True}),
}  # fmt: skip
QWEN2_VL: dict[str, Any] = {
    "model_type": "qwen2_vl", "dtype": "bfloat16", "architectures": ["Qwen2VLForConditionalGeneration"],
    "text_config": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14,
                      "spatial_merge_size": 2, "temporal_patch_size": 2},
}  # fmt: skip
SIDE = 32  # patches: an image of 448 px


def qwen2_vl(name: str, config: Mapping[str, Any]) -> Graph:
    """Both towers: an image of 448 px per sequence, read in prefill, and the language model over text and image tokens."""
    import transformers

    text = from_transformers(config, name)
    fields = {k: v for k, v in config.items() if k not in ("model_type", "dtype")}
    with torch.device("meta"):
        settings = transformers.AutoConfig.for_model("qwen2_vl", **fields)
        tower = transformers.Qwen2VLForConditionalGeneration._from_config(settings, dtype=torch.bfloat16).model.visual

    def build(step: Step) -> Graph:
        images = int(step.batch[0])
        patches = images * SIDE * SIDE
        given = {"hidden_states": torch.empty(patches, 3 * 2 * 14 * 14, dtype=torch.bfloat16, device="meta"),
                 "grid_thw": torch.tensor([[1, SIDE, SIDE]] * images),
                 "position_ids": torch.empty(patches, 2, dtype=torch.long, device="meta")}  # fmt: skip
        return from_module(tower, step, given, name)

    vision = generalize(build, [Step.forward(batch) for batch in (2, 3, 5)])
    here = "model.visual."

    def encoded(op: Op) -> Op:
        sizes = dict(op.dims)
        dims = {dim: Size.of(encoded=float(at(s, Step.forward(1)))) if isinstance(s, Size) else s for dim, s in sizes.items()}
        return replace(op, name=here + op.name, dims=dims, inputs=tuple(here + i for i in op.inputs))

    towers = tuple(encoded(op) for op in vision) + tuple(op for op in text if not op.name.startswith(here))
    note = f"Each sequence has one image of {SIDE * 14} px, read in prefill: {SIDE * SIDE // 4} of its tokens."
    return replace(text, ops=towers, notes=(*text.notes, note))


def build(name: str) -> tuple[Graph, int]:
    """A graph by name, and the number of parameters that it must have."""
    if name in VISION:
        parameters, config = VISION[name]
        return from_transformers(config, name), parameters
    if name in DIFFUSION:
        parameters, pixels, dtype, config = DIFFUSION[name]
        return from_diffusers(config, name, pixels, dtype), parameters
    return qwen2_vl(name, QWEN2_VL), 8_291_375_616


def main(names: list[str]) -> int:
    logging.disable(logging.WARNING)
    for name in names or [*VISION, *DIFFUSION, "qwen2-vl-7b"]:
        graph, parameters = build(name)
        flop = sum(float(op.spec.flop(op.sized(Step.forward(1)))) * op.repeat for op in graph)
        if graph.parameters != parameters:
            print(f"{name}: {graph.parameters:,} parameters, not {parameters:,}", file=sys.stderr)
            return 1
        text = graph.to_json() + "\n"
        (MODELS / f"{name}.json").write_text(text, encoding="utf-8")
        print(f"{name}: {graph.parameters:,} parameters, {flop / 1e9:.2f} GFLOP, {len(graph.ops)} ops, {len(text) / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
