"""What TokenRing claims: attention in blocks over the tokens of several ranks, and a layer of Llama-2-7B on linked devices."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from narrows.capture import capture
from narrows.graph import Op
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.training_parallelism.tokenring import TokenRing

if TYPE_CHECKING:
    from torch import Tensor

_STEP = Step.prefill(1, 24_000)
_WIDTH, _HEADS, _TOKENS = 16, 4, 96


def _attended(q: "Tensor", k: "Tensor", v: "Tensor", seen: "Tensor") -> "tuple[Tensor, Tensor]":
    """A block of attention [H, T, d] and the logarithm of its sums [H, T, 1]; what sees no key has minus infinity."""
    scores = (q @ k.mT * _WIDTH**-0.5).masked_fill(~seen, -math.inf)
    total = scores.logsumexp(-1, keepdim=True)
    return (scores - total).exp().nan_to_num() @ v, total


def _passed_round(technique: TokenRing, q: "Tensor", k: "Tensor", v: "Tensor") -> "Tensor":
    """Causal attention [H, T, d] of ranks that each hold a piece of the tokens; blocks are merged by the sums that came along."""
    import torch

    from narrows.modules.context import zigzag

    places, out = zigzag(_TOKENS, technique.devices), torch.zeros_like(q)
    for rank, own in enumerate(places):
        merged = top = None
        for hop in range(technique.devices if technique.passed == "queries" else 1):  # alone, nothing of others is met
            there = places[(rank + hop) % technique.devices]
            block, total = _attended(q[:, own], k[:, there], v[:, there], own[:, None] >= there)
            if merged is None or top is None:
                merged, top = block, total
            else:
                both = torch.logaddexp(top, total)
                merged, top = merged * (top - both).exp() + block * (total - both).exp(), both
        out[:, own] = merged if merged is not None else 0.0
    return out


def error(technique: TokenRing) -> float:
    """The largest difference from attention over all tokens, of 2, 4 and 8 ranks; the baseline's blocks are not merged."""
    import torch

    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, _HEADS, _TOKENS, _WIDTH, generator=draw)
    whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    found = [_passed_round(replace(technique, devices=ranks), q, k, v) for ranks in (2, 4, 8)]
    return max(float((one - whole).abs().max() / whole.abs().max()) for one in found)


def _layer() -> Op:
    return next(iter(capture("llama-2-7b").find("attention")))


def link_bytes(technique: TokenRing) -> float:
    """Bytes on the busiest direction of a link: keys and values passed round over the technique."""
    ring = replace(technique, passed="keys").link_bytes(_layer(), _STEP)
    return ring / technique.link_bytes(_layer(), _STEP)


def _speed(technique: TokenRing, devices: int) -> float:
    ours = replace(technique, devices=devices)
    ring = replace(ours, passed="keys").play(_layer(), machine("mi300x"), _STEP)
    return ring.seconds / ours.play(_layer(), machine("mi300x"), _STEP).seconds


def speed_4(technique: TokenRing) -> float:
    """Time of a layer's attention on 4 devices, keys and values passed round over the technique."""
    return _speed(technique, 4)


def speed_8(technique: TokenRing) -> float:
    """The same on 8."""
    return _speed(technique, 8)
