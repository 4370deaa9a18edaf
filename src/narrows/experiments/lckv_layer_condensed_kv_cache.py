"""What condensing the cache costs a small Llama that learns letters so, and the batch that a 7B has room for then."""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from narrows.capture import capture
from narrows.capture.torch import from_module
from narrows.experiments.characters import held_out, nats_of, network, train
from narrows.experiments.decoded import largest_batch
from narrows.experiments.decoded import throughput as most_tokens
from narrows.experiments.steady import one_thread
from narrows.footprint import footprint
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.kv_cache.lckv_layer_condensed_kv_cache import LCKV

_ENOUGH, _SETTLED = 1.05, 0.001  # times the nats, and nats
_CONTEXT, _PASSAGES = 8192, 32
_PASSES = 4  # in training, of which two have gradients: enough here, and half the work of the defaults


@cache
def _trained(technique: LCKV | None) -> Any:
    """A network with or without the technique, after training."""
    ours = technique and replace(technique, passes=min(technique.passes, _PASSES))
    return train(ours.apply(network()) if ours else network(), lambda model, ids, _: model(ids, labels=ids, use_cache=False).loss)


@cache
@one_thread()
@torch.no_grad()  # type: ignore[untyped-decorator]
def _one_by_one(technique: LCKV | None) -> tuple[float, int]:
    """Held-out nats of a letter, read token by token, and bytes of the cache in the end."""
    from transformers.cache_utils import DynamicCache

    ids, kept = held_out(_PASSAGES), DynamicCache()
    logits = [_trained(technique)(one, past_key_values=kept).logits for one in ids[:, :-1].split(1, 1)]
    size = sum(t.nbytes for layer in kept.layers for t in (layer.keys, layer.values))
    return float(cross_entropy(torch.cat(logits, 1).flatten(0, 1), ids[:, 1:].flatten())), size


def settled(technique: LCKV) -> float:
    """How far the nats of passages read in passes are off those of passages read token by token."""
    model = _trained(technique)
    return float(abs(nats_of(model, held_out(_PASSAGES)) - _one_by_one(technique)[0]))


def nats(technique: LCKV) -> float:
    """Nats token by token over those of the network with all its caches; infinite where passes do not settle on them."""
    if settled(technique) > _SETTLED:
        return math.inf
    return float(_one_by_one(technique)[0] / _one_by_one(None)[0])


def cache_share(technique: LCKV) -> float:
    """Bytes of the cache over those of the whole; 1 where nats do not pass, NaN if the graph says other bytes."""
    if nats(technique) > _ENOUGH:
        return 1.0
    found, step = _one_by_one(technique)[1], Step.decode(_PASSAGES, held_out(1).shape[1] - 2)
    predicted = footprint(technique.rewrite(from_module(network().eval(), step)), step).kv_bytes
    return found / _one_by_one(None)[1] if found == predicted else math.nan


def batch(technique: LCKV) -> float:
    """Sequences of 8,192 tokens of Llama-2-7B that an RTX 3090 has room for, over before; 1 if nats do not pass."""
    if nats(technique) > _ENOUGH:
        return 1.0
    graph, device = capture("llama-2-7b"), machine("rtx-3090")
    return largest_batch(technique.rewrite(graph), device, _CONTEXT) / largest_batch(graph, device, _CONTEXT)


def throughput(technique: LCKV) -> float:
    """Predicted tokens/s of that batch, over before; 1 if nats do not pass."""
    if nats(technique) > _ENOUGH:
        return 1.0
    graph, device = capture("llama-2-7b"), machine("rtx-3090")
    return most_tokens(technique.rewrite(graph), device, _CONTEXT) / most_tokens(graph, device, _CONTEXT)
