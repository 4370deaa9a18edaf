"""config.json to Graph without torch: published sizes, symbolic steps, quantized checkpoints, bad input."""

import contextlib
import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from narrows.capture.config import FAMILIES, bundled, bundled_config, from_config, read_config
from narrows.capture.quantization import DIALECTS
from narrows.errors import NarrowsError
from narrows.graph import BF16, FP8, Graph, Op
from narrows.step import Step

# Parameters, tied ones once: the totals of the published safetensors files. A pair is a value and its tolerance, where
# the source rounds, or counts what a config does not hold.
PUBLISHED: dict[str, int | tuple[float, float]] = {
    "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400, "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "mistral-7b": 7_241_732_096, "mixtral-8x7b": 46_702_792_704, "qwen2.5-7b": 7_615_616_512, "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264, "qwen3-30b-a3b": 30_532_122_624, "qwen3-235b-a22b": 235_093_634_560,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-27b": (27.0e9, 0.005),  # the text model of a file that holds 27,432,406,640 with its vision tower
    "phi-3-mini": 3_821_079_552, "phi-4": 14_659_507_200, "gpt2": 124_439_808, "gpt2-xl": 1_557_611_200,
    "gpt-neox-20b": 20_554_567_680, "opt-13b": 12_853_473_280, "opt-66b": (65.7e9, 0.005), "opt-175b": (175e9, 0.005),
    "bloom-176b": 176_247_271_424, "falcon-7b": 6_921_720_704, "falcon-40b": 41_303_293_952,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": (671_026_419_200, 1e-6),  # the biases that balance the experts are not trained by gradient
    "gpt-oss-20b": 20_914_757_184, "gpt-oss-120b": 116_829_156_672, "olmoe-1b-7b": 6_919_161_856,
    "mamba-2.8b": 2_768_345_600, "mamba2-2.7b": 2_702_599_680, "jamba-v0.1": 51_570_323_328,
    "falcon-h1-7b": (7.59e9, 0.005), "bert-base": 109_514_298, "bert-large": 335_174_458, "modernbert-base": 149_655_232,
    "vit-b-16": 86_567_656, "vit-l-16": 304_326_632, "clip-vit-l-14": 427_616_513, "t5-base": 222_903_552,
    "t5-11b": 11_307_321_344, "whisper-large-v3": 1_543_490_560, "smollm2-135m": 134_515_008, "smollm2-1.7b": 1_711_376_384,
    "all-minilm-l6-v2": 22_713_216, "megatron-530b": (529.6e9, 1e-3), "megatron-1t": (1008e9, 1e-3),
}  # fmt: skip

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
LATENT: dict[str, Any] = {
    **LLAMA,
    "model_type": "deepseek_v3",
    "kv_lora_rank": 256,
    "q_lora_rank": None,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "first_k_dense_replace": 1,
}


def shipped(name: str) -> Graph:
    config = bundled_config(name)
    assert config is not None
    return from_config(config, name)


def flop(op: Op, step: Step) -> float:
    return float(op.spec.flop(op.sized(step))) * op.repeat


def total(graph: Graph, step: Step) -> float:
    return sum(flop(op, step) for op in graph)


def the(graph: Graph, end: str) -> Op:
    """The first op whose name ends so."""
    return next(op for op in graph if op.name.endswith(end))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str) -> None:
    expected = PUBLISHED[name]
    value, tolerance = expected if isinstance(expected, tuple) else (expected, 0)
    assert shipped(name).parameters == pytest.approx(value, rel=tolerance, abs=0)


def test_every_shipped_config_has_a_published_size() -> None:
    assert set(bundled()) == set(PUBLISHED)
    assert bundled_config("no-such-model") is None
    assert bundled_config("../pyproject") is None


def test_files_of_quantized_models_have_their_size() -> None:
    assert shipped("gpt-oss-20b").weight_bytes == pytest.approx(13_761_264_768, rel=1e-4)  # its three safetensors files
    assert shipped("gpt-oss-120b").weight_bytes == pytest.approx(65_248_815_744, rel=1e-4)


def test_reading_takes_no_torch_and_little_time() -> None:
    code = (
        "import sys; from narrows.capture.config import *; [from_config(bundled_config(n), n) for n in bundled()];"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    config = bundled_config("llama-3.1-405b")
    assert config is not None
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        from_config(config, "")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05


def test_a_decoder_by_hand() -> None:
    graph = from_config({**LLAMA, "torch_dtype": "float16"}, "small")
    step = Step.prefill(3, 100)
    layer = 2 * (512 * 512 * 2 + 512 * 128 * 2 + 3 * 512 * 1024)
    matrices = sum(flop(op, step) for op in graph.find("linear"))
    assert matrices == 300 * 2 * layer + 3 * 2 * 512 * 1000  # the head sees the last token of each sequence
    assert sum(flop(op, step) for op in graph.find("attention")) == 2 * 3 * (100 * 101 / 2) * 4 * 512
    held = the(graph, "self_attn.attention")
    assert held.repeat == 2 and held.cache is not None and held.cache.name == "fp16"
    assert held.spec.held(held.sized(step)) == 300 * 2 * (64 + 64)
    assert held.sized(Step.decode(4, 1000))["context"] == 4 * 1001


def test_inputs_name_ops_that_exist() -> None:
    for name in bundled():
        graph = shipped(name)
        names = {op.name for op in graph}
        missing = {i for op in graph for i in op.inputs} - names
        assert not missing, (name, missing)
        assert all(op.tied in names for op in graph if op.tied)


def test_what_training_keeps_is_counted_once() -> None:
    graph = from_config(LLAMA, "small")
    step = Step.train(1, 10)
    kept = sum(op.saved.at(step) * op.repeat if not isinstance(op.saved, int | float) else op.saved for op in graph)
    d, f, kv, heads = 512, 1024, 128, 8
    # norm inputs and outputs, q k v and the attention's result with its log-sum-exp, gate, up and their product
    layer = 2 * (d + d) + (d + 2 * kv + d + 2 * heads) + 3 * f
    assert kept == 10 * (2 * layer + 2 * d)  # the last norm and the head keep one each


def test_a_window_bounds_what_is_read_and_held() -> None:
    graph = from_config({**LLAMA, "model_type": "mistral", "sliding_window": 64}, "windowed")
    op = the(graph, "self_attn.attention")
    assert op.sized(Step.decode(1, 1000)) == {**op.sized(Step.decode(1, 1000)), "pairs": 64, "context": 64, "held": 64}


def test_layers_of_two_kinds_are_written_apart() -> None:
    graph = shipped("gemma-3-27b")
    repeats = {str(op["pairs"]): op.repeat for op in graph.find("attention")}
    assert repeats == {"pairs[window=1024]": 52, "pairs": 10}
    kinds = {op.name: op.repeat for op in shipped("jamba-v0.1")}
    assert sum(op.repeat for op in shipped("jamba-v0.1").find("attention")) == 4 and kinds["model.layers.*.mamba.scan"] in (
        12,
        16,
    )


def test_a_local_encoder_sees_both_sides() -> None:
    config = {
        "model_type": "modernbert",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "local_attention": 8,
    }
    pairs = {op.sized(Step.forward(1, 20))["pairs"] for op in from_config(config, "local").find("attention")}
    near = sum(1 for i in range(20) for j in range(20) if abs(i - j) <= 4)
    assert pairs == {400, near}


def test_latent_attention_expands_in_prefill_and_absorbs_in_decode() -> None:
    graph = from_config(LATENT, "latent")
    op = graph.find("latent_attention")[0]
    rank, wide = 256, 64 + 64
    assert op.repeat == 1  # the dense layer's; the layer with experts has its own
    assert flop(op, Step.prefill(1, 512)) == 2 * 8 * (512 * rank * wide + 512 * 513 / 2 * (wide + 32))
    assert flop(op, Step.decode(1, 4095)) == 2 * 8 * (rank * wide + 4096 * (2 * rank + 32))
    assert op.spec.held(op.sized(Step.decode(1, 4095))) == 4096 * (rank + 32)
    assert any("absorbed" in note for note in graph.notes)


@pytest.mark.parametrize("name", ["t5-base", "whisper-large-v3"])
def test_an_encoder_does_not_run_in_decode(name: str) -> None:
    graph = shipped(name)
    decode = Step.decode(2, 20, source=512)
    encoder = [op for op in graph if ".encoder." in f".{op.name}"]
    assert encoder and total(Graph("", tuple(encoder)), decode) == 0
    assert total(Graph("", tuple(encoder)), Step.prefill(2, 1, source=512)) > 0
    across = next(op for op in graph.find("attention") if "EncDec" in op.name or "encoder_attn" in op.name)
    assert across.sized(decode)["context"] == across.sized(decode)["held"] == 2 * (512 if name == "t5-base" else 1500)


def test_images_do_not_depend_on_tokens() -> None:
    graph = shipped("vit-b-16")
    assert total(graph, Step.forward(2, 1)) == total(graph, Step.forward(2, 500))
    assert total(graph, Step.forward(1)) == pytest.approx(35.1e9, rel=0.01)  # 17.56 G multiply-adds, torchvision's table


def test_arrays_of_steps() -> None:
    graph = shipped("deepseek-v3")
    many = Step.decode([[1], [8], [64]], [[100], [1000], [10_000]])
    each = [total(graph, Step.decode(b, c)) for b, c in ((1, 100), (8, 1000), (64, 10_000))]
    assert sum(op.spec.flop(op.sized(many)) * op.repeat for op in graph) == pytest.approx(each)


def test_a_graph_comes_back_from_json() -> None:
    for name in ("gpt-oss-20b", "t5-base", "falcon-h1-7b"):
        graph = shipped(name)
        assert Graph.from_json(graph.to_json()) == graph


def test_heads_follow_the_architecture() -> None:
    bare = from_config({**LLAMA, "architectures": ["LlamaModel"]}, "")
    assert bare.ops[0].name == "embed_tokens" and not any(op.name == "lm_head" for op in bare)
    scored = from_config(
        {**LLAMA, "architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}, ""
    )
    assert the(scored, "score")["outputs"] == 3
    tied = from_config({**LLAMA, "tie_word_embeddings": True}, "")
    assert the(tied, "lm_head").tied == "model.embed_tokens" and the(tied, "lm_head").parameters == 0


# ---------------------------------------------------------------- quantized checkpoints

# dialect, its fields, and the bytes of a q_proj [512, 512] as it is stored
STORED: list[tuple[str, dict[str, Any], float]] = [
    ("awq", {"bits": 4, "group_size": 128, "zero_point": True}, 512 * 512 / 2 + 512 * 4 * (16 + 4) / 8),
    ("awq", {"w_bit": 4, "q_group_size": 64, "zero_point": False}, 512 * 512 / 2 + 512 * 8 * 2),
    ("gptq", {"bits": 4, "group_size": 128}, 512 * 512 / 2 + 512 * 4 * (16 + 4) / 8),
    ("gptq", {"bits": 8, "group_size": -1}, 512 * 512 + 512 * (16 + 8) / 8),
    ("bitsandbytes", {"load_in_8bit": True}, 512 * 512 + 512 * 4),
    ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 512 * 512 / 2 + 512 * 512 / 64 * 4),
    (
        "bitsandbytes",
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        512 * 512 / 2 + 512 * 512 / 64 * (1 + 4 / 256),
    ),
    ("fp8", {"weight_block_size": [128, 128]}, 512 * 512 + 16 * 4),
    ("fp8", {}, 512 * 512),
    ("torchao", {"quant_type": "int4_weight_only", "quant_type_kwargs": {"group_size": 128}}, 512 * 512 / 2 + 512 * 4 * 4),
    (
        "torchao",
        {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
        512 * 512 + 512 * 2,
    ),
    (
        "compressed-tensors",
        {
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
                }
            }
        },
        512 * 512 / 2 + 512 * 4 * 2,
    ),
    ("mxfp4", {}, 512 * 512 * 2),
]


@pytest.mark.parametrize("method, fields, stored", STORED)
def test_a_dialect_sets_stored_bytes(method: str, fields: dict[str, Any], stored: float) -> None:
    graph = from_config({**LLAMA, "quantization_config": {"quant_method": method, **fields}}, "")
    assert the(graph, "q_proj").stored_bytes == stored
    for name in ("embed_tokens", "lm_head", "input_layernorm"):
        assert the(graph, name).weight == BF16


def test_formats_of_latent_attention_and_experts() -> None:
    config = {**LATENT, "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
    graph = from_config(config, "")
    latent, count = graph.find("latent_attention")[0], 256 * 8 * 128
    assert latent.stored_bytes == count / 2 + count / 256 * 2 * 20 / 8
    assert the(graph, "experts.down_proj").weight != BF16
    assert the(graph, "mlp.gate").weight == BF16  # routers stay as they are
    oss = shipped("gpt-oss-20b")
    assert the(oss, "experts.gate_up_proj").weight is not None and the(oss, "q_proj").weight == BF16


def test_some_layers_may_be_left_out() -> None:
    quantized = {"quant_method": "fp8", "ignored_layers": ["model.layers.1.self_attn", "down_proj"]}
    graph = from_config({**LLAMA, "quantization_config": quantized}, "")
    assert [(op.repeat, op.weight) for op in graph if op.name.endswith("q_proj")] == [(1, FP8), (1, BF16)]
    assert the(graph, "down_proj").weight == BF16 and the(graph, "down_proj").repeat == 2
    assert graph.parameters == from_config(LLAMA, "").parameters


def test_compressed_groups_by_pattern_and_quantized_activations() -> None:
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    group = {"targets": ["re:.*mlp.*"], "weights": weights, "input_activations": {"num_bits": 8, "type": "float"}}
    quantized = {
        "quant_method": "compressed-tensors",
        "config_groups": {"a": group},
        "ignore": ["re:.*down_proj$"],
        "kv_cache_scheme": {"num_bits": 8, "type": "float"},
    }
    graph = from_config({**LLAMA, "quantization_config": quantized}, "")
    up = the(graph, "up_proj")
    assert up.compute == "fp8" and up.weight is not None and up.weight.bits == 8
    assert the(graph, "down_proj").weight == the(graph, "q_proj").weight == BF16
    assert the(graph, "attention").cache == FP8


def test_a_hostile_pattern_is_refused_quickly() -> None:
    for pattern in ("(a+)+$", "(.*)*x", ".*.*.*.*.*.*.*.*x", "(", "a{1,1000}{1,1000}", "(.|.)+x", ".?" * 40 + "x", "x" * 500):
        quantized = {"quant_method": "compressed-tensors", "ignore": [f"re:{pattern}"], "config_groups": {}}
        start = time.perf_counter()
        with pytest.raises(NarrowsError, match=r"pattern|names"):
            from_config({**LLAMA, "quantization_config": quantized}, "")
        assert time.perf_counter() - start < 1


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 0}, "hidden_size"),
    ({"hidden_size": -4096}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": 4096.0}, "hidden_size"),
    ({"hidden_size": 1e30}, "hidden_size"),
    ({"hidden_size": 10**30}, "hidden_size"),
    ({"hidden_size": 10**5000}, "hidden_size"),
    ({"hidden_size": "512"}, "hidden_size"),
    ({"hidden_size": None}, "hidden_size"),
    ({"num_hidden_layers": 10_001}, "num_hidden_layers"),
    ({"num_attention_heads": 6}, "num_attention_heads"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"vocab_size": [1]}, "vocab_size"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ({"hidden_act": "no-such"}, "hidden_act"),
    ({"torch_dtype": "float3"}, "torch_dtype"),
    ({"architectures": ["LlamaForNothing"]}, "architectures"),
    ({"model_type": 3}, "model_type"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
    ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types"),
    ({"model_type": "qwen2", "layer_types": ["full_attention", "half_attention"]}, "layer_types"),
    ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok"),
    ({"model_type": "gemma3", "text_config": 3}, "text_config"),
    ({"model_type": "vit", "image_size": 8, "patch_size": 16}, "patch_size"),
    ({"quantization_config": {"quant_method": "magic"}}, "quant_method"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 7}}, "bits"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 0.5}}, "group_size"),
]


@pytest.mark.parametrize("change, field", WRONG)
def test_a_wrong_field_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(NarrowsError) as caught:
        from_config({**LLAMA, **change}, "", "dir/config.json")
    assert caught.value.where.startswith("dir/config.json: ") and caught.value.where.endswith(field)
    assert caught.value.remedy and len(str(caught.value)) < 400


def test_a_missing_field_is_named() -> None:
    for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "model_type"):
        with pytest.raises(NarrowsError, match=field):
            from_config({k: v for k, v in LLAMA.items() if k != field}, "")


def test_an_unknown_family_says_what_to_install() -> None:
    with pytest.raises(NarrowsError) as caught:
        from_config({"model_type": "lama"}, "")
    assert "narrows[hf]" in caught.value.remedy and "llama" in caught.value.remedy


def test_an_unknown_dialect_names_those_there_are() -> None:
    with pytest.raises(NarrowsError) as caught:
        from_config({**LLAMA, "quantization_config": {"quant_method": "magic"}}, "")
    assert all(name in str(caught.value) for name in DIALECTS)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"hidden_size": 12',
        b"\x00\xff\xfe\x80",
        b"[1, 2]",
        b'{"a": 1, "a": 2}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b"[" * 100_000,
        b'{"a":' * 30 + b"1" + b"}" * 30,
        b'{"a": ' + b"9" * 10_000 + b"}",
        b'"config"',
        b" " * 10_000_001,
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(NarrowsError) as caught:
        read_config(tmp_path)
    assert "config.json" in caught.value.where and time.perf_counter() - start < 2


def test_a_file_and_its_directory_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8-sig")
    assert read_config(tmp_path) == read_config(tmp_path / "config.json") == LLAMA
    with pytest.raises(NarrowsError, match="read"):
        read_config(tmp_path / "absent.json")


def test_the_largest_config_allowed_is_quick() -> None:
    start = time.perf_counter()
    types = ["sliding_attention", "full_attention"] * 5000
    graph = from_config(
        {
            **LLAMA,
            "model_type": "qwen3",
            "num_hidden_layers": 10_000,
            "layer_types": types,
            "sliding_window": 9,
            "use_sliding_window": True,
        },
        "",
    )
    assert sum(op.repeat for op in graph.find("attention")) == 10_000
    assert time.perf_counter() - start < 2


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["auto", "gelu", "re:.*", "re:(", "float32", "nf4", "block", "sliding_attention"]),
    st.lists(st.one_of(st.integers(-2, 200), st.text(max_size=4), st.none()), max_size=4),
    st.dictionaries(st.text(max_size=6), st.integers(-2, 9), max_size=3),
)
QUANTIZED: list[dict[str, Any]] = [{"quant_method": method, **fields} for method, fields, _ in STORED]


def everywhere(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every field of a config, nested ones too."""
    if not isinstance(value, dict):
        return [path]
    return [
        p
        for k, v in value.items()
        for p in ([(*path, k)] if not isinstance(v, dict) else [(*path, k), *everywhere(v, (*path, k))])
    ]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_mutated_config_gives_a_graph_or_the_error(data: st.DataObject) -> None:
    config = copy.deepcopy(bundled_config(data.draw(st.sampled_from(bundled()))))
    assert config is not None
    if data.draw(st.booleans()):
        config["quantization_config"] = copy.deepcopy(data.draw(st.sampled_from(QUANTIZED)))
    for _ in range(data.draw(st.integers(1, 4))):
        path = data.draw(st.sampled_from(everywhere(config)))
        if path == ("num_hidden_layers",) or not path:
            continue
        inner = config
        for key in path[:-1]:
            inner = inner[key]
        if data.draw(st.booleans()):
            inner[path[-1]] = data.draw(JUNK)
        else:
            inner.pop(path[-1], None)
    if data.draw(st.integers(0, 9)) == 0:
        config["model_type"] = data.draw(st.sampled_from(sorted(FAMILIES)))
    try:
        graph = from_config(config, "fuzzed")
    except NarrowsError:
        return
    assert graph.parameters >= 0 and graph.weight_bytes >= 0
    assert total(graph, Step.decode(2, 30, source=5)) >= 0


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 600))
def test_a_mutated_file_gives_a_config_or_the_error(noise: bytes, place: int) -> None:
    from narrows.capture.config import _parse

    text = json.dumps(LLAMA).encode()
    for content in (noise, text[:place], text[:place] + noise + text[place:]):
        with contextlib.suppress(NarrowsError):
            assert isinstance(_parse(content, "config.json"), dict)
