"""SmolLM2-135M decoding real text token by token behind a prompt: how well it predicts it, and the bytes of its cache.

The text is prose that goes on, or a prompt that begins to repeat a passage from its middle, which must be found again.
"""

import copy
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from narrows import samples
from narrows.diagnose import seconds
from narrows.footprint import footprint
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Rewrites

PROMPT, NEW, GIVEN = 480, 24, 16


@cache
def model() -> tuple[Any, Any]:
    """(model, tokenizer), in bf16."""
    return samples.smollm2("bfloat16")


@cache
def passages(kind: str) -> Tensor:
    """Token ids [4, PROMPT + NEW] from places spread over the sample text: prose, or repeats."""
    ids = torch.cat([batch["input_ids"] for batch in samples.token_batches(model()[1], 5, PROMPT + NEW)])[1:]
    if kind == "prose":
        return ids
    places = range(100, 100 + 70 * len(ids), 70)
    again = torch.stack([row[place : place + GIVEN + NEW] for row, place in zip(ids, places, strict=True)])
    return torch.cat([ids[:, : PROMPT - GIVEN], again], 1)


@cache
@torch.no_grad()  # type: ignore[untyped-decorator]
def decoded(technique: Rewrites | None, kind: str) -> tuple[float, int]:
    """Mean nats of the tokens after the prompts, decoded one by one, and bytes of the cache of all prompts (None: unchanged)."""
    changed = model()[0] if technique is None else technique.apply(copy.deepcopy(model()[0]), [])
    ids = passages(kind)
    read = changed(input_ids=ids[:, :PROMPT], use_cache=True, logits_to_keep=1)
    kept = read.past_key_values
    size = sum(t.nbytes for layer in kept.layers for t in (layer.keys, layer.values))
    logits = [read.logits]
    for place in range(PROMPT, PROMPT + NEW - 1):
        logits.append(changed(input_ids=ids[:, place : place + 1], past_key_values=kept).logits)
    said = torch.cat(logits, 1).float().flatten(0, 1)
    return float(cross_entropy(said, ids[:, PROMPT:].flatten())), size


def rise(technique: Rewrites, kind: str) -> float:
    """Nats per token that a technique adds."""
    return float(decoded(technique, kind)[0] - decoded(None, kind)[0])


def largest_batch(graph: Graph, machine: Machine, context: int) -> int:
    """The most sequences of a context that fit a machine, up to 1,024 (0: not even one)."""
    batches = np.arange(1, 1025)[:, None]
    fits = footprint(graph, Step.decode(batches, context)).fits(machine)
    return int(batches[fits].max()) if fits.any() else 0


def throughput(graph: Graph, machine: Machine, context: int) -> float:
    """Tokens per second of the largest batch that fits a machine at a context (0: not even one)."""
    most = largest_batch(graph, machine, context)
    return float(most / seconds(graph, machine, Step.decode(most, context))[0]) if most else 0.0
