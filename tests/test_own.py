"""Our own int8 technique: rules that say which layer gets which format, tied weights packed once, files that come back."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from narrows.capture.torch import from_module
from narrows.directory import load, save
from narrows.errors import NarrowsError
from narrows.graph import FP32, Graph, Op
from narrows.modules.packed_embedding import PackedEmbedding
from narrows.modules.packed_linear import PackedLinear
from narrows.own import FORMATS, Int8, rules_text
from narrows.plan import Plan
from narrows.step import Step
from narrows.technique import No
from narrows.verify import resident_bytes

IDS = torch.arange(24).view(1, 24)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96}


def llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).eval()


LAYERS = [f"model.layers.{i}.{kind}" for i in range(12) for kind in ("self_attn.q_proj", "mlp.down_proj")] + ["lm_head"]


@given(st.lists(st.sampled_from(sorted(FORMATS)), min_size=len(LAYERS), max_size=len(LAYERS)))
def test_rules_give_every_layer_the_format_that_was_chosen(chosen: list[str]) -> None:
    formats = dict(zip(LAYERS, chosen, strict=True))
    technique = Int8(but=rules_text(formats))
    assert {layer: technique.format_of(layer) for layer in LAYERS} == {layer: FORMATS[f] for layer, f in formats.items()}
    assert Plan.parse(str(Plan((technique,)))) == Plan((technique,))


def test_a_kind_of_layer_that_is_alike_everywhere_takes_one_rule() -> None:
    formats = {layer: "plain" if "q_proj" in layer else "int8" for layer in LAYERS}
    assert rules_text(formats) == "self_attn.q_proj:plain"


@pytest.mark.parametrize("text", ["down_proj", "down_proj:int9", "down_proj@x:int8", "a b:int8", "@1:int8"])
def test_a_rule_that_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(NarrowsError, match="int8: but"):
        Int8(but=text)


def test_tied_weights_are_packed_once_and_shared() -> None:
    model = Int8().apply(llama())
    head, embedding = model.lm_head, model.model.embed_tokens
    assert isinstance(head, PackedLinear) and isinstance(embedding, PackedEmbedding)
    assert torch.equal(embedding(IDS), head.codes.weight()[IDS])
    assert [n for n in model.state_dict() if "lm_head" in n or "embed" in n] == ["lm_head.packed", "lm_head.scales"]
    norms = sum(p.nbytes for p in model.parameters())
    linear = 64 * 64 * 4 + 64 * 128 * 3
    scales = 2 * (3 * (4 * 64 + 2 * 128 + 64) + 96)
    rotation = sum(b.nbytes for n, b in model.named_buffers() if "inv_freq" in n)
    assert resident_bytes(model) == 3 * linear + 96 * 64 + scales + norms + rotation
    assert model.to(torch.bfloat16).model.embed_tokens(IDS).dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("but", ["", "down_proj@0-1:int4g32;q_proj:plain", "lm_head:plain"])
def test_a_saved_plan_comes_back_and_other_programs_read_it(tmp_path: Path, tied: bool, but: str) -> None:
    plan = Plan((Int8(but),))
    model = plan.apply(llama(tied))
    save(model, None, tmp_path / "out", plan)
    again, _ = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)
        if "int4" in but:
            return  # transformers 5.23 reads one format a model, vLLM several
        pytest.importorskip("compressed_tensors")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_folded_layer_is_split_by_its_formats() -> None:
    graph = from_module(llama(), Step.forward(1, 24))
    changed = Int8("down_proj@0/2:int4g32;lm_head:plain").rewrite(graph)
    down = {op.weight: op.repeat for op in changed.find("linear") if op.name.endswith("down_proj")}
    assert down == {FORMATS["int4g32"]: 2, FORMATS["int8"]: 1}
    head = next(op for op in changed if op.name == "lm_head")
    assert head.weight == FP32 and head.tied == "model.embed_tokens"


def test_what_does_not_pack_is_refused() -> None:
    step = Step.forward(1, 8)
    odd = Graph("odd", (Op("fc", "linear", {"rows": 8, "inputs": 65, "outputs": 64}, act=FP32, weight=FP32),))
    assert "65 inputs" in str(Int8("fc:int4g32").check(odd, None, step))
    assert Int8().check(odd, None, step) is True
    tied = Int8("lm_head:int4g32").check(from_module(llama(), step), None, step)
    assert isinstance(tied, No) and "shares its weights" in tied.reason
    packed = from_module(Int8().apply(llama()), step)
    assert isinstance(Int8().check(packed, None, step), No)
    broken = llama()
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NarrowsError, match=r"layers\.1\.mlp\.up_proj"):
        Int8().apply(broken)
    assert all(type(m) is not PackedLinear for m in broken.modules()), "it is refused before anything changes"


@pytest.mark.parametrize("form", ["int8", "int4g32"])
def test_an_embedding_with_weights_of_its_own_is_packed_where_a_rule_names_it(tmp_path: Path, form: str) -> None:
    plan = Plan((Int8(f"embed_tokens:{form}"),))
    model = plan.apply(llama(tied=False))
    embedding = model.model.embed_tokens
    assert isinstance(embedding, PackedEmbedding) and torch.equal(embedding(IDS), embedding.rows.codes.weight()[IDS])
    step = Step.forward(1, 24)
    changed = plan.rewrite(from_module(llama(tied=False), step))
    assert changed.weight_bytes == from_module(model, step).weight_bytes
    save(model, None, tmp_path / "out", plan)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")[0](IDS).logits, model(IDS).logits)
    assert isinstance(Int8("*:int4g32").apply(llama(tied=False)).model.embed_tokens, torch.nn.Embedding)
    tied = plan.check(from_module(llama(), step), None, step)
    assert isinstance(tied, No) and "no plain weights of its own" in tied.reason


def test_compensated_rounding_needs_data_that_reaches_its_layers() -> None:
    data = [{"input_ids": torch.randint(96, (1, 64), generator=torch.Generator().manual_seed(i))} for i in range(8)]
    technique = Int8("down_proj:int4g64", compensate=True)
    with torch.no_grad():
        truth = torch.cat([llama()(**batch).logits for batch in data])
        off = [
            (torch.cat([model(**batch).logits for batch in data]) - truth).norm()
            for model in (Int8(technique.but).apply(llama()), technique.apply(llama(), data))
        ]
    assert off[1] < 0.9 * off[0]
    with pytest.raises(NarrowsError, match="no calibration data"):
        technique.apply(llama())
