"""What Pipette claims, on clusters whose links are drawn at random: its estimate, its pick, and what nominal links cost."""

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import permutations

from narrows.machine import Cluster, cluster
from narrows.measured.published import Shape, decoder
from narrows.simulate.placement import Links, Stage, placed_seconds, played
from narrows.techniques.training_parallelism.pipette import Pick, Pipette

_SHAPE, _SEQUENCE, _SEEDS = Shape(4096, 48, 32), 2048, 5


def _cluster() -> Cluster:
    """Nodes of 8 A100 that share a card of 100 Gb/s."""
    group = cluster("aws-p4d")
    assert group.scale_out
    return replace(group, scale_out=replace(group.scale_out, bandwidth_bytes_per_s=12.5e9 / 8))


def _sized(technique: Pipette, seed: int, nodes: int) -> Pipette:
    return replace(technique, seed=seed, nodes=nodes, spread=0.8)


@cache
def _stages(nodes: int, batch: int) -> tuple[Stage, ...]:
    group = replace(_cluster(), nodes=nodes)
    return tuple(Pipette(nodes=nodes).stages(decoder(_SHAPE, _SEQUENCE), group, batch, _SEQUENCE))


def _links(technique: Pipette) -> Links:
    return technique.bandwidths(_cluster())


@cache
def _pick(technique: Pipette, batch: int) -> Pick:
    return technique.pick(decoder(_SHAPE, _SEQUENCE), _cluster(), _links(technique), batch, _SEQUENCE)


def _drawn(seed: int, nodes: int, batch: int) -> Iterator[tuple[Stage, tuple[tuple[int, ...], ...]]]:
    draw = random.Random(seed)
    for stage in _stages(nodes, batch):
        flat, p = draw.sample(range(nodes), nodes), stage.layout.pipeline
        yield stage, tuple(tuple(flat[r * p : (r + 1) * p]) for r in range(nodes // p))


def estimate_error(technique: Pipette) -> float:
    """Mean error of the estimated step against the played one, over configurations with nodes in random order."""
    found = []
    for seed in range(_SEEDS):
        links = _links(_sized(technique, seed, 6))
        known = links if technique.measured else links * 0 + links.max()
        for stage, order in _drawn(seed, 6, 192):
            found.append(abs(placed_seconds(stage, order, known) / played(stage, order, links) - 1))
    return sum(found) / len(found)


def gap_to_exhaustive(technique: Pipette) -> float:
    """The pick's played time over the least of all configurations that fit and all placements; infinite if it does not fit."""
    worst, room = 1.0, _cluster().machine.memory.capacity_bytes
    for seed in range(_SEEDS):
        sized = _sized(technique, seed, 6)
        links, chosen = _links(sized), _pick(sized, 192)
        least = math.inf
        for stage in (s for s in _stages(6, 192) if s.held_bytes <= room):
            p = stage.layout.pipeline
            orders = {tuple(sorted(flat[r * p : (r + 1) * p] for r in range(6 // p))) for flat in permutations(range(6))}
            expected = {order: placed_seconds(stage, order, links) for order in orders}
            near = sorted(orders, key=expected.__getitem__)[:5]  # the estimate is within a percent: see estimate_error
            least = min(least, *(played(stage, order, links) for order in near))
        fits = chosen.stage.held_bytes <= room
        worst = max(worst, played(chosen.stage, chosen.order, links) / least if fits else math.inf)
    return worst


def over_nominal(technique: Pipette) -> float:
    """Played seconds of what nominal links choose, among configurations that fit, over those of the pick, on five clusters."""
    ours = theirs = 0.0
    for seed in range(_SEEDS):
        sized = _sized(technique, seed, 12)
        links, chosen = _links(sized), _pick(sized, 192)
        plain = replace(sized, moves=0).pick(decoder(_SHAPE, _SEQUENCE), _cluster(), links * 0 + links.max(), 192, _SEQUENCE)
        ours += played(chosen.stage, chosen.order, links)
        theirs += played(plain.stage, plain.order, links)
    return theirs / ours
