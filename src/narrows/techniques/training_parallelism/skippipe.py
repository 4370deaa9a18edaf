"""Let each microbatch skip some stages of the pipeline, and choose its path so that nodes and slow links are not in its way.

A decoder bears it that a sequence leaves out blocks, or takes them in another order. Where stages have several nodes a
microbatch also chooses among those. Paths are planned together: each microbatch takes the cheapest path past the load of
the others; then the one that ends last is planned again, alone or in exchange with another, as long as the step gets
shorter. Every stage but the first is skipped equally often, so that all blocks learn the same.

## When it helps
Nodes far from each other: what a skipped stage saves is its time and two messages. The network learns to do without some
of its blocks, and loses less when a part of them is left out at inference.

## When it does not
Training is another one: each block sees a share of the data only. The small model of our check ended 12 % higher in
perplexity on its own paths than one trained whole in as many steps. In one room, with fast links, the gain is the skipped
work alone.

## Reference
Blagoev, Chen and Ersoy, SkipPipe: Partial and Reordered Pipelining Framework for Training LLMs in Heterogeneous Networks,
2025, arXiv 2502.19913. The search is ours: replanning one path at a time on a simulation of the whole step, where the
paper searches conflicts among paths.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations, product
from typing import ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.simulate.pipeline import Order, Pass, Work
from narrows.simulate.schedule import Need, Task, play
from narrows.simulate.timeline import Timeline
from narrows.technique import Card, Claim, No, Schedules, Verdict, choice

Path = tuple[int, ...]  # the ranks that a microbatch visits, in turn


@dataclass(frozen=True)
class SkipPipe(Schedules):
    """Paths that leave out a share of the stages. A stage of the work is one rank; `nodes` says which hold the same blocks."""

    card: ClassVar[Card] = Card(
        "skippipe",
        relieves=(Limit.SCHEDULING, Limit.COMMUNICATION, Limit.COMPUTE),
        phases=("train",),
        exact=False,
        price="every block but the first stage's sees a share of the microbatches",
        claims=(
            Claim("iteration_cut", "%", 55, "simulated, 20 nodes in 5 regions, 6 stages, a third skipped, against the full "
                  "pipeline on the same nodes; not a number if stages are visited unequally", "abstract: up to 55 %", "simulated",
                  "a third of the work and two fifths of the messages fall away; the rest is the search", at_least=40),
            Claim("path_gain", "x", None, "the same: as many stages skipped on paths drawn in turn, over ours", "section 5",
                  "simulated", "the choice of paths counts, not the skipping alone", at_least=1.1),
            Claim("half_perplexity", "x", 1.07, "a character model of 8 stages trained with a third skipped: its median half "
                  "over all stages or its training paths, whichever is lower", "abstract", "run",
                  "twice the paper's loss, for a model this small", at_most=1.15),
        ),
    )  # fmt: skip
    skip: float = choice(1 / 3, 0.25, 0.5, 0.0, help="share of the stages that a microbatch leaves out")
    swap: bool = choice(True, False, help="stages in any order")
    search: bool = choice(True, False, help="plan paths by their time; without it they are drawn in turn")
    nodes: tuple[tuple[int, ...], ...] = ()  # the ranks that hold each stage of the model; none: each rank another

    def __post_init__(self) -> None:
        if not 0 <= self.skip < 1:
            raise NarrowsError(f"a share of {self.skip:g}.", where="skippipe: skip", remedy="Give a share from 0 to below 1.")

    def baseline(self) -> "SkipPipe":
        return SkipPipe(skip=0.0, swap=False, search=False, nodes=self.nodes)

    def check(self, work: Work) -> Verdict:
        """Needs a stage that can be left out."""
        return True if self._visits(len(self._holders(work))) < len(self._holders(work)) else No("no stage would be left out")

    def _holders(self, work: Work) -> tuple[tuple[int, ...], ...]:
        found = self.nodes or tuple((rank,) for rank in range(work.stages))
        if sorted(rank for held in found for rank in held) != list(range(work.stages)):
            raise NarrowsError(
                "it does not name each rank once.", where="skippipe: nodes", remedy=f"Place ranks 0 to {work.stages - 1}."
            )
        return found

    def _visits(self, stages: int) -> int:
        """How many stages a microbatch visits: the first always, and at least one more where there is one."""
        return min(stages, max(2, stages - round(self.skip * stages)))

    def order(self, work: Work) -> Order:
        """The passes of each rank in the order in which the planned paths bring them there."""
        holders = self._holders(work)
        sets = _balanced(len(holders), self._visits(len(holders)), work.microbatches)
        paths = [self._first(holders, m, stages) for m, stages in enumerate(sets)]
        if self.search:
            paths = self._planned(holders, work, paths)
        timeline = _simulate(paths, work)
        rows = tuple(tuple(timeline.spans[i].name for i in timeline.lanes.get(rank, ())) for rank in range(work.stages))
        return Order(rows, dict(enumerate(paths)))  # type: ignore[arg-type]

    def _first(self, holders: Sequence[Path], m: int, stages: Sequence[int]) -> Path:
        """The path in the order of the stages, nodes by turns."""
        return tuple(holders[stage][m % len(holders[stage])] for stage in (0, *stages))

    def _choices(self, holders: Sequence[Path], origin: int, stages: Sequence[int]) -> Iterator[Path]:
        """Every path from an origin through the stages."""
        for turn in permutations(stages) if self.swap else [tuple(stages)]:
            for ranks in product(*(holders[stage] for stage in turn)):
                yield (origin, *ranks)

    def _planned(self, holders: Sequence[Path], work: Work, paths: list[Path]) -> list[Path]:
        stage_of = {rank: stage for stage, held in enumerate(holders) for rank in held}
        busy = [f + b for f, b in zip(work.of_kind("F"), work.of_kind("B"), strict=True)]

        def load(path: Path) -> float:
            """Its own time, and what it adds to ranks that others use."""
            messages = sum(work.send_seconds(a, b) + work.send_seconds(b, a) for a, b in pairwise(path))
            return messages + sum(busy[rank] * (1 + sum(rank in other for other in paths)) for rank in path)

        def best(m: int, stages: Sequence[int], count: int) -> list[Path]:
            mine, paths[m] = paths[m], ()
            found = sorted(self._choices(holders, mine[0], stages), key=load)[:count]
            paths[m] = mine
            return found

        sets = [sorted(stage_of[rank] for rank in path[1:]) for path in paths]
        for m in range(len(paths)):
            paths[m] = best(m, sets[m], 1)[0]
        shortest, improved = _simulate(paths, work).seconds, True
        while improved:
            improved = False
            for m in _latest(paths, work)[:3]:
                moves = [{m: path} for path in best(m, sets[m], 12)]
                for other in range(len(paths)):
                    if sets[other] != sets[m]:
                        moves.append({m: best(m, sets[other], 1)[0], other: best(other, sets[m], 1)[0]})
                tried = [(_simulate([move.get(i, path) for i, path in enumerate(paths)], work).seconds, n)
                         for n, move in enumerate(moves)]  # fmt: skip
                seconds, n = min(tried)
                if seconds < shortest * (1 - 1e-9):
                    shortest, improved = seconds, True
                    for i, path in moves[n].items():
                        paths[i] = path
                        sets[i] = sorted(stage_of[rank] for rank in path[1:])
                    break
        return paths


def _balanced(stages: int, visits: int, microbatches: int) -> list[tuple[int, ...]]:
    """For each microbatch the stages that it visits beside the first, each stage as often as any other, in rotation."""
    others = range(stages - 1)
    return [tuple(sorted((m * (visits - 1) + i) % (stages - 1) + 1 for i in others[: visits - 1])) for m in range(microbatches)]


def _simulate(paths: Sequence[Path], work: Work) -> Timeline:
    """The step with these paths; a rank that is free takes a backward pass first, then the first microbatch."""
    tasks: list[Task] = []
    forward, backward = work.of_kind("F"), work.of_kind("B")
    for m, path in enumerate(paths):
        before: list[Need] = []
        for kind, ranks in (("F", path), ("B", path[::-1])):
            for i, rank in enumerate(ranks):
                seconds = (forward if kind == "F" else backward)[rank]
                tasks.append(
                    Task(Pass(kind, rank, m), kind, rank, seconds, tuple(before), priority=m + (kind == "F") * len(paths))
                )
                following = ranks[i + 1] if i + 1 < len(ranks) else rank
                before = [(len(tasks) - 1, work.send_seconds(rank, following))]
    return play(tasks)


def _latest(paths: Sequence[Path], work: Work) -> list[int]:
    """The microbatches by when they end, last first."""
    ends = [0.0] * len(paths)
    for span in _simulate(paths, work).spans:
        m = span.name.microbatch  # type: ignore[attr-defined]
        ends[m] = max(ends[m], span.end)
    return sorted(range(len(paths)), key=lambda m: -ends[m])
