"""The same model read from its config and traced as a module gives the same parameters, bytes and FLOP."""

import re
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from narrows.capture.config import from_config  # noqa: E402
from narrows.capture.torch import from_module  # noqa: E402
from narrows.graph import Graph  # noqa: E402
from narrows.step import Step  # noqa: E402

DENSE: dict[str, Any] = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 4, "intermediate_size": 2816}
WORDS: dict[str, Any] = {**DENSE, "vocab_size": 8192}
GROUPED: dict[str, Any] = {**WORDS, "num_key_value_heads": 4}
LATENT: dict[str, Any] = {
    **WORDS,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "first_k_dense_replace": 1,
}
OPT: dict[str, Any] = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_hidden_layers": 4,
    "ffn_dim": 4096,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
}
FALCON: dict[str, Any] = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 4, "vocab_size": 8192}
T5: dict[str, Any] = {"d_model": 1024, "d_kv": 64, "num_heads": 16, "num_layers": 3, "d_ff": 2816, "vocab_size": 8192}

# family and fields; the first of `architectures`, where given, is the class that is built
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "llama, biased and tied": (
        "llama",
        {**GROUPED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 32},
    ),
    "llama, no head": ("llama", {**GROUPED, "architectures": ["LlamaModel"]}),
    "mistral": ("mistral", {**GROUPED, "sliding_window": 16}),
    "qwen2": ("qwen2", GROUPED),
    "qwen2, windows": ("qwen2", {**GROUPED, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 128}),
    "gemma2": ("gemma2", {**GROUPED, "head_dim": 128, "sliding_window": 16}),
    "gemma3_text": ("gemma3_text", {**GROUPED, "num_hidden_layers": 7, "head_dim": 128, "sliding_window": 16}),
    "phi3": ("phi3", {**GROUPED, "pad_token_id": 0}),
    "gpt2": ("gpt2", {"n_embd": 1024, "n_head": 16, "n_layer": 4, "vocab_size": 8192}),
    "gpt_neox": ("gpt_neox", WORDS),
    "gpt_neox, in sequence": ("gpt_neox", {**WORDS, "use_parallel_residual": False}),
    "opt": ("opt", OPT),
    "opt, norms after": ("opt", {**OPT, "word_embed_proj_dim": 512, "do_layer_norm_before": False}),
    "bloom": ("bloom", {"hidden_size": 1024, "n_head": 16, "n_layer": 4, "vocab_size": 8192}),
    "falcon, one key head": ("falcon", FALCON),
    "falcon, two norms": ("falcon", {**FALCON, "num_kv_heads": 4, "new_decoder_architecture": True}),
    "falcon, in sequence": ("falcon", {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True}),
    "mixtral": ("mixtral", {**GROUPED, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        {**GROUPED, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 512, "mlp_only_layers": [1]},
    ),
    "olmoe": ("olmoe", {**GROUPED, "num_experts": 8, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", {**GROUPED, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 64, "sliding_window": 16}),
    "deepseek_v2": ("deepseek_v2", {**LATENT, "q_lora_rank": None}),
    "deepseek_v3": ("deepseek_v3", {**LATENT, "q_lora_rank": 384, "n_group": 2, "topk_group": 1}),
    "mamba": ("mamba", {"hidden_size": 1024, "num_hidden_layers": 4, "vocab_size": 8192, "state_size": 16}),
    "mamba2": (
        "mamba2",
        {"hidden_size": 1024, "num_hidden_layers": 4, "vocab_size": 8192, "num_heads": 32, "n_groups": 2, "state_size": 64},
    ),
    "jamba": (
        "jamba",
        {
            **GROUPED,
            "num_hidden_layers": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
        },
    ),
    "falcon_h1": ("falcon_h1", {**GROUPED, "mamba_d_ssm": 2048, "mamba_n_heads": 32, "mamba_d_head": 64, "mamba_d_state": 64}),
    "bert": ("bert", {**WORDS, "architectures": ["BertForMaskedLM"]}),
    "bert, no head": ("bert", {**WORDS, "architectures": ["BertModel"]}),
    "modernbert": (
        "modernbert",
        {**WORDS, "vocab_size": 50368, "local_attention": 32, "architectures": ["ModernBertForMaskedLM"]},
    ),
    "vit": ("vit", {**DENSE, "architectures": ["ViTForImageClassification"], "num_labels": 10}),
    "vit, no head": ("vit", {**DENSE, "architectures": ["ViTModel"]}),
    "clip": (
        "clip",
        {
            "architectures": ["CLIPModel"],
            "projection_dim": 512,
            "text_config": {**DENSE, "vocab_size": 49408, "max_position_embeddings": 128, "projection_dim": 512},
            "vision_config": {**DENSE, "image_size": 224, "patch_size": 32},
        },
    ),
    "t5": ("t5", {**T5, "architectures": ["T5ForConditionalGeneration"]}),
    "t5, gated": ("t5", {**T5, "feed_forward_proj": "gated-gelu", "architectures": ["T5ForConditionalGeneration"]}),
    "t5, encoder": ("t5", {**T5, "architectures": ["T5EncoderModel"]}),
    "whisper": (
        "whisper",
        {
            "d_model": 1024,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 16,
            "decoder_attention_heads": 16,
            "encoder_ffn_dim": 2816,
            "decoder_ffn_dim": 2816,
            "vocab_size": 51866,
            "architectures": ["WhisperForConditionalGeneration"],
        },
    ),
}

# parameters that are not the weight of a module of their own: the op that holds them has a name of its own
GATHERED = re.compile(
    r"A_log|\.D$|dt_bias|cls_token|class_embedding|position_embedding|experts\.\w+_bias$|^cls\.predictions|^decoder(\.bias)?$"
)


def build(case: str) -> tuple[Any, Graph]:
    """The module on the meta device, in bf16, and the graph of the same config."""
    family, fields = CASES[case]
    config = transformers.AutoConfig.for_model(family, **fields)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            named = fields.get("architectures")
            model = getattr(transformers, named[0])(config) if named else transformers.AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval(), from_config({"model_type": family, **fields}, case)


def steps(case: str) -> list[Step]:
    """A plain forward pass and a prefill; CLIP compares every image with every text, which only batch 1 has in common."""
    batch = 1 if case == "clip" else 2
    source = 80 if case.startswith("t5") and "encoder" not in case else 0
    # transformers' encoder-decoders give the logits of all tokens, a serving engine of the last: alike for one token
    prompt = 1 if case.startswith(("t5", "whisper")) else 96
    return [Step.forward(batch, 96, source), Step.prefill(batch, prompt, source=source)]


# what a serving engine does otherwise than transformers: latent attention is absorbed, keys are kept once per group
SERVED = {"deepseek_v2", "deepseek_v3", "falcon, two norms"}
DECODERS = [
    c for c in CASES if not c.startswith(("bert", "modernbert", "vit", "clip")) and "no head" not in c and c != "t5, encoder"
]


def kept(graph: Graph, step: Step) -> float:
    """Elements of keys, values and states after a step."""
    return sum(float(op.spec.held(op.sized(step))) * op.repeat for op in graph)


def flop(graph: Graph, step: Step, matrices: bool) -> float:
    return sum(float(op.spec.flop(op.sized(step))) * op.repeat for op in graph if op.spec.matmul or not matrices)


@pytest.mark.parametrize("case", CASES)
def test_a_config_and_its_module_agree(case: str) -> None:
    model, graph = build(case)
    owned = list(model.parameters())  # tied ones once
    assert graph.parameters == sum(p.numel() for p in owned)
    assert graph.weight_bytes == sum(p.numel() * p.element_size() for p in owned)
    for step in steps(case):
        traced = from_module(model, step, name=case)
        assert traced.parameters == graph.parameters
        assert traced.weight_bytes == graph.weight_bytes
        assert flop(graph, step, True) == pytest.approx(flop(traced, step, True), rel=1e-9)
        assert flop(graph, step, False) == pytest.approx(flop(traced, step, False), rel=1e-3)


@pytest.mark.parametrize("case", [c for c in DECODERS if c not in SERVED])
def test_a_decode_step_agrees(case: str) -> None:
    model, graph = build(case)
    step = Step.decode(2, 40, source=80 if case.startswith("t5") else 0)
    traced = from_module(model, step, name=case)
    assert flop(graph, step, True) == pytest.approx(flop(traced, step, True), rel=1e-9)
    assert kept(graph, step) == kept(traced, step)


@pytest.mark.parametrize("case", CASES)
def test_ops_carry_the_names_of_modules(case: str) -> None:
    model, graph = build(case)
    modules = {re.sub(r"\.\d+\.", ".*.", re.sub(r"\.(weight|bias)$", "", name), count=1) for name, _ in model.named_parameters()}
    ops = {op.name for op in graph if op.weight is not None and not op.tied}
    assert {name for name in modules if not GATHERED.search(name)} <= ops
    assert {name for name in ops if not GATHERED.search(name)} - modules <= {
        "vit.embeddings",
        "embeddings",
        "vision_model.embeddings",
    }
