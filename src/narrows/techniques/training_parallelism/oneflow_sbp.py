"""Say of every tensor how devices hold it (split, whole or partial), and let the collectives and the parallelism follow.

An operator has signatures: with inputs held like this, its result is held like that, without a message. Where a result is
not held as its reader wants it, a conversion is inserted, whose bytes are known in closed form; gradients travel back
through the mirrored conversion, and a weight that every device holds whole has its gradient summed. Choosing a signature
for each operator so that the fewest bytes move is then data, tensor or mixed parallelism, found and not programmed. At run
time every operator is an actor that works when its inputs are there and one of its few output buffers is free.

## When it helps
Networks whose layers differ: convolutions have few weights and large results (split the batch), the output layer over
millions of classes has the opposite (split the weights).

## When it does not
Bytes are not time: messages that hide behind computation, and links that differ, are for `narrows plan train`. Memory is
not weighed here.

## Reference
Yuan et al., OneFlow: Redesign the Distributed Deep Learning Framework from Scratch, 2021, arXiv 2110.15032. The search is
ours: one operator's signature at a time, as long as bytes fall, from several starts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar, NamedTuple

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Graph, Op
from narrows.kinds import KINDS
from narrows.machine import Machine
from narrows.parallel import boxing, is_layer
from narrows.simulate.schedule import Need, Task, play
from narrows.simulate.timeline import Timeline
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

STATES = ("rows", "features", "whole", "partial")
_MIRROR = {"rows": "rows", "features": "features", "whole": "partial", "partial": "whole"}  # how the gradient of a tensor is held


class Signature(NamedTuple):
    """How a product's input, weight and result are held. Only a `whole` weight under split rows has a gradient to sum."""

    x: str
    weight: str
    y: str


# of y = x w: rows of x and y are tokens; a weight is split by its outputs (features) or by its inputs (rows)
MATMUL = (
    Signature("rows", "whole", "rows"),
    Signature("whole", "features", "features"),
    Signature("features", "rows", "partial"),
    Signature("partial", "whole", "partial"),
    Signature("whole", "partial", "partial"),
    Signature("whole", "whole", "whole"),
)
_TRAINED = MATMUL[:3]  # those that divide the work of a product with weights
_EVEN = tuple(Signature(s, "whole", s) for s in ("rows", "features"))
_SUMS = (*_EVEN, Signature("whole", "whole", "whole"), Signature("partial", "whole", "partial"))
_BY_ROWS = (Signature("rows", "whole", "rows"), Signature("whole", "whole", "whole"))


class Edge(NamedTuple):
    """A result that an operator reads `times` a step: the operators' places, and elements."""

    source: int
    target: int
    elements: float
    times: float


@dataclass(frozen=True)
class SBP(Measures):
    """Finds how each operator is best held by `devices`, against the same network under data parallelism."""

    card: ClassVar[Card] = Card(
        "oneflow-sbp",
        relieves=(Limit.COMMUNICATION, Limit.CAPACITY),
        phases=("train",),
        exact=True,
        claims=(
            Claim("matmul_signatures", "signatures", 6, "ways to hold x, w and y of a product on 3 devices, tried with numbers: "
                  "right ones less wrong ones", "table 1", "checked", "all six and no other", 6, 6),
            Claim("conversions_right", "fraction", None, "16 conversions on 2 to 5 devices, message by message: values kept, and "
                  "as many elements sent as the closed form says", "table 2", "checked", "each of them", at_least=1.0),
            Claim("classes_gain", "x", None, "ResNet-50 with a million classes, 8 devices: bytes of data parallelism over ours",
                  "section 6 (InsightFace)", "simulated", "its output layer alone is most of the weights", at_least=10),
            Claim("gap_to_exhaustive", "x", None, "40 random networks of 7 products, some with a branch: worst over least bytes",
                  "section 3", "checked", "search meets enumeration", at_most=1.0001),
            Claim("pipelining", "x", None, "4 actors in a row, 64 pieces: throughput over that with one buffer; not a number if "
                  "a buffer overflows", "section 4.3", "simulated", "with one buffer a producer waits for its reader: two, less "
                  "the filling", at_least=1.85),
        ),
    )  # fmt: skip
    devices: int = choice(8, 2, 64)
    signatures: bool = choice(True, help="choose a signature for each operator; False splits the batch for all of them")
    buffers: int = choice(2, 1, 3, help="results that an actor may have that are not yet read")

    def __post_init__(self) -> None:
        if self.devices < 1 or self.buffers < 1:
            raise NarrowsError(
                f"devices={self.devices}, buffers={self.buffers}.", where=self.card.slug, remedy="Give one at least."
            )

    def baseline(self) -> "SBP":
        return replace(self, signatures=False, buffers=1)

    def matmul(self) -> tuple[Signature, ...]:
        """The ways in which a product needs no message."""
        return MATMUL if self.signatures else MATMUL[:1]

    def moved(self, elements: float, have: str, want: str) -> float:
        """Elements that each device sends to turn a tensor of `elements` from one state into another."""
        if have == want:
            return 0.0
        if not self.signatures:  # by way of the whole tensor, which data parallelism alone has collectives for
            return _sent(boxing(have, "whole"), elements, self.devices)
        kind = boxing(have, want)
        return _sent(kind, elements / self.devices if kind == "all_to_all" else elements, self.devices)

    def choices(self, op: Op) -> tuple[Signature, ...]:
        """The signatures of an operator in training; those of a product divide its work."""
        if not self.signatures:
            return MATMUL[:1]
        if op.kind in ("linear", "embedding"):
            return _TRAINED if op.kind == "linear" else (_TRAINED[0], Signature("whole", "rows", "partial"))
        if op.kind == "conv":
            return _TRAINED if op["groups"] == 1 else _EVEN
        if op.kind in ("attention", "latent_attention", "scan", "matmul"):
            return _EVEN
        if op.kind == "elementwise" and op.name != "loss":
            return _SUMS if op.split == "sum" else _SUMS[:-1]
        return _BY_ROWS

    def cost(self, ops: Sequence[tuple[Sequence[Signature], float]], edges: Iterable[Edge], chosen: Sequence[Signature]) -> float:
        """Elements that a device sends in a step: conversions there and back, and gradients of weights."""
        found = sum(
            self.moved(parameters, "partial", "whole")
            for (_, parameters), one in zip(ops, chosen, strict=True)
            if one.weight == "whole" and one.y == "rows"
        )
        for edge in edges:
            have, want = chosen[edge.source].y, chosen[edge.target].x
            back = self.moved(edge.elements, _MIRROR[want], _MIRROR[have])
            found += edge.times * (self.moved(edge.elements, have, want) + back)
        return found

    def search(self, ops: Sequence[tuple[Sequence[Signature], float]], edges: Sequence[Edge]) -> list[Signature]:
        """The signatures that move least: two neighbours changed at a time while that helps, from every uniform start."""
        near: list[list[Edge]] = [[] for _ in ops]
        for edge in edges:
            near[edge.source].append(edge)
            near[edge.target].append(edge)
        best: tuple[float, list[Signature]] = float("inf"), []
        for start in STATES:
            chosen = [next((s for s in known if s.y == start), known[0]) for known, _ in ops]
            total, improved = self.cost(ops, edges, chosen), True
            while improved:
                improved = False
                for edge in edges:
                    pair = edge.source, edge.target
                    touched = list(dict.fromkeys([*near[pair[0]], *near[pair[1]]]))
                    few = [(ops[i][0], ops[i][1] if i in pair else 0.0) for i in range(len(ops))]

                    def part(at: Sequence[Signature], few: Any = few, touched: Any = touched) -> float:
                        return self.cost(few, touched, at)

                    before = part(chosen)
                    for a, b in product(ops[pair[0]][0], ops[pair[1]][0]):
                        tried = list(chosen)
                        tried[pair[0]], tried[pair[1]] = a, b
                        after = part(tried)
                        if after < before * (1 - 1e-9):
                            total, chosen, before, improved = total + after - before, tried, after, True
            if total < best[0]:
                best = total, chosen
        return best[1]

    def act(self, seconds: Sequence[float], pieces: int) -> Timeline:
        """Actors in a row: each takes a piece when the one before has made it and `buffers` of its own are not all unread."""
        tasks: list[Task] = []
        for piece in range(pieces):
            for actor, each in enumerate(seconds):
                needs: list[Need] = [(len(tasks) - 1, 0.0)] if actor else []
                if piece >= self.buffers and actor + 1 < len(seconds):  # its reader is done with an earlier piece
                    needs.append(((piece - self.buffers) * len(seconds) + actor + 1, 0.0))
                tasks.append(Task((actor, piece), "act", actor, each, tuple(needs)))
        return play(tasks)

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Bytes that a device sends in a training step, found and under data parallelism; a row for each operator."""
        ops, edges, known = self.network(graph, step)
        chosen = self.search(ops, edges)
        width = graph.ops[0].act.bits / 8
        alone = SBP(self.devices, signatures=False)
        plain = [MATMUL[0]] * len(ops)
        values = {
            "bytes": width * self.cost(ops, edges, chosen),
            "bytes_of_data_parallelism": width * alone.cost(ops, edges, plain),
        }
        wire = machine.link or machine.host_link
        if wire:
            values["seconds"] = values["bytes"] / wire.bandwidth_bytes_per_s
        rows: list[Mapping[str, Any]] = [
            {"op": op.name, "kind": op.kind, "input": one.x, "weight": one.weight if op.parameters else "", "result": one.y}
            for op, one in zip(known, chosen, strict=True)
        ]
        units = {"bytes": "B", "bytes_of_data_parallelism": "B", "seconds": "s"}
        return Reading(values, {name: units[name] for name in values}, tuple(rows))

    def network(self, graph: Graph, step: Step) -> tuple[list[tuple[Sequence[Signature], float]], list[Edge], list[Op]]:
        """The operators' signatures and parameters, who reads what how often, and the operators themselves.

        A layer that repeats reads its own last result, but for the first time.
        """
        known = [op for op in graph.forward if op.kind != "checkpoint"]
        last = {op.repeat: i for i, op in enumerate(known) if is_layer(op)}
        place: dict[str, int] = {}
        edges: list[Edge] = []
        for i, op in enumerate(known):
            for name in dict.fromkeys(op.inputs):
                if name in place:
                    source = known[place[name]]
                    enters = is_layer(op) and not is_layer(source) and op.repeat > 1
                    elements = _elements(source, step)
                    edges.append(Edge(place[name], i, elements, 1.0 if enters else op.repeat))
                    if enters and last[op.repeat] != i:
                        edges.append(Edge(last[op.repeat], i, elements, op.repeat - 1.0))
            place[op.name] = i
        read = {edge.source for edge in edges}
        ways = [
            [s for s in self.choices(op) if i in read or s.y != "partial"] for i, op in enumerate(known)
        ]  # no sum is left over
        return [(own, op.parameters) for own, op in zip(ways, known, strict=True)], edges, known


def _sent(kind: str, elements: float, ranks: int) -> float:
    return float(KINDS[kind].link({"elements": elements, "ranks": ranks})) if kind else 0.0


def _elements(op: Op, step: Step) -> float:
    return float(op.spec.writes(op.sized(step)))
