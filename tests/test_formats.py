"""Packed models go to files and back without loss, in a layout that other programs read."""

import pytest
import torch
import transformers as hf
from torch import nn

from narrows.capture import capture
from narrows.capture.config import from_config
from narrows.directory import load, read_by_others, save
from narrows.errors import NarrowsError
from narrows.formats import FLOAT_PARTS, PARTS, config_of, from_state, to_state
from narrows.modules.packed_linear import PackedLinear, int4, int8, quantized
from narrows.plan import Plan

IDS = torch.arange(60).view(2, 30)


def plain(tied=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).eval()


def packed(form, tied=False):
    model = plain(tied)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            model.set_submodule(name, PackedLinear.of(quantized(linear.weight, form), linear.bias))
    return model


@pytest.mark.parametrize("form", [int4(64), int4(32), int8()], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_the_state_comes_back_exactly(form, tied):
    model = packed(form, tied)
    tensors = to_state(model)
    back, ours = from_state(tensors, config_of(model)), model.state_dict()
    assert set(ours) - set(back) == ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(t, ours[n]) for n, t in back.items())
    assert len({t.untyped_storage()._cdata for t in tensors.values()}) == len(tensors)


FP8 = "fp8-ptq-e5m2-e4m3-e3m4"
READ_BY_OTHERS = ["bf16", "int8", "awq:group=64", "awq:group=32", FP8]
READ_HERE_ALONE = [
    "zeroquant-4-2-fp6",
    f"{FP8}:format=e3m4",
    "greenformer",
    "llm-drop:attention=1",
    "llm-drop:attention=1 + awq:group=64",
]


def saved(text, tied, out):
    """A model under a plan in fp32, and its directory."""
    plan, data = Plan.parse(text), [{"input_ids": torch.randint(96, (2, 32), generator=torch.Generator().manual_seed(0))}]
    model = plan.apply(plain(tied), data).eval()
    save(model, None, out, plan)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("text", READ_BY_OTHERS)
def test_transformers_loads_the_directory_and_computes_the_same(text, tied, tmp_path):
    """FP8 rounds the inputs there, too."""
    pytest.importorskip("compressed_tensors")
    model = saved(text, tied, tmp_path / "out").float()
    assert read_by_others(tmp_path / "out")
    with torch.no_grad():
        wanted = model(IDS).logits
        theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(IDS).logits
        ours = load(tmp_path / "out", "float32")[0](IDS).logits
    tolerance = 2e-2 if text == "bf16" else 1e-5  # in bf16 the model's own rotary table was rounded, too
    torch.testing.assert_close(theirs, wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("text", READ_HERE_ALONE)
def test_transformers_refuses_what_it_would_fill_with_random_numbers(text, tmp_path):
    model = saved(text, False, tmp_path / "out")
    assert not read_by_others(tmp_path / "out")
    with pytest.raises(ValueError, match="quant_method"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "out")[0](IDS).logits, model(IDS).logits, rtol=1e-6, atol=1e-6)
    plain().save_pretrained(tmp_path / "plain")
    found, predicted = capture(tmp_path / "out"), Plan.parse(text).rewrite(capture(tmp_path / "plain"))
    assert found.ops == predicted.ops


def test_capture_reads_the_config_as_packed():
    model = packed(int4(64))
    graph = from_config({**model.config.to_dict(), **config_of(model)}, "written")
    formats = {op.name.split(".")[-1]: op.weight for op in graph.find("linear")}
    assert (formats["q_proj"].bits, formats["q_proj"].group) == (4, 64)
    assert formats["lm_head"].scale_bits == 0


def test_a_plain_model_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4))
    tensors = to_state(model)
    assert config_of(model) == {} and set(tensors) == {"0.weight", "0.bias"}
    assert from_state(tensors, {}).keys() == tensors.keys()


def test_layers_of_several_formats_come_back_and_config_names_them():
    model = packed(int4(64))
    layer = model.model.layers[0].mlp
    layer.up_proj = PackedLinear.of(quantized(torch.randn(192, 128), int8()))
    tensors, changes = to_state(model), config_of(model)
    back, ours = from_state(tensors, changes), model.state_dict()
    assert all(torch.equal(t, ours[n]) for n, t in back.items())
    config = {**model.config.to_dict(), **changes}
    graph = from_config(config, "written")
    up = [op for op in graph.find("linear") if op.name.endswith("up_proj")]
    assert {op.weight.bits: op.repeat for op in up} == {8: 1, 4: 1}


@pytest.mark.parametrize("part", [p for p in FLOAT_PARTS if p != "input_scale"])
@pytest.mark.parametrize("damage", ["lost", "cut", "kind"])
def test_damaged_fp8_tensors_are_named(part, damage):
    data = [{"input_ids": IDS}]
    model = Plan.parse(FP8).apply(plain(), data)
    tensors, config = to_state(model), config_of(model)
    name = "model.layers.1.mlp.up_proj"
    whole = tensors.pop(f"{name}.{part}")
    if damage != "lost":
        tensors[f"{name}.{part}"] = whole[:-1] if damage == "cut" else whole.to(torch.int8)
    if part == "weight_scale" and damage != "cut":
        state = from_state(tensors, config)  # nothing tells the layer then, or any number is a scale
        assert damage == "kind" or f"{name}.bits8" not in state
        return
    with pytest.raises(NarrowsError, match=name):
        from_state(tensors, config)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", ["lost", "cut", "empty", "wide"])
def test_damaged_tensors_are_named(part, damage):
    model = packed(int4(64))
    tensors, config = to_state(model), config_of(model)
    name = "model.layers.1.mlp.up_proj"
    whole = tensors.pop(f"{name}.{part}")
    if damage != "lost":
        tensors[f"{name}.{part}"] = {"cut": whole[:-1], "empty": whole[:0], "wide": torch.cat([whole, whole])}[damage]
    if part == "weight_packed" and damage == "lost":
        assert f"{name}.packed" not in from_state(tensors, config)  # the reader of the model misses it then
        return
    with pytest.raises(NarrowsError, match=name):
        from_state(tensors, config)


def test_an_unknown_layout_is_refused():
    tensors = to_state(packed(int4(64)))
    with pytest.raises(NarrowsError, match="quantization_config"):
        from_state(tensors, {"quantization_config": {"format": "marlin-24"}})


@pytest.mark.parametrize("form", [int4(18), int8()], ids=str)
def test_sizes_that_do_not_fill_words_come_back_padded(form):
    compressed = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    model = nn.Sequential(PackedLinear.of(quantized(torch.randn(6, 18), form)))
    tensors = to_state(model)
    back, ours = from_state(tensors, config_of(model)), model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in back.items())
    bits = round(form.bits)
    theirs = compressed.unpack_from_int32(tensors["0.weight_packed"], bits, torch.Size((6, 18)))
    assert torch.equal(theirs, model[0].codes.codes.to(torch.int8) - 8 * (bits == 4))
