"""What Holmes claims: a step on nodes with two kinds of cards, against one kind, and against Ethernet; and its placement."""

import random
from dataclasses import replace
from functools import cache
from itertools import permutations

from narrows.machine import cluster
from narrows.measured.published import Shape, decoder
from narrows.simulate.placement import played
from narrows.techniques.training_parallelism.holmes import KINDS, Holmes

_SHAPE, _SEQUENCE, _BATCH, _GROUP = Shape(4096, 36, 32), 2048, 192, cluster("aws-p4d")


@cache
def _seconds(technique: Holmes, kinds: tuple[str, ...]) -> float:
    """A step; every second node has the other kind of card unless told otherwise."""
    sized = replace(technique, nodes=len(kinds), stages=2)
    return sized.run(decoder(_SHAPE, _SEQUENCE), _GROUP, kinds, _BATCH, _SEQUENCE)[1]


def of_rdma(technique: Holmes) -> float:
    """Speed over that of InfiniBand alone."""
    return min(_seconds(Holmes(), KINDS[:1] * 2 * n) / _seconds(technique, KINDS * n) for n in (2, 4))


def over_ethernet(technique: Holmes) -> float:
    """Speed over that of Ethernet alone."""
    return min(_seconds(Holmes().baseline(), KINDS * n) / _seconds(technique, KINDS * n) for n in (2, 4))


def gap_to_exhaustive(technique: Holmes) -> float:
    """Its step over the least of all placements, the worst of random orders of the nodes."""
    draw, worst, graph = random.Random(0), 1.0, decoder(_SHAPE, _SEQUENCE)
    for stages in (2, 3):
        sized = replace(technique, nodes=6, stages=stages)
        many = 3 if stages == 2 else 2  # as many of each kind as a stage has nodes, so that there is a placement without Ethernet
        for _ in range(20):
            kinds = tuple(draw.sample([KINDS[0]] * (6 - many) + [KINDS[1]] * many, 6))
            stage, seconds = sized.run(graph, _GROUP, kinds, _BATCH, _SEQUENCE)
            links = replace(sized, sorted_by_card=True).links(kinds)
            rows = 6 // stages
            shapes = {tuple(sorted("".join(kinds[n][0] for n in flat[r * stages : (r + 1) * stages]) for r in range(rows))): flat
                      for flat in permutations(range(6))}  # fmt: skip
            orders = (tuple(flat[r * stages : (r + 1) * stages] for r in range(rows)) for flat in shapes.values())
            worst = max(worst, seconds / min(played(stage, order, links) for order in orders))
    return worst
