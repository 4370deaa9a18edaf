"""LLM-Drop: which sublayers go, what is left of graph, cache and config, and what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import (
    FalconConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
)

from narrows.capture import capture
from narrows.capture.torch import from_module
from narrows.cost import total
from narrows.errors import NarrowsError
from narrows.footprint import footprint
from narrows.graph import FP32, Graph, Op, Size
from narrows.plan import Plan
from narrows.step import Step
from narrows.techniques.sparsity_pruning.llm_drop import LLMDrop, drop, layout, similarities

TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
TOKENS = Size.of(tokens=1)


def _layer(repeat: int) -> Graph:
    """A stack of layers by hand: norm, attention, add, norm, MLP, add."""

    def linear(name: str, x: str, inputs: int, outputs: int) -> Op:
        dims = {"rows": TOKENS, "inputs": inputs, "outputs": outputs}
        return Op(f"layers.*.{name}", "linear", dims, FP32, FP32, inputs=(x,), repeat=repeat)

    def norm(name: str, x: str) -> Op:
        return Op(f"layers.*.{name}", "norm", {"rows": TOKENS, "width": 8}, FP32, FP32, inputs=(x,), repeat=repeat)

    def add(name: str, *x: str) -> Op:
        dims = {"elements": TOKENS * 8, "reads": TOKENS * 16}
        return Op(f"layers.*.{name}", "elementwise", dims, FP32, inputs=x, repeat=repeat)

    seen = {"queries": TOKENS, "pairs": Size.of(pairs=1), "context": Size.of(context=1), "held": Size.of(held=1)}
    attend = Op("layers.*.self_attn", "attention", {"heads": 2, "kv_heads": 2, "head_dim": 4, "value_dim": 4, **seen},
                FP32, cache=FP32, inputs=("layers.*.self_attn.q_proj",), repeat=repeat)  # fmt: skip
    return Graph("stack", (
        norm("input_layernorm", "embed"), linear("self_attn.q_proj", "layers.*.input_layernorm", 8, 8), attend,
        linear("self_attn.o_proj", "layers.*.self_attn", 8, 8), add("add", "embed", "layers.*.self_attn.o_proj"),
        norm("post_attention_layernorm", "layers.*.add"), linear("mlp.up", "layers.*.post_attention_layernorm", 8, 32),
        linear("mlp.down", "layers.*.mlp.up", 32, 8), add("add_2", "layers.*.add", "layers.*.mlp.down"),
    ))  # fmt: skip


def test_a_graph_before_and_after() -> None:
    after = LLMDrop(attention=2, mlp=1).rewrite(_layer(5))
    gone = {"input_layernorm": 3, "self_attn.q_proj": 3, "self_attn": 3, "self_attn.o_proj": 3, "add": 3,
            "post_attention_layernorm": 4, "mlp.up": 4, "mlp.down": 4, "add_2": 4}  # fmt: skip
    assert {op.name.removeprefix("layers.*."): op.repeat for op in after} == gone


def test_first_layers_that_read_another_input_stay() -> None:
    graph = _layer(4)
    first = replace(graph.ops[0], repeat=1, inputs=("tokens",))
    after = LLMDrop(attention=2).rewrite(replace(graph, ops=(first, replace(graph.ops[0], repeat=3), *graph.ops[1:])))
    assert [op.repeat for op in after.ops[:2]] == [1, 1]


def test_config_graphs_lose_cache_and_weights_in_proportion() -> None:
    graph, step = capture("llama-3.1-8b"), Step.decode(4, 4096)
    after = LLMDrop(attention=8).rewrite(graph)
    assert LLMDrop(attention=8).check(graph, None, step) is True
    assert footprint(after, step).kv_bytes == footprint(graph, step).kv_bytes * 24 / 32
    assert graph.parameters - after.parameters == 8 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 4096)


@pytest.mark.parametrize("name", ["gpt2", "falcon-7b", "bert-base", "gemma-2-9b"])
def test_graphs_that_are_refused(name: str) -> None:
    reason = "differs" if name == "gemma-2-9b" else "known names"
    verdict = LLMDrop().check(capture(name), None, Step.forward(1, 64))
    assert not verdict
    assert reason in str(verdict)


def test_more_than_there_is_is_refused() -> None:
    verdict = LLMDrop(attention=5).check(_layer(5), None, Step.decode())
    assert not verdict and "5 attention sublayers, and 5 are to go" in str(verdict)
    assert not LLMDrop(attention=0).check(_layer(5), None, Step.decode())
    with pytest.raises(NarrowsError, match="is not possible"):
        LLMDrop(attention=-1)


@pytest.mark.parametrize("step", [Step.decode(2, 16), Step.prefill(2, 16), Step.forward(2, 16)])
def test_the_square_commutes_in_every_phase(step: Step) -> None:
    plan, example = LLMDrop(attention=2, mlp=1), LLMDrop.example()
    predicted = total(plan.rewrite(from_module(example.model, step)), step)
    assert total(from_module(plan.apply(example.model, example.data), step), step) == predicted


def test_the_square_holds_for_layers_with_norms_on_both_sides() -> None:
    config = Gemma2Config(**TINY, layer_types=["full_attention"] * 4)
    model, step = Gemma2ForCausalLM(config).eval(), Step.prefill(1, 8)
    data = [{"input_ids": torch.arange(8)[None]}]
    predicted = total(LLMDrop(1, 2).rewrite(from_module(model, step)), step)
    found = total(from_module(LLMDrop(1, 2).apply(model, data), step), step)
    assert (found.flop, found.weight_bytes, found.cache_bytes) == (predicted.flop, predicted.weight_bytes, predicted.cache_bytes)


def test_the_sublayer_that_adds_nothing_is_the_one_to_go() -> None:
    example = LLMDrop.example()
    with torch.no_grad():
        example.model.model.layers[3].self_attn.o_proj.weight.zero_()
        before = example.model(**example.data[0]).logits
        scores = similarities(example.model, example.data)
        assert scores["attention"][3] == pytest.approx(1.0) == max(scores["attention"])
        after = LLMDrop(attention=1).apply(example.model, example.data)(**example.data[0]).logits
    assert example.model.config.drop_attn_list == [3]
    torch.testing.assert_close(before, after)


def test_generation_with_a_cache_equals_generation_without() -> None:
    model = LLMDrop.example().model
    drop(model, {"attention": [0, 2], "mlp": [1]})
    ids = torch.arange(5)[None] + 1
    kept = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0)
    assert torch.equal(kept, model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False, pad_token_id=0))
    cache = model(input_ids=ids, use_cache=True).past_key_values
    assert sum(layer.is_initialized for layer in cache.layers) == 4
    assert cache.get_seq_length() == 5


def test_a_saved_model_comes_back(tmp_path) -> None:
    example = LLMDrop.example()
    model = LLMDrop(attention=2, mlp=1).apply(example.model, example.data)
    blank = LlamaForCausalLM(copy.deepcopy(model.config))
    again = LLMDrop(attention=2, mlp=1).restructure(blank)
    assert again.load_state_dict(model.state_dict()).missing_keys == []
    assert torch.equal(again.eval()(**example.data[0]).logits, model(**example.data[0]).logits)


@pytest.mark.parametrize("wrong", [[9], [-1], ["a"], 3, [True]])
def test_a_damaged_list_is_named(wrong: object) -> None:
    model = LLMDrop.example().model
    model.config.drop_attn_list = wrong
    with pytest.raises(NarrowsError, match="drop_attn_list"):
        LLMDrop().restructure(model)


def test_training_goes_on_and_layers_keep_their_class() -> None:
    model = LLMDrop.example().model
    kind = type(model.model.layers[0])
    drop(model, {"attention": [1], "mlp": [1, 2]})
    assert all(isinstance(layer, kind) for layer in model.model.layers)
    model.train()
    ids = torch.arange(6)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_models_that_cannot_be_thinned_are_left_alone() -> None:
    small = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    granite = GraniteForCausalLM(GraniteConfig(**TINY, residual_multiplier=0.5)).eval()
    thinned = LLMDrop(1).apply(LLMDrop.example().model, LLMDrop.example().data)
    for model in (GPT2LMHeadModel(GPT2Config(**small)), granite, thinned, torch.nn.Linear(2, 2)):
        before = {n: p.clone() for n, p in model.state_dict().items()}
        with pytest.raises(NarrowsError):
            LLMDrop(1).apply(model, [{"input_ids": torch.arange(4)[None]}])
        assert before.keys() == model.state_dict().keys()
    with pytest.raises(NarrowsError, match="calibration"):
        LLMDrop(1).apply(LLMDrop.example().model, [])


def test_layouts() -> None:
    serial = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
    assert layout(serial) is not None
    assert layout(serial - {"post_attention_layernorm"}) is None  # one norm: attention and MLP in parallel
    assert layout({*serial, "cross_attn"}) is None
    assert FalconConfig().parallel_attn


def test_a_plan_round_trip() -> None:
    plan = Plan((LLMDrop(attention=8, mlp=2),))
    assert str(plan) == "llm-drop:attention=8,mlp=2"
    assert Plan.parse(str(plan)) == plan
    assert LLMDrop().baseline() == LLMDrop(by="random")
