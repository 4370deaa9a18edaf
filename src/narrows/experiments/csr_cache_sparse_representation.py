"""What a few atoms a vector keep of SmolLM2-135M's prompts, beside rounding each number in as many bytes."""

import copy
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.cache_utils import DynamicCache

from narrows import samples
from narrows.capture import capture
from narrows.capture.torch import from_module
from narrows.experiments.decoded import PROMPT, model, passages
from narrows.experiments.steady import one_thread
from narrows.footprint import footprint
from narrows.step import Step
from narrows.techniques.kv_cache.csr_cache_sparse_representation import CSR

_SCORED = 2  # passages
_BETTER, _ENOUGH = 0.95, 0.5  # of the squares that chance leaves, and of the nats that rounding adds: what passes
_GROUP = 32  # numbers that share the two values of one-bit rounding


@cache
@one_thread()
@torch.no_grad()  # type: ignore[untyped-decorator]
def _read(technique: CSR | None) -> tuple[Any, Any]:
    """The model with the technique, and what it holds of the prompts after reading them."""
    changed = model()[0]
    if technique is not None:
        data = samples.token_batches(model()[1], 9, PROMPT)[1:]
        changed = technique.apply(copy.deepcopy(changed), data)
    return changed, changed(input_ids=passages("prose")[:_SCORED, :PROMPT], use_cache=True, logits_to_keep=1).past_key_values


@torch.no_grad()  # type: ignore[untyped-decorator]
def _nats(changed: Any, kept: Any) -> float:
    """Nats of the tokens after the prompts, but for the first, read in one step; the cache is as before then."""
    ids = passages("prose")[:_SCORED, PROMPT:]
    kept = copy.deepcopy(kept)
    logits = changed(input_ids=ids, past_key_values=kept).logits[:, :-1]
    return float(cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()))


def _rounded(t: Tensor, along: int) -> Tensor:
    """Keys or values [B, K, S, d] with one bit a number: groups along a dim keep the mean of those above theirs, and below."""
    grouped = t.float().transpose(along, -1).unflatten(-1, (-1, _GROUP))
    above = grouped > grouped.mean(-1, keepdim=True)
    means = [(grouped * part).sum(-1, keepdim=True) / part.sum(-1, keepdim=True).clamp(min=1) for part in (above, ~above)]
    return torch.where(above, *means).flatten(-2).transpose(along, -1).to(t.dtype)


@cache
@one_thread()
def _rise(technique: CSR | None) -> float:
    """Nats a token that coding the prompts' cache adds; None: rounding to a bit, and a bit for the groups' two values."""
    changed, kept = _read(technique)
    whole = _nats(*_read(None))
    if technique is not None:
        return float(_nats(changed, kept) - whole)
    rounded = DynamicCache()
    for index, layer in enumerate(kept.layers):  # keys in groups along tokens, values within one: as KIVI does
        rounded.update(_rounded(layer.keys, 2), _rounded(layer.values, 3), index)
    return float(_nats(changed, rounded) - whole)


@cache
def _left(technique: CSR) -> float:
    """Share of the squares of the prompts' keys and values that their codes leave; a mean over layers, keys and values."""
    shares = []
    for coded, plain in zip(_read(technique)[1].layers, _read(None)[1].layers, strict=True):
        for found, x in zip(coded.held(torch.float32), (plain.keys, plain.values), strict=True):
            shares.append(float((found - x).square().sum() / x.float().square().sum()))
    return sum(shares) / len(shares)


def squares_over_chance(technique: CSR) -> float:
    """Squares that the technique leaves over those that random directions leave."""
    return _left(technique) / _left(technique.baseline())


def nats_over_rounding(technique: CSR) -> float:
    """Nats that the technique adds over those that rounding adds, in as many bytes; infinite if no better than chance."""
    return _rise(technique) / _rise(None) if squares_over_chance(technique) < _BETTER else math.inf


def bits(technique: CSR) -> float:
    """Bits of a number of Llama-3.1-8B's cache; 16 where nats do not pass, NaN where measured bytes are not the graph's."""
    step = Step.prefill(_SCORED, PROMPT)
    size = sum(t.nbytes for layer in _read(technique)[1].layers for t in (layer.keys, layer.values))
    if size != footprint(technique.rewrite(from_module(model()[0], step)), step).kv_bytes:
        return math.nan
    if nats_over_rounding(technique) > _ENOUGH:
        return 16.0
    graph = capture("llama-3.1-8b")
    after, before = (footprint(g, step).kv_bytes for g in (technique.rewrite(graph), graph))
    return float(16 * after / before)
