"""What OneFlow's algebra claims, tried with numbers: products and conversions on emulated devices that count what they send."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from narrows.capture import capture
from narrows.graph import Graph
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.training_parallelism.oneflow_sbp import MATMUL, SBP, STATES, Edge, Signature

Tensor = NDArray[np.float64]
Shards = list[Tensor]
_AXES = {"rows": 0, "features": 1}


def _held(tensor: Tensor, state: str, devices: int) -> Shards:
    """A tensor as devices hold it; summands are drawn at random."""
    if state in _AXES:
        return np.array_split(tensor, devices, _AXES[state])
    if state == "whole":
        return [tensor.copy() for _ in range(devices)]
    draw = np.random.default_rng(5)
    parts = [draw.normal(size=tensor.shape) for _ in range(devices - 1)]
    return [*parts, tensor - np.sum(parts, 0)]


def _value(shards: Shards, state: str, shape: tuple[int, ...]) -> Tensor | None:
    """The tensor that shards stand for; None where they stand for none of this shape."""
    if state in _AXES:
        sizes = {s.shape[1 - _AXES[state]] for s in shards}
        found = np.concatenate(shards, _AXES[state]) if len(sizes) == 1 else None
    elif len({s.shape for s in shards}) > 1 or (state == "whole" and any(not np.allclose(s, shards[0]) for s in shards)):
        return None
    else:
        found = shards[0] if state == "whole" else np.sum(shards, 0)
    return found if found is not None and found.shape == shape else None


def matmul_signatures(technique: SBP) -> float:
    """Of all 64 ways to hold x, w and y those that hold for numbers: how many the technique knows, less others it names."""
    draw = np.random.default_rng(3)
    x, w = draw.normal(size=(6, 9)), draw.normal(size=(9, 12))
    right = set()
    for one in (Signature(*states) for states in product(STATES, repeat=3)):
        shards = list(zip(_held(x, one.x, 3), _held(w, one.weight, 3), strict=True))
        if all(a.shape[1] == b.shape[0] for a, b in shards):
            found = _value([a @ b for a, b in shards], one.y, (6, 12))
            if found is not None and np.allclose(found, x @ w):
                right.add(one)
    named = set(technique.matmul())
    return float(len(named & right) - len(named - right))


class _Wire:
    """Devices in a ring that count the elements they send."""

    def __init__(self) -> None:
        self.sent = 0

    def send(self, piece: Tensor) -> Tensor:
        self.sent += piece.size
        return piece.copy()

    def gather(self, shards: Shards, axis: int) -> Shards:
        n = len(shards)
        held = [{i: s} for i, s in enumerate(shards)]
        for turn in range(n - 1):
            for i in range(n):
                piece = (i - turn) % n
                held[(i + 1) % n][piece] = self.send(held[i][piece])
        return [np.concatenate([own[i] for i in range(n)], axis) for own in held]

    def scatter(self, shards: Shards, axis: int) -> Shards:
        n = len(shards)
        held = [list(np.array_split(s, n, axis)) for s in shards]
        for turn in range(n - 1):
            for i in range(n):
                piece = (i - turn - 1) % n
                after = held[(i + 1) % n]
                after[piece] = after[piece] + self.send(held[i][piece])
        return [held[i][i] for i in range(n)]

    def exchange(self, shards: Shards, have: int, want: int) -> Shards:
        n = len(shards)
        cut = [np.array_split(s, n, want) for s in shards]
        return [np.concatenate([cut[i][j] if i == j else self.send(cut[i][j]) for i in range(n)], have) for j in range(n)]


def _converted(wire: _Wire, shards: Shards, have: str, want: str) -> Shards:
    """The shards in another state, with the messages that this takes."""
    n, first = len(shards), [np.zeros_like(shards[0])] * (len(shards) - 1)
    if have == want:
        return shards
    if have == "whole":
        return [shards[0], *first] if want == "partial" else np.array_split(shards[0], n, _AXES[want])
    if have == "partial":
        pieces = wire.scatter(shards, _AXES.get(want, 0))
        return wire.gather(pieces, 0) if want == "whole" else pieces
    axis = _AXES[have]
    if want == "whole":
        return wire.gather(shards, axis)
    if want in _AXES:
        return wire.exchange(shards, axis, _AXES[want])
    sizes = np.cumsum([0, *(s.shape[axis] for s in shards)])  # each fills what it has not with zeros
    pad = [[(0, 0), (0, 0)] for _ in shards]
    for i in range(n):
        pad[i][axis] = (int(sizes[i]), int(sizes[-1] - sizes[i + 1]))
    return [np.pad(s, p) for s, p in zip(shards, pad, strict=True)]


def conversions_right(technique: SBP) -> float:
    """Share of conversions that keep the tensor's value and send as many elements as the technique's closed form says."""
    draw, right = np.random.default_rng(4), []
    for devices, (have, want) in product((2, 3, 4, 5), product(STATES, repeat=2)):
        tensor, wire = draw.normal(size=(60, 120)), _Wire()
        found = _value(_converted(wire, _held(tensor, have, devices), have, want), want, tensor.shape)
        said = devices * replace(technique, devices=devices).moved(tensor.size, have, want)
        right.append(found is not None and np.allclose(found, tensor) and math.isclose(said, wire.sent, rel_tol=1e-12))
    return float(np.mean(right))


@cache
def _faces() -> Graph:
    """ResNet-50 whose output layer has a million classes."""
    graph = capture("resnet-50")
    return graph.map(lambda op: op.but(outputs=1_000_000) if op.kind == "linear" else op)


def classes_gain(technique: SBP) -> float:
    """Bytes of data parallelism over those that the technique comes to, 8 images a device."""
    found = technique.measure(_faces(), machine("a100-80gb"), Step.train(64, 1)).values
    return found["bytes_of_data_parallelism"] / found["bytes"]


def gap_to_exhaustive(technique: SBP) -> float:
    """The most elements that the technique's choice sends over the least that any choice does, over random networks."""
    draw, worst = np.random.default_rng(7), 1.0
    judge: Callable[..., float] = SBP().cost
    for _ in range(40):
        widths = 2.0 ** draw.integers(6, 14, size=8)
        rows = 2.0 ** draw.integers(4, 14)
        known: Sequence[Signature] = MATMUL[:3]
        ops = [(known, float(a * b)) for a, b in pairwise(widths)]
        edges = [Edge(i, i + 1, float(rows * widths[i + 1]), 1.0) for i in range(6)]
        if draw.random() < 0.5:
            edges.append(Edge(1, 5, float(rows * widths[2]), 1.0))
        least = min(judge(ops, edges, chosen) for chosen in product(known, repeat=7))
        own = [(known if technique.signatures else MATMUL[:1], parameters) for _, parameters in ops]
        worst = max(worst, judge(ops, edges, technique.search(own, edges)) / least)
    return worst


def pipelining(technique: SBP) -> float:
    """Pieces a second of a row of equal actors over those with one buffer each; not a number where a buffer overflows."""
    actors, pieces = [1.0] * 4, 64
    timeline = technique.act(actors, pieces)
    spans = {span.name: span for span in timeline.spans}
    for actor in range(len(actors) - 1):
        for piece in range(pieces):
            begun = spans[actor, piece].start
            unread = sum(spans[actor, p].start <= begun < spans[actor + 1, p].end for p in range(pieces))
            if unread > technique.buffers:
                return math.nan
    return replace(technique, buffers=1).act(actors, pieces).seconds / timeline.seconds
