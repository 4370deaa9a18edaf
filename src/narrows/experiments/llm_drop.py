"""What dropping attention sublayers costs and gives on SmolLM2-135M: perplexity on Brown text, decode time, cache bytes."""

import copy
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from narrows import samples
from narrows.techniques.sparsity_pruning.llm_drop import LLMDrop, drop

_FEW, _LAYERS = 8, 30


@cache
def _model() -> tuple[Any, Any]:
    return samples.smollm2()


@cache
def _text(part: str) -> Any:
    """Token ids [N, T] from places of the text that do not overlap: to calibrate on, to score, to fill a cache with."""
    ids = torch.cat([batch["input_ids"] for batch in samples.token_batches(_model()[1], 9, 1024)])
    return {"calibration": ids[:4, :192], "scored": ids[4:8, :320], "prompt": ids[8:]}[part]


def _calibration() -> Any:
    return [{"input_ids": ids} for ids in _text("calibration").split(1)]


@torch.no_grad()  # type: ignore[untyped-decorator]
def _loss(model: Any) -> float:
    """Mean nats per token."""
    ids = _text("scored")
    logits = torch.cat([model(input_ids=one, use_cache=False).logits[:, :-1] for one in ids.split(1)])
    return float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def _dropped(technique: LLMDrop) -> Any:
    return technique.apply(copy.deepcopy(_model()[0]), _calibration())


@cache
def _rise(technique: LLMDrop) -> float:
    """Nats per token that a drop adds."""
    return float(_loss(_dropped(technique)) - _whole())


@cache
def _whole() -> float:
    return float(_loss(_model()[0]))


@torch.no_grad()  # type: ignore[untyped-decorator]
def _blocks(count: int) -> Mapping[str, Collection[int]]:
    """The whole layers that turn the stream the least (the paper's block drop)."""
    total = torch.zeros(_LAYERS)
    for batch in _calibration():
        states = _model()[0](**batch, use_cache=False, output_hidden_states=True).hidden_states[: _LAYERS + 1]
        total += torch.stack([cosine_similarity(a, b, dim=-1).mean() for a, b in pairwise(states)])
    chosen = total[: _LAYERS - 1].topk(count).indices.tolist()  # the last state is after the final norm
    return {"attention": chosen, "mlp": chosen}


def perplexity(technique: LLMDrop) -> float:
    """Perplexity after dropping eight attention sublayers, over that before."""
    return math.exp(_rise(replace(technique, attention=_FEW, mlp=0)))


def attention_before_mlp_and_blocks(technique: LLMDrop) -> float:
    """Nats added by dropping eight attention sublayers, over the least that eight MLPs or eight whole layers add."""
    blocks = copy.deepcopy(_model()[0])
    drop(blocks, _blocks(_FEW))
    others = _rise(replace(technique, attention=0, mlp=_FEW, by="similarity")), _loss(blocks) - _whole()
    return float(_rise(replace(technique, attention=_FEW, mlp=0)) / min(others))


@cache
def _spared(by: str) -> int:
    """How many attention sublayers can go before perplexity doubles (bisection)."""
    low, high = 0, _LAYERS // 2
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _rise(LLMDrop(middle, 0, by)) <= math.log(2) else (low, middle - 1)
    return low


def decode_speed(technique: LLMDrop) -> float:
    """Decode time of the whole model over that with as many attention sublayers dropped as perplexity x 2 allows.

    Batch 4 at 1,024 tokens of context, the two interleaved, the fastest of some steps of each.
    """
    models = (_model()[0], _dropped(replace(technique, attention=_spared(technique.by), mlp=0)))
    ids = _text("prompt")
    with torch.no_grad():
        caches = [model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values for model in models]
        for kept in caches:
            kept.batch_repeat_interleave(4)
        best = [math.inf, math.inf]
        for _ in range(24):
            for i, model in enumerate(models):
                start = time.perf_counter()
                model(input_ids=ids[:, :1].expand(4, 1), past_key_values=caches[i])
                best[i] = min(best[i], time.perf_counter() - start)
    return best[0] / best[1]


@torch.no_grad()  # type: ignore[untyped-decorator]
def cache_share(technique: LLMDrop) -> float:
    """Measured bytes of the KV cache with as many sublayers dropped as perplexity x 2 allows, over those of the whole model.

    NaN unless it is exactly the share of the attention sublayers that are left.
    """
    count = _spared(technique.by)
    sizes = []
    for model in (_model()[0], _dropped(replace(technique, attention=count, mlp=0))):
        made = model(input_ids=_text("prompt")[:, :128], use_cache=True).past_key_values
        sizes.append(sum(t.nbytes for layer in made.layers if layer.is_initialized for t in (layer.keys, layer.values)))
    return sizes[1] / sizes[0] if sizes[1] * _LAYERS == sizes[0] * (_LAYERS - count) else math.nan
