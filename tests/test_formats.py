"""Packed models go to files and back without loss, in a layout that other programs read."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import nn

from narrows.capture.config import from_config
from narrows.errors import NarrowsError
from narrows.formats import PARTS, from_state, to_state
from narrows.modules.packed_linear import PackedLinear, int4, int8, quantized

IDS = torch.arange(60).view(2, 30)


def packed(form, tied=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).eval()
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            model.set_submodule(name, PackedLinear.of(quantized(linear.weight, form), linear.bias))
    return model


@pytest.mark.parametrize("form", [int4(64), int4(32), int8()], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_the_state_comes_back_exactly(form, tied):
    model = packed(form, tied)
    tensors, config = to_state(model)
    back, ours = from_state(tensors, config), model.state_dict()
    assert set(ours) - set(back) == ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(t, ours[n]) for n, t in back.items())
    assert len({t.untyped_storage()._cdata for t in tensors.values()}) == len(tensors)


@pytest.mark.parametrize("form", [int4(64), int8()], ids=str)
def test_transformers_loads_the_directory_and_computes_the_same(form, tmp_path):
    pytest.importorskip("compressed_tensors")
    model = packed(form)
    tensors, changes = to_state(model)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_capture_reads_the_config_as_packed():
    model = packed(int4(64))
    graph = from_config({**model.config.to_dict(), **to_state(model)[1]}, "written")
    formats = {op.name.split(".")[-1]: op.weight for op in graph.find("linear")}
    assert (formats["q_proj"].bits, formats["q_proj"].group) == (4, 64)
    assert formats["lm_head"].scale_bits == 0


def test_a_plain_model_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4))
    tensors, config = to_state(model)
    assert config == {} and set(tensors) == {"0.weight", "0.bias"}
    assert from_state(tensors, config).keys() == tensors.keys()


def test_layers_of_several_formats_come_back_and_config_names_them():
    model = packed(int4(64))
    layer = model.model.layers[0].mlp
    layer.up_proj = PackedLinear.of(quantized(torch.randn(192, 128), int8()))
    tensors, changes = to_state(model)
    back, ours = from_state(tensors, changes), model.state_dict()
    assert all(torch.equal(t, ours[n]) for n, t in back.items())
    config = {**model.config.to_dict(), **changes}
    graph = from_config(config, "written")
    up = [op for op in graph.find("linear") if op.name.endswith("up_proj")]
    assert {op.weight.bits: op.repeat for op in up} == {8: 1, 4: 1}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", ["lost", "cut", "empty", "wide"])
def test_damaged_tensors_are_named(part, damage):
    tensors, config = to_state(packed(int4(64)))
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
    tensors, _ = to_state(packed(int4(64)))
    with pytest.raises(NarrowsError, match="quantization_config"):
        from_state(tensors, {"quantization_config": {"format": "marlin-24"}})


def test_outputs_that_do_not_fill_words_are_refused():
    model = nn.Sequential(PackedLinear.of(quantized(torch.randn(6, 32), int4(32))))
    with pytest.raises(NarrowsError, match="6 outputs do not fill"):
        to_state(model)
