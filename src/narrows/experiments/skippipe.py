"""What SkipPipe claims: on a simulated cluster of twenty nodes, and on a small language model trained with skipped stages."""

import itertools
import math
import random
import statistics
from collections import Counter
from dataclasses import replace
from functools import cache

from narrows.experiments.pipelines import model
from narrows.experiments.steady import one_thread
from narrows.samples import text
from narrows.simulate.pipeline import Work
from narrows.techniques.training_parallelism.skippipe import SkipPipe

# one way between regions: ms, GiB/s, as the paper's authors measured them (gensyn-ai/skippipe, communication_costs.py)
LINKS = {
    ("Germany", "LA"): (73, 0.01825), ("Germany", "NL"): (3.5, 0.2425), ("Germany", "Oregon"): (68, 0.01492),
    ("Germany", "Singapore"): (80, 0.0125), ("LA", "NL"): (71.5, 0.01425), ("LA", "Oregon"): (12.4, 0.1185),
    ("LA", "Singapore"): (79.5, 0.01685), ("NL", "Oregon"): (67, 0.02039), ("NL", "Singapore"): (81.5, 0.01636),
    ("Oregon", "Singapore"): (78.5, 0.01678),
}  # fmt: skip
WITHIN = (1, 2.0)
REGIONS = ("LA", "NL", "Germany", "Singapore", "Oregon")
NODES, SIZES, MICROBATCHES = 20, (5, 3, 3, 3, 3, 3), 15
MESSAGE_BYTES = 4 * 1024 * 1024 * 8  # fp32, width 1024, 1024 tokens, 8 sequences
FORWARD_SECONDS = 0.055 * 4 * 8  # of a layer and sequence, measured there; 4 layers, 8 sequences


def _cluster() -> Work:
    where = [REGIONS[node % len(REGIONS)] for node in range(NODES)]

    def seconds(a: str, b: str) -> float:
        ms, gib_per_s = LINKS.get((a, b)) or LINKS.get((b, a)) or WITHIN
        return ms / 1e3 + MESSAGE_BYTES / (gib_per_s * 2**30)

    table = [[seconds(a, b) for b in where] for a in where]
    return Work.of(NODES, MICROBATCHES, FORWARD_SECONDS, FORWARD_SECONDS, FORWARD_SECONDS, table)


@cache
def _placed() -> tuple[tuple[int, ...], ...]:
    """Which nodes hold which stage: of 300 placements at random the one on which the full pipeline is fastest."""
    draw, found = random.Random(0), list[tuple[float, tuple[tuple[int, ...], ...]]]()
    for _ in range(300):
        ranks = draw.sample(range(NODES), NODES)
        nodes = tuple(tuple(ranks[sum(SIZES[:i]) :][:size]) for i, size in enumerate(SIZES))
        found.append((SkipPipe(nodes=nodes).baseline().play(_cluster()).seconds, nodes))
    return min(found)[1]


@cache
def _seconds(technique: SkipPipe) -> float:
    """The step under the technique; not a number where one stage is visited more often than another."""
    placed = replace(technique, nodes=_placed())
    order = placed.order(_cluster())
    stage_of = {rank: stage for stage, held in enumerate(_placed()) for rank in held}
    visits = Counter(stage_of[rank] for path in order.paths.values() for rank in path[1:])
    even = len(set(visits.values())) == 1 and len(visits) == len(SIZES) - 1
    return order.play(_cluster()).seconds if even else math.nan


def iteration_cut(technique: SkipPipe) -> float:
    """Percent that the step is shorter than the full pipeline's."""
    return 100 * (1 - _seconds(technique) / _seconds(technique.baseline()))


def path_gain(technique: SkipPipe) -> float:
    """The step with paths drawn in turn over the step with ours, as many stages skipped."""
    return _seconds(SkipPipe(search=False, swap=False)) / _seconds(technique)


@cache
@one_thread()
def half_perplexity(technique: SkipPipe) -> float:
    """Perplexity of the median half of the stages over that of all stages or of the paths trained on, whichever is lower."""
    import torch
    from torch import nn

    stages, steps, context, rows = 8, 500, 32, 8
    prose = text()[1]
    letters = sorted(set(prose))
    data = torch.tensor([letters.index(letter) for letter in prose[:400_000]])
    first, *middle, last = model(stages, blocks=1, symbols=len(letters))
    embedding, head = first[0].float(), last[-1].float()  # type: ignore[index]
    blocks = nn.ModuleList([first[1], *(part[0] for part in middle), last[0]]).float()  # type: ignore[index]
    paths = list(technique.order(Work.of(stages, 14)).paths.values())
    optimizer = torch.optim.AdamW([*embedding.parameters(), *blocks.parameters(), *head.parameters()], 3e-3)
    draw = torch.Generator().manual_seed(0)

    def loss(path: tuple[int, ...], at: torch.Tensor) -> torch.Tensor:
        x = data[at[:, None] + torch.arange(context + 1)]
        hidden = embedding(x[:, :-1])
        for stage in path:
            hidden = blocks[stage](hidden)
        found: torch.Tensor = nn.functional.cross_entropy(head(hidden).flatten(0, 1), x[:, 1:].flatten())
        return found

    train = len(data) * 9 // 10
    for step in range(steps):
        optimizer.zero_grad()
        for path in (paths[(4 * step + i) % len(paths)] for i in range(4)):
            (loss(path, torch.randint(train - context, (rows,), generator=draw)) / 4).backward()
        optimizer.step()
    held_out = torch.arange(train, len(data) - context - 1, 4 * context)
    with torch.no_grad():
        halves = [(0, *rest) for rest in itertools.combinations(range(1, stages), stages // 2 - 1)]
        half = statistics.median(float(loss(half, held_out)) for half in halves)
        trained = statistics.fmean(float(loss(path, held_out)) for path in paths)
        return math.exp(half - min(trained, float(loss(tuple(range(stages)), held_out))))
