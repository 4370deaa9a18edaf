"""AWQ finds the layers it can scale, leaves others alone with a reason, and rounds better than without its search."""

import copy
import re

import pytest
import torch
import transformers as hf

from narrows.capture import capture
from narrows.capture.torch import from_module
from narrows.cost import total
from narrows.errors import NarrowsError
from narrows.modules.packed_linear import PackedLinear, int4
from narrows.plan import Plan, parse
from narrows.step import Step
from narrows.technique import No
from narrows.techniques.quantization.awq import AWQ

DECODE = Step.decode(1, context=32)
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
SCALABLE = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES)),
    "llama, grouped queries": (hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES, num_key_value_heads=2)),
    "qwen2, biases": (hf.Qwen2ForCausalLM, hf.Qwen2Config(**SIZES, num_key_value_heads=4)),
    "qwen3, norms of queries": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32)),
    "gemma, 1 + weight": (hf.GemmaForCausalLM, hf.GemmaConfig(**SIZES, pad_token_id=0, num_key_value_heads=4, head_dim=32)),
    "gemma2, norms after": (hf.Gemma2ForCausalLM, hf.Gemma2Config(**SIZES, pad_token_id=0, num_key_value_heads=4, head_dim=32)),
}


def made(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, [{"input_ids": torch.randint(100, (2, 64))}]


def logits(model, data):
    with torch.no_grad():
        return model(**data[0]).logits


@pytest.mark.parametrize("family", SCALABLE)
def test_scales_leave_the_function_and_the_square_commutes(family):
    model, data = made(*SCALABLE[family])
    before, weights = logits(model, data), copy.deepcopy(model.state_dict())
    graph = from_module(model, DECODE)
    technique = AWQ()
    assert technique.check(graph, None, DECODE) is True
    scaled, _ = technique.scaled(model, data)
    assert any(not torch.equal(t, weights[n]) for n, t in scaled.state_dict().items())
    assert (logits(scaled, data) - before).abs().max() <= 1e-5 * before.abs().max()
    packed = technique.apply(scaled, data)
    assert isinstance(packed.model.layers[1].mlp.down_proj, PackedLinear)
    assert total(technique.rewrite(graph), DECODE) == total(from_module(packed, DECODE), DECODE)


@pytest.mark.parametrize(
    "kind, config, reason",
    [
        (
            hf.CohereForCausalLM,
            hf.CohereConfig(**SIZES, pad_token_id=0, eos_token_id=1),
            "no norm before its attention or its MLP",
        ),
        (hf.Olmo2ForCausalLM, hf.Olmo2Config(**SIZES, eos_token_id=1), "no norm before its attention or its MLP"),
        (hf.MixtralForCausalLM, hf.MixtralConfig(**SIZES), "no plain linear layer mlp.gate_proj"),
        (hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES | {"hidden_size": 192}), "192 inputs are no multiple of .*; group=64 fits"),
    ],
)
def test_refusals_name_their_figure_and_leave_the_model(kind, config, reason):
    model, data = made(kind, config)
    weights = copy.deepcopy(model.state_dict())
    verdict = AWQ().check(from_module(model, DECODE), None, DECODE)
    assert isinstance(verdict, No) and re.search(reason, verdict.reason)
    with pytest.raises(NarrowsError, match=reason):
        AWQ().apply(model, data)
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())


def test_a_norm_that_feeds_others_too_is_refused_before_anything_changes():
    model, data = made(*SCALABLE["llama"])
    layer = model.model.layers[1]
    layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: (layer.input_layernorm(args[0]),))
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(NarrowsError, match=r"no norm feeds .*v_proj alone"):
        AWQ().apply(model, data)
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())


def test_without_data_there_is_no_search():
    model, _ = made(*SCALABLE["llama"])
    with pytest.raises(NarrowsError, match="calibration data"):
        AWQ().apply(model, [])
    assert isinstance(AWQ().baseline().apply(model, []).model.layers[0].self_attn.q_proj, PackedLinear)


def test_the_search_rounds_better_where_channels_stand_out():
    model, data = made(*SCALABLE["llama"])
    with torch.no_grad():
        for layer in model.model.layers:  # a few channels a hundred times as large as the rest, as in large models
            layer.input_layernorm.weight[:4] *= 100
            layer.self_attn.q_proj.weight[:, :4] /= 20
    truth = logits(model, data)
    tried = (AWQ(), AWQ(clip=False), AWQ().baseline())
    errors = {t: (logits(t.apply(copy.deepcopy(model), data), data) - truth).norm() for t in tried}
    assert errors[AWQ()] < 0.8 * errors[AWQ().baseline()]
    assert errors[AWQ(clip=False)] < 0.8 * errors[AWQ().baseline()]


def test_bf16_models_are_packed_from_bf16():
    model, data = made(*SCALABLE["llama"])
    truth = logits(model, data)
    found = logits(AWQ(group=32).apply(model.bfloat16(), data), data)
    assert found.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(found.float().flatten(), truth.flatten(), dim=0) > 0.9


def test_heads_and_embeddings_stay():
    graph = capture("llama-2-7b")
    changed = AWQ().rewrite(graph)
    same = {op.name for op, new in zip(graph, changed, strict=True) if op == new and op.weight}
    assert {"lm_head", "model.embed_tokens", "model.norm"} <= same
    packed = [op for op in changed if op.weight == int4(128)]
    assert len(packed) == 7 and all(op.repeat == 32 for op in packed)
    assert 3.3 < graph.weight_bytes / changed.weight_bytes < 3.5


def test_packed_layers_are_not_packed_again():
    changed = AWQ().rewrite(capture("llama-2-7b"))
    assert not AWQ().check(changed, None, DECODE)


def test_widths_that_no_group_divides():
    verdict = AWQ(group=32)._fits({f"b.{n}": (40, 40) for n in ("self_attn.q_proj",)}, {"b.input_layernorm"})
    assert isinstance(verdict, No) and "self_attn.k_proj" in verdict.reason


def test_its_text_rebuilds_it():
    assert str(Plan((AWQ(group=64, clip=False),))) == "awq:group=64,clip=False"
    assert all(parse(str(Plan((t,)))) == t for t in (*AWQ.space(), AWQ().baseline()))  # type: ignore[arg-type]


def test_a_blank_model_gets_the_same_structure():
    model, data = made(*SCALABLE["qwen2, biases"])
    with torch.device("meta"):
        blank = AWQ().restructure(type(model)(model.config))
    packed = AWQ().apply(model, data)
    assert {n: t.shape for n, t in blank.state_dict().items()} == {n: t.shape for n, t in packed.state_dict().items()}
