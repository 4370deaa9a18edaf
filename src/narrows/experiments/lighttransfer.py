"""What streaming attention in half of SmolLM2-135M's layers costs, by which half, and what larger models gain from it."""

import math
from dataclasses import replace

from narrows.capture import capture
from narrows.capture.torch import from_module
from narrows.experiments.decoded import PROMPT, decoded, model, passages, rise
from narrows.experiments.decoded import throughput as most_tokens
from narrows.footprint import footprint
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.kv_cache.lighttransfer import LightTransfer

_WINDOW, _CONTEXT = 64, 32_768
_ENOUGH = 1.15  # times the perplexity: what counts as kept


def perplexity(technique: LightTransfer) -> float:
    """Perplexity of prose with half of the layers at a window of 64, over that of the whole cache."""
    return math.exp(rise(replace(technique, window=_WINDOW), "prose"))


def loss_of_the_others(technique: LightTransfer) -> float:
    """Nats added by letting the chosen half stream, over those added by the least lazy half."""
    ours = replace(technique, window=_WINDOW)
    return rise(ours, "prose") / rise(replace(ours, by="diligence"), "prose")


def cache_share(technique: LightTransfer) -> float:
    """Bytes of the prompts' cache over those of the whole; 1 where perplexity is not kept, NaN if the graph says other bytes."""
    ours, step = replace(technique, window=_WINDOW), Step.prefill(len(passages("prose")), PROMPT)
    size = decoded(ours, "prose")[1]
    if size != footprint(ours.rewrite(from_module(model()[0], step)), step).kv_bytes:
        return math.nan
    return size / decoded(None, "prose")[1] if perplexity(technique) <= _ENOUGH else 1.0


def throughput(technique: LightTransfer) -> float:
    """Predicted tokens/s of Llama-3.1-8B on an A100 at 32,768 tokens, of the largest batch, over before; 1 if not kept."""
    if perplexity(technique) > _ENOUGH:
        return 1.0
    graph, device = capture("llama-3.1-8b"), machine("a100-80gb")
    return most_tokens(technique.rewrite(graph), device, _CONTEXT) / most_tokens(graph, device, _CONTEXT)
