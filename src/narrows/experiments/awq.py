"""What AWQ claims, on SmolLM2-135M with its residual stream rotated, so that no weight lies on a 4-bit grid by birth.

Groups of 64: its width of 576 is no multiple of 128.
"""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from narrows import samples
from narrows.capture.config import bundled_config, from_config
from narrows.cost import cost
from narrows.errors import NarrowsError
from narrows.experiments.steady import one_thread
from narrows.graph import DType, Graph
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.quantization.awq import AWQ

if TYPE_CHECKING:
    import torch

# Perplexity ratio that counts as usable at 135 M parameters (larger models lose less): between AWQ, 1.37, and rounding, 1.67.
GATE = 1.5


@cache
def _model() -> tuple[Any, "tuple[Mapping[str, torch.Tensor], ...]", "tuple[Mapping[str, torch.Tensor], ...]"]:
    """(rotated model, batches to calibrate on, batches held out)."""
    model, tokenizer = samples.smollm2()
    batches = samples.token_batches(tokenizer, 8, 256)
    return samples.rotated(model), tuple(batches[::2]), tuple(batches[1::2])


def _loss(model: "torch.nn.Module", batches: "Sequence[Mapping[str, torch.Tensor]]") -> float:
    import torch

    with torch.no_grad():
        return sum(float(model(**batch, labels=batch["input_ids"]).loss) for batch in batches) / len(batches)


@cache
def _perplexity_ratio(technique: AWQ) -> float:
    """How many times the held-out perplexity grows."""
    model, seen, held_out = _model()
    packed = technique.apply(deepcopy(model), seen)
    return math.exp(_loss(packed, held_out) - _plain_loss())


@cache
def _plain_loss() -> float:
    model, _, held_out = _model()
    return _loss(model, held_out)


@one_thread()
def same_before_rounding(technique: AWQ) -> float:
    """Largest change of a logit, relative to the largest logit, by the scales alone; NaN if no weight was scaled."""
    import torch

    model, seen, held_out = _model()
    scaled, _ = replace(technique, group=64).scaled(deepcopy(model), seen)
    moved = any(not torch.equal(a, b) for a, b in zip(model.parameters(), scaled.parameters(), strict=True))
    with torch.no_grad():
        before, after = (m(**held_out[0]).logits for m in (model, scaled))
    return float((after - before).abs().max() / before.abs().max()) if moved else math.nan


@one_thread()
def perplexity_over_rounding(technique: AWQ) -> float:
    """Increase of the perplexity over fp32, as a share of the increase by rounding to nearest."""
    ours = replace(technique, group=64)
    return (_perplexity_ratio(ours) - 1) / (_perplexity_ratio(ours.baseline()) - 1)


@one_thread()
def decode_speedup(technique: AWQ) -> float:
    """Roofline of a decode step of Llama-2-7B on an A100: fp16 over the narrowest format whose perplexity passes the gate."""
    config = bundled_config("llama-2-7b")
    if config is None:
        raise NarrowsError("llama-2-7b is not bundled.", where="experiment", remedy="Install narrows again.")
    plain, step = from_config(config, "llama-2-7b"), Step.decode(1, context=512)
    if _perplexity_ratio(replace(technique, group=64)) <= GATE:
        packed = technique.rewrite(plain)
    else:  # the next wider format that kernels know
        eight = DType("int8", 8, 0, scale_bits=16)
        packed = plain.map(lambda op: replace(op, weight=eight) if op.kind == "linear" and op.split != "vocabulary" else op)
    return _roofline(plain, step) / _roofline(packed, step)


def _roofline(graph: Graph, step: Step) -> float:
    """Seconds of a step if every op ran at the datasheet's peak or bandwidth."""
    device = machine("a100-80gb")
    seconds = 0.0
    for op in graph:
        work = cost(op, step)
        moved = float(work.read_bytes + work.write_bytes) / device.memory.bandwidth_bytes_per_s
        seconds += max(float(work.flop) / device.peak("fp16"), moved)
    return seconds
