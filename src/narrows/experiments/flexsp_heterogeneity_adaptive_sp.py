"""What FlexSP claims, on steps with a long tail of lengths, and against all groups and assignments on small steps."""

import math
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np

from narrows.machine import cluster
from narrows.measured.published import Shape, decoder
from narrows.techniques.training_parallelism.flexsp_heterogeneity_adaptive_sp import FlexSP, Rates, assign, step_seconds

_LIMIT = 393_216


@cache
def _lengths(seed: int) -> tuple[int, ...]:
    """512 lengths: lognormal around 2 Ki, which puts a few in a thousand beyond 64 Ki; an assumption like web text and code."""
    draw = np.random.default_rng(seed).lognormal(np.log(2048), 1.5, 512)
    return tuple(int(n) for n in np.clip(draw, 64, _LIMIT))


@cache
def _rates(technique: FlexSP) -> Rates:
    return technique.rates(decoder(Shape(4096, 32, 32), 4096), cluster("aws-p4d"))


@cache
def _seconds(technique: FlexSP, seed: int) -> float:
    """A step's seconds; NaN where a device holds too much or a sequence is lost."""
    rates, lengths = _rates(technique), _lengths(seed)
    plan = technique.plan(rates, lengths)
    kept = sorted(n for groups in plan for g in groups for n in g.lengths)
    full = any(sum(g.lengths) > g.size * rates.tokens_held for groups in plan for g in groups)
    wide = any(sum(g.size for g in groups) > technique.devices for groups in plan)
    return math.nan if full or wide or kept != sorted(lengths) else step_seconds(rates, plan)


def speedup(technique: FlexSP) -> float:
    """Seconds of three steps with one size that holds the limit, over the technique's."""
    return sum(_seconds(FlexSP().baseline(), s) for s in range(3)) / sum(_seconds(technique, s) for s in range(3))


def over_best_static(technique: FlexSP) -> float:
    """The same against the best single size for each step."""
    rates, total = _rates(technique), 0.0
    for seed in range(3):
        sizes = [size * rates.tokens_held for size in rates.sizes if size * rates.tokens_held >= max(_lengths(seed))]
        total += min(step_seconds(rates, FlexSP().single(rates, _lengths(seed), int(limit))) for limit in sizes)
    return total / sum(_seconds(technique, s) for s in range(3))


def gap_to_exhaustive(technique: FlexSP) -> float:
    """The slowest group's seconds over the least that any groups and assignment give, the worst of 30 random steps."""
    draw, small = np.random.default_rng(1), FlexSP(devices=8)
    rates = small.rates(decoder(Shape(4096, 32, 32), 4096), replace(cluster("aws-p4d"), devices_per_node=2))
    worst = 1.0
    ways = [
        sizes
        for n in range(1, 9)
        for sizes in product((8, 4, 2, 1), repeat=n)
        if sum(sizes) == 8 and list(sizes) == sorted(sizes)
    ]
    for _ in range(30):
        lengths = [int(n) for n in draw.uniform(0.1, 3.0, draw.integers(2, 7)) * rates.tokens_held]
        least = min(_least(rates, sizes, lengths) for sizes in ways)
        if not math.isfinite(least):
            continue
        if technique.flexible:
            ours = max(g.seconds for g in small.groups(rates, lengths))
        else:
            groups, left = assign(rates, [8], sorted(lengths))
            ours = math.inf if left else groups[0].seconds
        worst = max(worst, ours / least)
    return worst


def _least(rates: Rates, sizes: tuple[int, ...], lengths: list[int]) -> float:
    """The least time of the slowest group over all assignments to groups of these sizes."""
    order = sorted(lengths, reverse=True)
    best = math.inf

    def place(i: int, spent: list[float], room: list[float]) -> None:
        nonlocal best
        if max(spent) >= best:
            return
        if i == len(order):
            best = max(spent)
            return
        tried = set()
        for g, size in enumerate(sizes):
            if room[g] >= order[i] and (size, spent[g]) not in tried:
                tried.add((size, spent[g]))
                after = float(rates.seconds(size, order[i]))
                spent[g] += after
                room[g] -= order[i]
                place(i + 1, spent, room)
                spent[g] -= after
                room[g] += order[i]

    place(0, [0.0] * len(sizes), [size * rates.tokens_held for size in sizes])
    return best
