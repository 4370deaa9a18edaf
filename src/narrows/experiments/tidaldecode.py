"""What TidalDecode costs SmolLM2-135M in quality, and what a Llama-2-7B gains at the share of the cache that quality allows.

The layer that chooses again was found on other passages than those here.
"""

import math
from dataclasses import replace

from narrows.capture import capture
from narrows.diagnose import seconds
from narrows.experiments.decoded import PROMPT, rise
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.kv_cache.tidaldecode import TidalDecode

_TENTH = PROMPT // 10
_CONTEXT = 100_000


def perplexity(technique: TidalDecode) -> float:
    """Perplexity of prose with a tenth of the cache read, over that with all of it."""
    return math.exp(rise(replace(technique, budget=_TENTH), "prose"))


def repeats(technique: TidalDecode) -> float:
    """Perplexity of a passage that the prompt begins to repeat, with a tenth of the cache read, over that with all of it."""
    return math.exp(rise(replace(technique, budget=_TENTH), "repeats"))


def decode_speed(technique: TidalDecode) -> float:
    """Predicted decoding speed of Llama-2-7B at 100,000 tokens with a tenth of the cache read; 1 where that loses passages."""
    if repeats(technique) > 1.25:
        return 1.0
    graph, device, step = capture("llama-2-7b"), machine("a100-80gb"), Step.decode(1, _CONTEXT)
    after = replace(technique, budget=_CONTEXT // 10).rewrite(graph)
    return float(seconds(graph, device, step)[0]) / float(seconds(after, device, step)[0])
