"""How much of what SmolLM2-135M says with a quarter of its cache it says with all of it too, and what that is worth at scale."""

import math
from dataclasses import replace
from functools import cache

import torch

from narrows import samples
from narrows.capture import capture
from narrows.experiments.decoded import PROMPT, passages
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.decoding.triforce import TriForce

_TOKENS, _OUTER, _CONTEXT = 16, 3, 122_880


@cache
def _float() -> torch.nn.Module:
    """The model in fp32: in bf16 a check of several tokens may round to another token than one by one."""
    return samples.smollm2()[0]


@cache
def acceptance(technique: TriForce) -> float:
    """Share of the tokens proposed by a quarter of the cache that are taken, in repeats; NaN if the text is not the plain."""
    ours, taken, proposed = replace(technique, budget=PROMPT // 4, outer=_OUTER), 0, 0
    for prompt in passages("repeats")[:2, :PROMPT].split(1):
        found = ours.generate(_float(), prompt, _TOKENS)
        if not torch.equal(found.ids, _plain(prompt)):
            return math.nan
        taken, proposed = taken + found.taken, proposed + found.proposed
    return taken / proposed


def _plain(prompt: torch.Tensor) -> torch.Tensor:
    options = {"max_new_tokens": _TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    said: torch.Tensor = _float().generate(prompt, **options)  # type: ignore[operator]
    return said


def speedup(technique: TriForce) -> float:
    """Predicted gain over plain decoding of Llama-2-7B, 122,880 tokens, A100: with our acceptance and no small model."""
    ours = replace(technique, outer=_OUTER, draft="", taken=acceptance(technique))
    return ours.measure(capture("llama-2-7b"), machine("a100-80gb"), Step.decode(1, _CONTEXT)).values["speedup"]
