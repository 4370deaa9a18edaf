"""What eight lines of thought cost in time beside one, and what an answer finds of them in the cache."""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from narrows import samples
from narrows.capture import capture
from narrows.experiments.steady import one_thread
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.decoding.parathinker import ParaThinker

_PROMPT, _PATHS, _THOUGHT, _ANSWER = 24, 4, 16, 4


@cache
def _model() -> tuple[Any, Any]:
    return samples.smollm2()


def overhead(technique: ParaThinker) -> float:
    """Time of 8 paths of 8,192 tokens and an answer beyond that of one path, in shares of it: Qwen2.5-7B on an A100."""
    return technique.measure(capture("qwen2.5-7b"), machine("a100-80gb"), Step.prefill(1, 256)).values["overhead"]


def sixteen(technique: ParaThinker) -> float:
    """Time of 16 paths of 16,384 tokens over that of one, on the same."""
    ours = replace(technique, paths=16, thought=16_384)
    return 1 + overhead(ours)


@one_thread()
def read_again(technique: ParaThinker) -> float:
    """Share of prompt and paths that is read twice before the answer; NaN where the cache answers other than reading all."""
    model, tokenizer = _model()
    ids = samples.token_batches(tokenizer, 1, _PROMPT + _PATHS + 2)[0]["input_ids"]
    ours = replace(technique, paths=_PATHS, thought=_THOUGHT, answer=_ANSWER)
    prompt, starts, close = ids[:, :_PROMPT], ids[0, _PROMPT : _PROMPT + _PATHS], ids[:, -2:]
    found, again = (t.think(model, prompt, starts, close) for t in (ours, ours.baseline()))
    if not torch.equal(found.paths, again.paths) or float((found.logits - again.logits).abs().max()) > 1e-3:
        return math.nan
    return float(found.read_again / (_PROMPT + found.paths.numel()))
