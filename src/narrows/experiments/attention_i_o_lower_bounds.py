"""What the bounds of attention's I/O claim, on loops that compute attention and count each number they load and store."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrows.errors import NarrowsError
from narrows.techniques.attention.attention_i_o_lower_bounds import AttentionIO, bound, side, strip

Matrix = NDArray[np.float64]


class FastMemory:
    """A fast memory of so many numbers: counts what is moved in and out, and refuses to hold more."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.held, self.moved = capacity, 0, 0

    def reserve(self, numbers: int) -> None:
        """Take room for results, without traffic."""
        self.held += numbers
        if self.held > self.capacity:
            raise NarrowsError(f"it holds {self.held} of {self.capacity} numbers.", where="fast memory", remedy="Use less tiles.")

    def load(self, part: Matrix) -> Matrix:
        """Bring a part of slow memory in."""
        self.reserve(part.size)
        self.moved += part.size
        return part

    def store(self, place: Matrix, part: Matrix) -> None:
        """Write a part out and free its room."""
        place[...] = part
        self.moved += part.size
        self.free(part.size)

    def free(self, numbers: int) -> None:
        """Give room back."""
        self.held -= numbers


def _strips(q: Matrix, k: Matrix, v: Matrix, memory: FastMemory, rows: int) -> Matrix:
    """FlashAttention: a strip of queries and their outputs stay, keys and values pass one by one."""
    out = np.empty_like(q)
    for at in range(0, len(q), rows):
        mine = memory.load(q[at : at + rows])
        memory.reserve(mine.size + 3 * len(mine))  # outputs; maximum, sum and score of each row
        acc, top, total = np.zeros_like(mine), np.full(len(mine), -np.inf), np.zeros(len(mine))
        for key, value in zip(k, v, strict=True):
            key, value = memory.load(key), memory.load(value)
            score = mine @ key
            higher = np.maximum(top, score)
            old, new = np.exp(top - higher), np.exp(score - higher)
            acc, total, top = acc * old[:, None] + new[:, None] * value, total * old + new, higher
            memory.free(2 * len(key))
        memory.store(out[at : at + rows], acc / total[:, None])
        memory.free(mine.size + 3 * len(mine))
    return out


def _tiles(q: Matrix, k: Matrix, v: Matrix, memory: FastMemory, b: int) -> Matrix:
    """Scores in square tiles, each a sum of outer products, written; then the output in square tiles from them."""
    scores, stats, out = np.empty((len(q), len(k))), np.empty((len(q), 2)), np.empty_like(q)
    for i in range(0, len(q), b):
        height = len(q[i : i + b])
        memory.reserve(2 * height)
        top, total = np.full(height, -np.inf), np.zeros(height)
        for j in range(0, len(k), b):
            tile = np.zeros((height, len(k[j : j + b])))
            memory.reserve(tile.size)
            for x in range(q.shape[1]):
                left, right = memory.load(q[i : i + b, x]), memory.load(k[j : j + b, x])
                tile += left[:, None] * right
                memory.free(left.size + right.size)
            higher = np.maximum(top, tile.max(1))
            total, top = total * np.exp(top - higher) + np.exp(tile - higher[:, None]).sum(1), higher
            memory.store(scores[i : i + b, j : j + b], tile)
        memory.store(stats[i : i + b], np.stack((top, total), 1))
    for i in range(0, len(q), b):
        for x in range(0, q.shape[1], b):
            known = memory.load(stats[i : i + b])
            tile = np.zeros((len(known), len(v[0, x : x + b])))
            memory.reserve(tile.size)
            for j in range(len(k)):
                left, right = memory.load(scores[i : i + b, j]), memory.load(v[j, x : x + b])
                tile += np.exp(left - known[:, 0])[:, None] * right
                memory.free(left.size + right.size)
            memory.store(out[i : i + b, x : x + b], tile / known[:, 1:])
            memory.free(known.size)
    return out


_LOOPS: dict[str, tuple[Callable[..., Matrix], Callable[[int, int], int]]] = {
    "flash": (_strips, strip),
    "rows": (_strips, lambda width, memory: 1),
    "tiles": (_tiles, lambda width, memory: side(memory)),
}


@cache
def run(schedule: str, n: int, d: int, memory: int) -> tuple[int, float]:
    """Attention of N queries and keys by a schedule: numbers moved, and how far its output is from plain attention's."""
    q, k, v = np.random.default_rng(0).standard_normal((3, n, d))
    fast = FastMemory(memory)
    loops, tile = _LOOPS[schedule]
    out = loops(q, k, v, fast, tile(d, memory))
    weights = np.exp(q @ k.T - (q @ k.T).max(1, keepdims=True))
    return fast.moved, float(np.abs(out - weights @ v / weights.sum(1, keepdims=True)).max())


def counted(technique: AttentionIO, n: int, d: int, memory: int) -> float:
    """Numbers moved by the schedule that the technique chooses; NaN if its output is wrong."""
    name = technique.choose(n, n, d, memory)
    moved, error = run(name, n, d, 5 * d if name == "rows" else memory)  # which needs and uses no more: run it once
    return moved if error < 1e-9 else math.nan


def _slope(xs: list[int], ys: list[float]) -> float:
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def large_memory_exponent(technique: AttentionIO) -> float:
    """The power of M that the counts follow at and above d^2."""
    sizes = [256 << power for power in range(5)]
    return _slope(sizes, [counted(technique, 1024, 16, memory) for memory in sizes])


def small_memory_exponent(technique: AttentionIO) -> float:
    """The power of M that the counts follow below d^2, at sizes whose tiles of 32, 64 and 128 fit evenly."""
    sizes = [(tile + 2) ** 2 - 4 for tile in (32, 64, 128)]
    return _slope(sizes, [counted(technique, 256, 256, memory) for memory in sizes])


def width_exponent(technique: AttentionIO) -> float:
    """The power of d that the counts follow while d^2 is at most M."""
    widths = [16, 24, 32, 45]
    return _slope(widths, [counted(technique, 512, width, 2048) for width in widths])


def crossover(technique: AttentionIO) -> float:
    """Fast memory over d^2 from which on strips move less than tiles."""
    return technique.crossover(65_536, 65_536, 128) / 128**2


def spread(technique: AttentionIO) -> float:
    """The largest over the smallest ratio of counts to the bound across both regimes."""
    n, d = 1024, 64
    ratios: list[Any] = [counted(technique, n, d, memory) / bound(n, n, d, memory) for memory in (512 << p for p in range(6))]
    return float(max(ratios) / min(ratios))


def gain_over_flash(technique: AttentionIO) -> float:
    """How much less than FlashAttention it moves in a memory that holds a strip of two queries."""
    n, d, memory = 256, 256, 2048
    return run("flash", n, d, memory)[0] / counted(technique, n, d, memory)
