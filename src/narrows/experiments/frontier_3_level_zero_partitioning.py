"""What three levels of sharding claim on Frontier against ZeRO++, simulated; and what crosses nodes, on emulated devices."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from narrows.machine import cluster
from narrows.measured.published import Shape, decoder
from narrows.techniques.training_parallelism.frontier_3_level_zero_partitioning import ThreeLevel

_SHAPE, _SEQUENCE, _DIES = Shape(6144, 44, 64), 2048, 384  # GPT-NeoX-20B's widths
_NODE, _RANKS, _SIZE = 8, 16, 96

Vector = NDArray[np.float64]


@cache
def _tflops(technique: ThreeLevel, accumulate: int) -> float:
    sized = replace(technique, devices=_DIES, accumulate=accumulate)
    return sized.run(decoder(_SHAPE, _SEQUENCE), cluster("frontier-gcd"), 1, _SEQUENCE)["tflop_per_s"]


def over_zeropp(technique: ThreeLevel) -> float:
    """FLOP/s over those of ZeRO++ with 16 microbatches."""
    return _tflops(technique, 16) / _tflops(ThreeLevel("zero++"), 16)


def break_even(technique: ThreeLevel) -> float:
    """The fewest microbatches with which it is faster than ZeRO++."""
    return next((float(n) for n in range(1, 65) if _tflops(technique, n) > 1.001 * _tflops(ThreeLevel("zero++"), n)), math.inf)


def _crossing(technique: ThreeLevel) -> float:
    """Bytes that cross nodes for a microbatch when devices do what the technique says; NaN where a result is wrong."""
    draw = np.random.default_rng(2)
    weights, gradients = draw.normal(size=_SIZE), list(draw.normal(size=(_RANKS, _SIZE)))
    crossed, reduced = 0.0, [g.copy() for g in gradients]
    for one in replace(technique, devices=_RANKS).exchanges(_NODE):
        block = one.stride * one.ranks
        groups = [[base + first + one.stride * i for i in range(one.ranks)]
                  for base in range(0, _RANKS, block) for first in range(one.stride)]  # fmt: skip
        for group in groups:
            if one.kind == "all_gather":  # of weights, each member holding its part
                parts = np.array_split(weights if one.stride == 1 else np.array_split(weights, one.stride)[group[0] % one.stride],
                                       one.ranks)  # fmt: skip
                moved = _gather(group, parts)
                right = all(np.array_equal(np.concatenate([own[i] for i in range(one.ranks)]), np.concatenate(parts))
                            for own, _ in moved)  # fmt: skip
                if not right:
                    return math.nan
                sizes = sum(size for _, size in moved)
            else:
                sizes = _scatter(group, reduced)
            crossed += sizes * one.bits / 8 * (not one.per_step)
    total = np.sum(gradients, 0)
    pieces = sorted({tuple(np.round(part, 9)) for part in reduced}, key=lambda p: _place(total, p))
    return crossed if np.allclose(np.concatenate([np.array(p) for p in pieces]), total) else math.nan


def _place(total: Vector, piece: Sequence[float]) -> int:
    """Where a piece of the sum begins."""
    return int(np.argmin(np.abs(total - piece[0])))


def _gather(group: Sequence[int], parts: Sequence[Vector]) -> list[tuple[dict[int, Vector], float]]:
    """What each member of a ring holds in the end, and the elements that it sent to another node."""
    n = len(group)
    held: list[dict[int, Vector]] = [{i: part} for i, part in enumerate(parts)]
    sent = [0.0] * n
    for turn in range(n - 1):
        for i in range(n):
            piece, after = (i - turn) % n, (i + 1) % n
            held[after][piece] = held[i][piece]
            sent[i] += held[i][piece].size * (group[i] // _NODE != group[after] // _NODE)
    return list(zip(held, sent, strict=True))


def _scatter(group: Sequence[int], reduced: list[Vector]) -> float:
    """Leaves each member of a ring its part of the sum; elements that crossed nodes."""
    n, crossed = len(group), 0.0
    held = [list(np.array_split(reduced[rank], n)) for rank in group]
    for turn in range(n - 1):
        for i in range(n):
            piece, after = (i - turn - 1) % n, (i + 1) % n
            held[after][piece] = held[after][piece] + held[i][piece]
            crossed += held[i][piece].size * (group[i] // _NODE != group[after] // _NODE)
    for i, rank in enumerate(group):
        reduced[rank] = held[i][i]
    return crossed


def crossing(technique: ThreeLevel) -> float:
    """Bytes that cross nodes for a microbatch, over those of ZeRO-3."""
    return _crossing(technique) / _crossing(ThreeLevel("zero-3"))
