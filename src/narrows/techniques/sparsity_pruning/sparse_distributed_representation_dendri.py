"""Count how few connections a unit needs to recognise sparse patterns among its inputs, and how often it will be wrong.

Of n inputs a are active at a time. A unit that is wired to s of the a inputs of one pattern, and fires if at least theta of
them are active, sees a random pattern's overlap follow the hypergeometric law: C(s, k) C(n - s, a - k) / C(n, a). If noise
moves a share of the active inputs elsewhere, what is left on its s wires follows the same law within the a. Where wires
for several patterns are mixed on one unit, the overlap counts with all of them.

## When it helps
Wide layers of few active units (k-winners, top-k or ReLU-sparsified activations): how sparse the weights of a layer that
detects patterns can be made, which threshold it wants, and how many patterns a unit may hold.

## When it does not
It assumes that other patterns are random and all inputs alike. Real features are correlated and real weights are graded: take
its counts as what is possible, not as the accuracy of a trained network. In narrow layers so few inputs are active that no
threshold holds the errors asked for: they are reported whole.

## Reference
Ahmad and Hawkins, How Do Neurons Operate on Sparse Distributed Representations? A Mathematical Theory of Sparsity, Neurons
and Active Dendrites, arXiv 1601.00720. The size of a mixture is a distribution here, where its mean alone is usual.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Graph, Op
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

Vector = NDArray[np.float64]


@cache
def _log_factorials(largest: int) -> Vector:
    return np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, largest + 1)))))


def overlaps(population: int, marked: Any, drawn: int) -> Vector:
    """Chance of 0, 1, ... `drawn` marked ones among so many drawn from a population: a row for each number of marked."""
    logs, m, k = _log_factorials(population), np.asarray(marked)[..., None], np.arange(drawn + 1)
    possible = (k <= m) & (drawn - k <= population - m)

    def choose(n: Any, r: Any) -> Any:
        r = np.where(possible, r, 0)
        return logs[n] - logs[r] - logs[np.where(possible, n - r, 0)]

    chances = choose(m, k) + choose(population - m, drawn - k) - (logs[population] - logs[drawn] - logs[population - drawn])
    found: Vector = np.where(possible, np.exp(np.where(possible, chances, 0.0)), 0.0)
    return found


@cache
def mixture(inputs: int, synapses: int, patterns: int) -> Vector:
    """Chance that random sets of `synapses` of the inputs, one for each pattern, cover 0, 1, 2, ... inputs together."""
    covered = np.zeros(min(inputs, patterns * synapses) + 1)
    covered[min(synapses, inputs)] = 1.0
    for _ in range(patterns - 1):
        again, grown = overlaps(inputs, np.arange(len(covered)), synapses), np.zeros_like(covered)
        for fresh in range(min(synapses, len(covered) - 1) + 1):
            grown[fresh:] += covered[: len(covered) - fresh] * again[: len(covered) - fresh, synapses - fresh]
        covered = grown
    return covered


@dataclass(frozen=True)
class SparseRepresentation(Measures):
    """Errors of units with few connections on sparse inputs, and the fewest connections that keep them rare."""

    card: ClassVar[Card] = Card(
        "sparse-distributed-representation-dendri",
        relieves=(Limit.CAPACITY, Limit.BANDWIDTH),
        phases=("prefill", "decode", "forward"),
        exact=True,
        claims=(
            Claim("false_positives", "standard errors", None, "n 300 to 800, a 15 to 60, s 8 to 30, 20,000 random patterns each",
                  "abstract: scaling laws", "simulated", "six counts: by chance one is beyond 3.5 in 2,000 tries",
                  at_most=3.5),
            Claim("false_negatives", "standard errors", None, "a 30 to 80, s 8 to 20, a tenth to a quarter of the active moved",
                  "abstract: adverse conditions", "simulated", "four counts: by chance one is beyond 3.5 in 2,000 tries",
                  at_most=3.5),
            Claim("mixed_patterns", "patterns", None, "n = 800, a = 16, s = 10, theta = 6, wrong on 0.2 % of random patterns",
                  "abstract: union property", "simulated", "what it says can be mixed counts only if the counted errors agree "
                  "(3.5 standard errors); several patterns is more than two", at_least=3.0),
            Claim("wires_for_a_billionth", "share", None, "n = 20,000, a = 400, a quarter moved, both errors at most 1e-9",
                  "abstract: a tiny number of synapses", "checked", "counts only if whole-number arithmetic finds both errors "
                  "at most 1e-9; tiny is below a fifth of the pattern", at_most=0.2),
        ),
    )  # fmt: skip
    density: float = choice(0.02, 0.01, 0.05, 0.1, help="share of a layer's inputs that are active at a time")
    noise: float = choice(0.25, 0.0, 0.5, help="share of a pattern's active inputs that may be moved elsewhere")
    patterns: int = choice(1, 4, 16, help="patterns whose connections are mixed on one unit")
    error: float = choice(1e-6, 1e-3, 1e-9, help="largest chance of a false alarm and of a miss")
    tail: str = choice(
        "exact", "normal", help="how chances are counted: combinations, or a normal curve of their mean and spread"
    )

    def __post_init__(self) -> None:
        if not (0 < self.density <= 1 and 0 <= self.noise < 1 and 0 < self.error < 1 and self.patterns >= 1):
            remedy = "Give a density in (0, 1], a noise in [0, 1), an error in (0, 1) and at least one pattern."
            raise NarrowsError(f"{self} is not possible.", where=self.card.slug, remedy=remedy)
        if self.tail not in ("exact", "normal"):
            raise NarrowsError(f"{self.tail!r} is not a tail.", where=f"{self.card.slug}: tail", remedy="Use exact or normal.")

    def baseline(self) -> "SparseRepresentation":
        return replace(self, tail="normal")

    def false_positives(self, inputs: int, active: int, synapses: int) -> Vector:
        """Chance that a random pattern overlaps a unit's wires in at least 0, 1, ... `active` places."""
        sizes = mixture(inputs, synapses, self.patterns)
        return self._beyond(sizes @ overlaps(inputs, np.arange(len(sizes)), active))

    def false_negatives(self, active: int, synapses: int) -> Vector:
        """Chance that fewer than 0, 1, ... `synapses` wires of a pattern are still active after noise (one pattern's alone)."""
        kept = active - round(self.noise * active)
        return 1 - self._beyond(overlaps(active, kept, synapses))

    def _beyond(self, chances: Vector) -> Vector:
        """The chance of at least each count."""
        if self.tail == "exact":
            beyond: Vector = np.minimum(chances[::-1].cumsum()[::-1], 1.0)
            return beyond
        counts = np.arange(len(chances))
        mean = float(chances @ counts)
        spread = math.sqrt(float(chances @ (counts - mean) ** 2)) or 1e-300
        return np.array([math.erfc((count - 0.5 - mean) / spread / math.sqrt(2)) / 2 for count in counts])

    def fewest(self, inputs: int, active: int) -> tuple[int, int]:
        """(wires, threshold) of the sparsest unit that keeps both errors at `error`; (0, 0) where none does."""
        for synapses in range(1, active + 1):
            rare = np.flatnonzero(self.false_positives(inputs, active, synapses)[: synapses + 1] <= self.error)
            if len(rare) and self.false_negatives(active, synapses)[rare[0]] <= self.error:
                return synapses, int(rare[0])
        return 0, 0

    def mixable(self, inputs: int, active: int, synapses: int, threshold: int) -> int:
        """How many patterns of so many wires a unit can hold until false alarms pass `error`."""
        held = 0
        while held * synapses < inputs:
            chances = replace(self, patterns=held + 1).false_positives(inputs, active, synapses)
            if chances[threshold] > self.error:
                break
            held += 1
        return held

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """For every layer with weights: wires and threshold of its units; in total the weights that are left, in bytes.

        Bytes count an index for each wire. A layer in which no threshold keeps the errors is left whole. Raises NarrowsError
        where nothing has inputs to choose from.
        """
        rows: list[Mapping[str, Any]] = []
        for op in graph.forward:
            inputs, units = _wiring(op)
            if not inputs:
                continue
            active = max(1, round(self.density * inputs))
            wires, threshold = self.fewest(inputs, active)
            width = op.weight.bits / 8 if op.weight else 0.0
            dense, sparse = inputs * width, wires * (width + (2 if inputs <= 2**16 else 4))
            saves = 0 < sparse < dense
            rows.append({"op": op.name, "inputs": inputs, "active": active, "wires": wires if saves else inputs,
                         "threshold": threshold if saves else 0, "dense_bytes": dense * units,
                         "bytes": (sparse if saves else dense) * units})  # fmt: skip
        if not rows:
            raise NarrowsError(
                "no layer has inputs to choose from.", where=graph.name, remedy="Give linear layers or convolutions."
            )
        left, dense = (sum(row[key] for row in rows) for key in ("bytes", "dense_bytes"))
        values = {"bytes": left, "dense_bytes": dense, "share": left / dense,
                  "seconds_saved": (dense - left) / machine.memory.bandwidth_bytes_per_s}  # fmt: skip
        return Reading(values, {"bytes": "B", "dense_bytes": "B", "share": "of dense", "seconds_saved": "s"}, tuple(rows))


def _wiring(op: Op) -> tuple[int, int]:
    """(inputs of a unit, units over all repeats) of an op with weights of its own; (0, 0) for others."""
    dims: dict[str, Any] = dict(op.dims)
    if op.weight is None or op.tied:
        return 0, 0
    if op.kind == "linear":
        return int(dims["inputs"]), int(dims["outputs"] * dims["matrices"] * op.repeat)
    if op.kind == "conv":
        return int(dims["in_channels"] * dims["kernel"] / dims["groups"]), int(dims["out_channels"] * op.repeat)
    return 0, 0
