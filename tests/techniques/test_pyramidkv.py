"""PyramidKV: budgets, what stays in the cache and where, positions afterwards, and what is refused."""

from itertools import pairwise

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from narrows.capture import capture
from narrows.capture.torch import from_module
from narrows.cost import total
from narrows.errors import NarrowsError
from narrows.footprint import footprint
from narrows.modules.eviction import Evicted, attention_scores, keep, turned
from narrows.plan import Plan
from narrows.step import Step
from narrows.techniques.kv_cache.pyramidkv import PyramidKV


@pytest.mark.parametrize("technique", [PyramidKV(), PyramidKV(512, beta=5), PyramidKV(100, beta=3, window=7), PyramidKV(beta=1)])
@pytest.mark.parametrize("layers", [1, 2, 3, 16, 30, 31, 80])
def test_budgets_fall_evenly_and_keep_the_total(technique: PyramidKV, layers: int) -> None:
    budgets = technique.budgets(layers)
    assert len(budgets) == layers
    assert sum(budgets) == layers * technique.budget
    assert list(budgets) == sorted(budgets, reverse=True)
    assert min(budgets) >= technique.window
    if layers > 1:
        assert budgets[-1] == technique.window + (technique.budget - technique.window) // technique.beta
        steps = [a - b for a, b in pairwise(budgets)]
        assert max(steps) - min(steps) <= 2  # rounding


def test_a_config_graph_before_and_after() -> None:
    graph, technique = capture("llama-3.1-8b"), PyramidKV(256)
    step = Step.decode(8, 32_768)
    assert technique.check(graph, None, step) is True
    after = technique.rewrite(graph)
    capped = [op for op in after if op.kind == "attention"]
    assert sum(op.repeat for op in capped) == 32
    assert footprint(after, step).kv_bytes == 8 * 32 * (256 + 1) * 2 * 1024 * 2
    assert total(after, step).cache_bytes < total(graph, step).cache_bytes / 100
    assert total(after, Step.prefill(1, 4096)).flop == total(graph, Step.prefill(1, 4096)).flop
    assert after.weight_bytes == graph.weight_bytes


@pytest.mark.parametrize("name,reason", [("gpt2", "q_proj"), ("bert-base", "from step to step"), ("gemma-2-9b", "same tokens"),
                                         ("deepseek-v3", "no attention"), ("mamba-2.8b", "no attention"),
                                         ("mistral-7b", "slides")])  # fmt: skip
def test_graphs_that_are_refused(name: str, reason: str) -> None:
    verdict = PyramidKV().check(capture(name), None, Step.decode(1, 900))
    assert not verdict
    assert reason in str(verdict)


def test_short_prompts_are_refused() -> None:
    verdict = PyramidKV(2048, beta=1).check(capture("llama-3.1-8b"), None, Step.decode(1, 2000))
    assert not verdict and "2001 tokens fit the smallest of its budgets, 2048" in str(verdict)


@pytest.mark.parametrize("wrong", [{"budget": 16}, {"beta": 0}, {"kernel": 4}, {"by": "luck"}])
def test_impossible_options_raise(wrong: dict) -> None:
    with pytest.raises(NarrowsError, match="is not possible"):
        PyramidKV(**wrong)


@pytest.mark.parametrize("by", ["attention", "recency"])
@pytest.mark.parametrize("step", [Step.decode(2, 300), Step.decode(1, 40), Step.decode(1, 150)])
def test_the_square_commutes(by: str, step: Step) -> None:
    technique, example = PyramidKV(by=by), PyramidKV.example()
    predicted = technique.rewrite(from_module(example.model, step))
    found = from_module(technique.apply(example.model), step)
    assert total(found, step) == total(predicted, step)
    assert footprint(found, step).kv_bytes == footprint(predicted, step).kv_bytes


def test_bytes_are_freed_and_positions_go_on() -> None:
    model, ids = PyramidKV.example().model, torch.randint(128, (2, 300))
    technique = PyramidKV(64)
    technique.apply(model)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        held = [layer.keys.shape[-2] for layer in cache.layers]
        assert held == list(technique.budgets(5))
        assert all(t.untyped_storage().nbytes() == t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        step = Step.prefill(2, 300)
        graph = technique.rewrite(from_module(PyramidKV.example().model, step))
        assert sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) == footprint(graph, step).kv_bytes
        assert cache.get_seq_length() == 300
        seen = []
        model.model.rotary_emb.register_forward_hook(lambda m, a, k, o: seen.append(k["position_ids"]), with_kwargs=True)
        model(input_ids=ids[:, :3], past_key_values=cache)
    assert seen[0].flatten()[:3].tolist() == [300, 301, 302]
    assert [layer.keys.shape[-2] for layer in cache.layers] == [n + 3 for n in held]


def test_many_tokens_after_an_eviction_equal_one_by_one() -> None:
    """The causal mask fits the keys that are left, in every layer."""
    model = PyramidKV(64).apply(PyramidKV.example().model)
    ids, more = torch.randint(128, (2, 200)), torch.randint(128, (2, 6))
    with torch.no_grad():
        together = model(input_ids=more, past_key_values=model(input_ids=ids, use_cache=True).past_key_values).logits
        cache = model(input_ids=ids, use_cache=True).past_key_values
        single = torch.cat([model(input_ids=more[:, i : i + 1], past_key_values=cache).logits for i in range(6)], dim=1)
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-5)


def test_padding_on_the_left_changes_nothing() -> None:
    model, ids = PyramidKV(40).apply(PyramidKV.example().model), torch.randint(1, 128, (1, 200))
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(209) >= 9).long()[None]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options)[:, 200:], model.generate(padded, attention_mask=mask, **options)[:, 209:])


def test_prompts_within_the_budget_are_untouched() -> None:
    plain, capped = PyramidKV.example().model, PyramidKV(128, beta=1).apply(PyramidKV.example().model)
    ids = torch.randint(128, (1, 100))
    options = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(plain.generate(ids, **options), capped.generate(ids, **options))


def test_what_the_end_looks_at_is_kept() -> None:
    scores = torch.zeros(1, 2, 50)
    scores[0, 0, 7], scores[0, 1, 30] = 1.0, 1.0
    kept = keep(scores, budget=11, window=8, kernel=3)
    assert kept.shape == (1, 2, 11)
    assert kept[0, 0].tolist() == [6, 7, 8, *range(50, 58)]
    assert kept[0, 1].tolist() == [29, 30, 31, *range(50, 58)]


def test_scores_and_rotation_are_those_of_attention() -> None:
    """Against the model's own eager attention weights."""
    model = PyramidKV.example().model
    model.set_attn_implementation("eager")
    found = {}

    def look(module, args, kwargs, out):
        window = 4
        queries = module.q_proj(kwargs["hidden_states"][:, -window:]).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        keys = kwargs["past_key_values"].layers[module.layer_idx].keys
        found["ours"] = attention_scores(turned(queries, kwargs["position_embeddings"]), keys, module.scaling)
        found["theirs"] = out[1][:, :, -window:, :-window].mean(2).unflatten(1, (2, 2)).mean(2)

    model.model.layers[1].self_attn.register_forward_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.randint(128, (2, 20)), use_cache=True)
    torch.testing.assert_close(found["ours"], found["theirs"])


def test_a_cache_layer_counts_what_it_has_seen() -> None:
    layer = Evicted.of(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), seen=90)
    layer.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    assert (layer.get_seq_length(), layer.keys.shape[-2], layer.get_mask_sizes(2)) == (93, 8, (95, 0))
    layer.crop(-2)
    assert (layer.get_seq_length(), layer.keys.shape[-2]) == (91, 6)
    layer.reset()
    assert layer.get_seq_length() == 0


def test_models_that_cannot_be_capped_are_left_alone() -> None:
    capped = PyramidKV().apply(PyramidKV.example().model)
    for model in (GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)), capped, torch.nn.Linear(2, 2)):
        hooks = sum(len(m._forward_hooks) for m in model.modules())
        with pytest.raises(NarrowsError, match="no attention layers that it can cap"):
            PyramidKV().apply(model)
        assert hooks == sum(len(m._forward_hooks) for m in model.modules())


def test_a_plan_round_trip() -> None:
    plan = Plan((PyramidKV(budget=256, beta=5),))
    assert str(plan) == "pyramidkv:budget=256,beta=5"
    assert Plan.parse(str(plan)) == plan
    assert PyramidKV().baseline() == PyramidKV(beta=1, by="recency")
