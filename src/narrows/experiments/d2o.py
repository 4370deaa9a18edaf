"""What D2O keeps of a passage in SmolLM2-135M's prompt, over recent tokens of the same bytes, and the batch it has room for."""

import math
from dataclasses import replace

from narrows.capture import capture
from narrows.capture.torch import from_module
from narrows.experiments.decoded import PROMPT, decoded, model, passages
from narrows.experiments.decoded import throughput as most_tokens
from narrows.footprint import footprint
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.kv_cache.d2o import D2O

_CONTEXT = 32_768


def nats_of_a_passage(technique: D2O) -> float:
    """Nats a token that a fifth of the prompt's tokens by attention save over the last fifth; NaN if the bytes differ."""
    ours = replace(technique, budget=PROMPT // 5)
    step = Step.prefill(len(passages("repeats")), PROMPT)
    found, recent = (decoded(t, "repeats") for t in (ours, ours.baseline()))
    predicted = footprint(ours.rewrite(from_module(model()[0], step)), step).kv_bytes
    return recent[0] - found[0] if found[1] == recent[1] == predicted else math.nan


def throughput(technique: D2O) -> float:
    """Predicted tokens/s of Llama-3.1-8B on an A100 at 32,768 tokens with a fifth of them, over all; 1 if it saves no nats."""
    if not nats_of_a_passage(technique) > 0:
        return 1.0
    graph, device = capture("llama-3.1-8b"), machine("a100-80gb")
    after = replace(technique, budget=_CONTEXT // 5).rewrite(graph)
    return most_tokens(after, device, _CONTEXT) / most_tokens(graph, device, _CONTEXT)
