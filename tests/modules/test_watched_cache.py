"""Caches that forget, merge or hide tokens: what they hold, what attention sees, and that the graph says the same."""

import math

import pytest
import torch

from narrows.capture.torch import from_module
from narrows.cost import total
from narrows.errors import NarrowsError
from narrows.footprint import footprint
from narrows.modules.eviction import SINKS
from narrows.modules.watched_cache import Watched
from narrows.samples import tiny_llama
from narrows.step import Step
from narrows.technique import Rewrites
from narrows.techniques.kv_cache.d2o import D2O
from narrows.techniques.kv_cache.lighttransfer import LightTransfer
from narrows.techniques.kv_cache.tidaldecode import TidalDecode

ALL = [D2O(budget=64), D2O(budget=64, spread=False, merge=False), D2O(budget=64).baseline(), LightTransfer(window=64),
       LightTransfer(window=64, by="random"), TidalDecode(budget=64), TidalDecode(budget=64).baseline()]  # fmt: skip


def model(layers: int = 6) -> torch.nn.Module:
    return tiny_llama(layers, tokens=8)[0].eval()


def ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 128, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def held(cache: object) -> list[int]:
    return [layer.keys.shape[-2] for layer in cache.layers]  # type: ignore[attr-defined]


@pytest.mark.parametrize("technique", ALL, ids=str)
@pytest.mark.parametrize("step", [Step.decode(2, 300), Step.prefill(2, 300), Step.decode(1, 40)], ids=str)
def test_the_square_commutes_at_each_kind_of_step(technique: Rewrites, step: Step) -> None:
    predicted = technique.rewrite(from_module(model(), step))
    found = from_module(technique.apply(model(), []), step)
    assert total(found, step) == total(predicted, step)
    assert footprint(found, step).kv_bytes == footprint(predicted, step).kv_bytes


@pytest.mark.parametrize("technique", ALL, ids=str)
def test_bytes_are_those_of_the_graph_and_positions_go_on(technique: Rewrites) -> None:
    changed = technique.apply(model(), [])
    seen = []
    changed.model.rotary_emb.register_forward_hook(lambda m, a, k, o: seen.append(k["position_ids"]), with_kwargs=True)
    with torch.no_grad():
        cache = changed(input_ids=ids(2, 200), use_cache=True).past_key_values
        size = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        step = Step.prefill(2, 200)
        assert size == footprint(technique.rewrite(from_module(model(), step)), step).kv_bytes
        assert cache.get_seq_length() == 200
        for _ in range(3):
            changed(input_ids=ids(2, 1), past_key_values=cache)
    assert seen[-1].flatten()[0] == 202


@pytest.mark.parametrize("technique", ALL, ids=str)
def test_a_cache_that_fits_changes_nothing(technique: Rewrites) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = ids(1, 40)
    assert torch.equal(model().generate(prompt, **options), technique.apply(model(), []).generate(prompt, **options))


def test_a_budget_holds_while_decoding() -> None:
    changed = D2O(budget=64).apply(model(), [])
    with torch.no_grad():
        cache = changed(input_ids=ids(1, 200), use_cache=True).past_key_values
        after = held(cache)
        assert sum(after[2:-1]) == 64 * 3 and after[:2] == [200, 200]
        for i in range(5):
            changed(input_ids=ids(1, 1, i), past_key_values=cache)
    assert held(cache)[2:-1] == [n + 1 for n in after[2:-1]]
    assert held(cache)[0] == 205


def test_streaming_layers_keep_the_first_and_the_last() -> None:
    plain, changed = model(), LightTransfer(window=20).apply(model(), [])
    with torch.no_grad():
        whole = plain(input_ids=ids(1, 50), use_cache=True).past_key_values
        cache = changed(input_ids=ids(1, 50), use_cache=True).past_key_values
    assert sorted(held(cache)) == [20] * 3 + [50] * 3
    for full, layer in zip(whole.layers, cache.layers, strict=True):
        keys = layer.keys if layer.keys.shape[-2] == 50 else torch.cat([full.keys[..., :SINKS, :], full.keys[..., -16:, :]], -2)
        torch.testing.assert_close(layer.keys, keys)


def test_laziness_and_diligence_choose_the_two_halves() -> None:
    chosen = []
    for by in ("laziness", "diligence"):
        with torch.no_grad():
            cache = LightTransfer(window=20, by=by).apply(model(), [])(input_ids=ids(1, 50), use_cache=True).past_key_values
        chosen.append({i for i, n in enumerate(held(cache)) if n == 20})
    assert chosen[0] | chosen[1] == set(range(6)) and not chosen[0] & chosen[1]


def test_a_merged_token_is_the_weighted_mean_of_those_mixed() -> None:
    """Two equal keys: the one forgotten has likeness 1, so that both count e, and the value is their mean."""
    technique = D2O(budget=9, merge=True)
    cache = technique.apply(model(4), [])
    with torch.no_grad():
        layer = cache(input_ids=ids(1, 12), use_cache=True).past_key_values.layers[2]
    kept = torch.eye(9, 16)[None, None].repeat(1, 2, 1, 1)
    layer.keys, layer.values, layer.threshold = kept.clone(), torch.zeros(1, 2, 9, 8), None
    layer._merge(kept[:, :, 3:4], torch.full((1, 2, 1, 8), 2.0))
    torch.testing.assert_close(layer.values[:, :, 3], torch.ones(1, 2, 8))
    torch.testing.assert_close(layer.keys, kept)
    layer._merge(-torch.ones(1, 2, 1, 16), torch.full((1, 2, 1, 8), 9.0))  # unlike all: lost
    assert layer.values.sum() == 2 * 8
    assert math.isclose(float(layer.threshold), 0.5 * (-1 / 16**0.5) + 0.5 * 1.0, rel_tol=1e-5)


def test_sparse_layers_of_all_tokens_attend_as_the_whole_model() -> None:
    """With as large a budget as there are old tokens but one, only that one is missed."""
    with torch.no_grad():
        plain, changed = model(), TidalDecode(budget=48).apply(model(), [])
        prompt, token = ids(2, 49), ids(2, 1, 1)
        outs = [m(input_ids=token, past_key_values=m(input_ids=prompt, use_cache=True).past_key_values).logits
                for m in (plain, changed)]  # fmt: skip
    assert not torch.equal(*outs)
    torch.testing.assert_close(*outs, rtol=0.05, atol=0.02)


def test_a_cache_begun_before_is_left_alone() -> None:
    plain = model()
    with torch.no_grad():
        cache = plain(input_ids=ids(1, 100), use_cache=True).past_key_values
        D2O(budget=64).apply(plain, [])(input_ids=ids(1, 1), past_key_values=cache)
    assert held(cache) == [101] * 6 and not any(isinstance(layer, Watched) for layer in cache.layers)


@pytest.mark.parametrize("technique", ALL[::2], ids=str)
def test_models_are_changed_once(technique: Rewrites) -> None:
    changed = technique.apply(model(), [])
    with pytest.raises(NarrowsError, match="no attention layers that it can cap"):
        technique.apply(changed, [])


WRONG = [
    (D2O, {"budget": 4}),
    (D2O, {"recent": 0.0}),
    (LightTransfer, {"share": 1.0}),
    (LightTransfer, {"by": "luck"}),
    (TidalDecode, {"budget": 2}),
    (TidalDecode, {"again": 1.0}),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_impossible_options_raise(wrong: tuple) -> None:
    with pytest.raises(NarrowsError, match="is not possible"):
        wrong[0](**wrong[1])
