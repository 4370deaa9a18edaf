"""SmolLM2-135M on the sample text, before and after a technique: shared by the claims of number formats."""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING, Any

from narrows import samples
from narrows.experiments.steady import one_thread
from narrows.technique import Rewrites

if TYPE_CHECKING:
    import torch

    Batches = tuple[Mapping[str, torch.Tensor], ...]


@cache
def language_model(rotated: bool = False) -> "tuple[Any, Batches, Batches]":
    """(SmolLM2-135M in fp32, 4 batches of 256 tokens to calibrate on, 3 held out); change only copies of it."""
    model, tokenizer = samples.smollm2()
    batches = samples.token_batches(tokenizer, 8, 256)
    return samples.rotated(model) if rotated else model, tuple(batches[::2]), tuple(batches[1:7:2])


def added_nats(change: "Callable[[torch.nn.Module, Batches], torch.nn.Module]", rotated: bool = False) -> float:
    """Nats per held-out token that a change of the model adds."""
    model, seen, held_out = language_model(rotated)
    with one_thread():
        return _loss(change(deepcopy(model), seen), held_out) - _plain(rotated)


@cache
def nats_of(technique: Rewrites) -> float:
    """Nats per held-out token that a technique adds."""
    return added_nats(technique.apply)


def perplexity_ratio(technique: Rewrites) -> float:
    """How many times the held-out perplexity grows."""
    return math.exp(nats_of(technique))


@cache
def _plain(rotated: bool) -> float:
    model, _, held_out = language_model(rotated)
    return _loss(model, held_out)


def _loss(model: Any, batches: "Batches") -> float:
    import torch

    with torch.no_grad():
        return sum(float(model(**batch, labels=batch["input_ids"]).loss) for batch in batches) / len(batches)
