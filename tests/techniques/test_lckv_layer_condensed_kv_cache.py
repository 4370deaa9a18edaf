"""LCKV: passes give what tokens one by one give, prompts in pieces too; what is refused; what prompts cost."""

from pathlib import Path

import pytest
import torch
from transformers.cache_utils import DynamicCache

from narrows.capture import capture
from narrows.capture.torch import from_module
from narrows.cost import total
from narrows.samples import tiny_llama
from narrows.step import Step
from narrows.technique import No
from narrows.techniques.kv_cache.lckv_layer_condensed_kv_cache import LCKV
from narrows.techniques.sparsity_pruning.llm_drop import LLMDrop


@pytest.mark.parametrize("below,above", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("pieces", [[1] * 12, [7, 5], [4, 1, 7]])
@torch.no_grad()
def test_enough_passes_give_what_tokens_one_by_one_give(below: int, above: int, pieces: list[int]) -> None:
    model, batches = tiny_llama(6, tokens=12)
    model = LCKV(below, above, passes=12).apply(model.eval())
    ids, cache = batches[0]["input_ids"], DynamicCache()
    found = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(pieces, 1)], 1)
    torch.testing.assert_close(found, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    held = [layer.keys.shape[-2] for layer in cache.layers]
    assert sorted(held) == [0] * (6 - below - above - 1) + [12] * (below + above + 1)


def test_gradients_reach_every_weight() -> None:
    model, batches = tiny_llama(5, tokens=12)
    model = LCKV(passes=3, learning=1).apply(model.train())
    ids = batches[0]["input_ids"]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_models_without_layers_to_condense_are_refused() -> None:
    step = Step.decode(2, 24)
    for graph in (from_module(tiny_llama(3, tokens=24)[0], step), LLMDrop(2).rewrite(from_module(tiny_llama(6, 24)[0], step))):
        assert isinstance(LCKV().check(graph, None, step), No)


def test_a_prompt_costs_its_passes(tmp_path: Path) -> None:
    model, _ = tiny_llama(6, tokens=64)
    model.config.save_pretrained(tmp_path)
    step = Step.prefill(2, 64)
    predicted = LCKV(passes=5).rewrite(capture(tmp_path))
    found = from_module(LCKV(passes=5).apply(model.eval()), step)
    assert total(found, step).flop == pytest.approx(total(predicted, step).flop, rel=0.03)
