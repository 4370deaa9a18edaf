"""What LayerSkip's training gives a small Llama that learns letters: exits that agree with the whole, and drafts to check."""

import math
from functools import cache
from typing import Any

import torch

from narrows.capture import capture
from narrows.experiments.characters import LAYERS, held_out, nats_of, network, train
from narrows.experiments.steady import one_thread
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.decoding.layerskip import LayerSkip

_ENOUGH = 0.7  # of the letters: what counts as exits that agree
_TOKENS = 8


@cache
def _trained(technique: LayerSkip) -> Any:
    return train(network(), technique.loss)


@cache
@one_thread()
@torch.no_grad()  # type: ignore[untyped-decorator]
def _agreements(technique: LayerSkip) -> tuple[float, ...]:
    """For an exit after each layer but the last, the share of held-out letters where it says what the whole model says."""
    model = _trained(technique)
    out = model(input_ids=held_out(32), output_hidden_states=True, use_cache=False)
    exits = (model.lm_head(model.model.norm(out.hidden_states[n])) for n in range(1, LAYERS))
    return tuple(float((exit.argmax(-1) == out.logits.argmax(-1)).float().mean()) for exit in exits)


@one_thread()
def _same_text(technique: LayerSkip) -> bool:
    """Whether what is drafted and checked is what the model says token by token, behind three prompts."""
    model, options = _trained(technique), {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompts = held_out(3).split(1)
    plain = (model.generate(p, max_new_tokens=_TOKENS, **options) for p in prompts)
    return all(torch.equal(technique.generate(model, p, _TOKENS).ids, ids) for p, ids in zip(prompts, plain, strict=True))


def agreement(technique: LayerSkip) -> float:
    """The mean over the exits of the share of letters where they say what the whole says; NaN where drafted text differs."""
    found = _agreements(technique)
    return sum(found) / len(found) if _same_text(technique) else math.nan


def last_layer(technique: LayerSkip) -> float:
    """Held-out nats of the whole model over those after plain training; infinite where its exits do not agree."""
    if not agreement(technique) >= _ENOUGH:
        return math.inf
    return nats_of(_trained(technique), held_out(64)) / nats_of(_trained(technique.baseline()), held_out(64))


def speedup(technique: LayerSkip) -> float:
    """Predicted gain over plain decoding of Llama-2-7B on an A100, if as many drafts are taken as letters agree here."""
    ours = LayerSkip(taken=_agreements(technique)[technique.drafting(LAYERS) - 1])
    return ours.measure(capture("llama-2-7b"), machine("a100-80gb"), Step.decode(1, 1024)).values["speedup"]
