"""Models as gguf files: transformers computes the same from them, and what has no place in gguf is refused."""

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from narrows.directory import load, read_header
from narrows.errors import NarrowsError
from narrows.gguf_file import save_gguf
from narrows.plan import Plan

IDS = torch.arange(60).view(2, 30)
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 96, "num_attention_heads": 4}
FAMILIES = {"llama": (hf.LlamaForCausalLM, hf.LlamaConfig), "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config)}


def tiny(family="llama", **changes):
    torch.manual_seed(0)
    kind, config = FAMILIES[family]
    return kind(config(**{**SIZES, "num_key_value_heads": 2, **changes})).eval()


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text, kind, bits", [("int8", "Q8_0", 8.5), ("awq:group=64", "Q4_1", 5), ("bf16", "BF16", 16)])
def test_transformers_and_we_read_back_the_same_numbers(text, kind, bits, family, tied, tmp_path):
    plan = Plan.parse(text)
    model = plan.apply(tiny(family, tie_word_embeddings=tied, vocab_size=259), [{"input_ids": IDS}])
    out = tmp_path / "model.gguf"
    assert save_gguf(model, bpe(), out, plan) == out.stat().st_size
    found = read_header(out)["blk.1.ffn_up.weight"]
    assert (found.dtype, found.shape, found.end - found.begin) == (kind, (192, 128), 192 * 128 * bits / 8)
    with torch.no_grad():
        wanted = model.float()(IDS).logits
        theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=out.name, dtype=torch.float32)(IDS).logits
        ours = load(out)[0](IDS).logits
    tolerance = 2e-2 if text == "bf16" else 1e-5  # in bf16 the model's own rotary table was rounded, too
    torch.testing.assert_close(theirs, wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("text", ["bf16", "int8", "awq:group=64"])
def test_llama_cpp_computes_the_same(text, tmp_path, monkeypatch):
    """It rounds the inputs of packed layers to 8 bits. Its AMX buffers end the process on some virtual machines."""
    llama = pytest.importorskip("llama_cpp")
    defaults = llama.llama_cpp.llama_model_default_params

    def plain():
        params = defaults()
        params.use_extra_bufts = False
        return params

    monkeypatch.setattr(llama.llama_cpp, "llama_model_default_params", plain)
    plan, tokenizer, prose = Plan.parse(text), bpe(), "the tether"
    model = plan.apply(tiny(vocab_size=len(tokenizer)), [{"input_ids": IDS}])
    save_gguf(model, tokenizer, tmp_path / "model.gguf", plan)
    reader = llama.Llama(str(tmp_path / "model.gguf"), logits_all=True, verbose=False, n_threads=1)
    ids = reader.tokenize(prose.encode(), add_bos=False)
    assert ids == tokenizer(prose)["input_ids"]
    reader.eval(ids)
    with torch.no_grad():
        wanted = model.float()(torch.tensor([ids])).logits[0]
    assert torch.cosine_similarity(torch.tensor(reader.scores[: len(ids)]), wanted, dim=-1).min() > 0.999


def bpe(**changes):
    tokens = ["<end>", *pre_tokenizers.ByteLevel.alphabet(), "th", "the"]
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[("t", "h"), ("th", "e")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<end>"])
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", **changes)


def test_the_tokenizer_goes_with_it(tmp_path):
    tokenizer = bpe()
    save_gguf(tiny(vocab_size=len(tokenizer)), tokenizer, tmp_path / "model.gguf", Plan())
    again = load(tmp_path / "model.gguf")[1]
    for prose in ("the tether", "Größe 42!"):
        assert again(prose)["input_ids"] == tokenizer(prose)["input_ids"]
    assert again.eos_token_id == tokenizer.eos_token_id == 0


def test_what_has_no_place_in_gguf_is_refused_and_nothing_is_left(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    data = [{"input_ids": IDS}]
    cases = [
        (nn.Linear(2, 2), None, "is not exported to gguf"),
        (tiny(attention_bias=True), None, "llama with these parts"),
        (tiny(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), None, "positions are scaled"),
        (Plan.parse("llm-drop:attention=1").apply(tiny(), data), None, "a structure that gguf has no words for"),
        (Plan.parse("zeroquant-4-2-fp6").apply(tiny()), None, "a structure that gguf has no words for"),
        (Plan.parse("fp8-ptq-e5m2-e4m3-e3m4").apply(tiny(), data), None, r"q_proj\.bits8: has no place in gguf"),
        (Plan.parse("int8").apply(tiny(hidden_size=80)), None, "80 inputs in groups of all are no blocks of 32"),
        (tiny(), hf.PreTrainedTokenizerFast(tokenizer_object=words), "no byte-level BPE"),
    ]
    for model, tokenizer, reason in cases:
        with pytest.raises(NarrowsError, match=reason):
            save_gguf(model, tokenizer, tmp_path / "out.gguf", Plan())
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_stays_unless_it_is_to_be_overwritten(tmp_path, monkeypatch):
    out = tmp_path / "model.gguf"
    out.write_text("mine")
    with pytest.raises(NarrowsError, match="there already"):
        save_gguf(tiny(), None, out, Plan())
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(NarrowsError, match="no space"):
            save_gguf(tiny(), None, out, Plan(), overwrite=True)
    assert out.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
    save_gguf(tiny(), None, out, Plan(), overwrite=True)
    assert read_header(out) and [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
