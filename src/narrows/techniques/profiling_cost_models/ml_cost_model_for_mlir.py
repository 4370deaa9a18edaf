"""Learn what a program costs from its text alone: lines of ops with their sizes, and measurements of other programs.

A graph is written out as a compiler's intermediate form, one line an op. The text is cut into words and numbers, and a
network that reads sequences gives the time or the memory that the whole takes. It knows nothing of the machine but
the examples that it was trained on.

## When it helps
A compiler pass or a search that asks for the cost of thousands of variants on hardware nobody has a formula for, where a
few hundred small programs can be timed.

## When it does not
Ops, sizes or machines far from the examples: it interpolates. An op that no example has is refused. Where a cost
model with few constants exists, that one needs fewer measurements and says why.

## Reference
Das and Mannarswamy, ML-driven Hardware Cost Model for MLIR, 2023, arXiv 2302.11405. There the text is an MLIR dialect and
the targets are registers, utilisation and cycles of a simulated machine; here it is narrows' graph, the targets are
measured, and the words of a line are summed before the convolution.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from narrows.cost import Limit, total
from narrows.costmodel import op_time
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

Program = tuple[Graph, Step]
Predictor = Callable[[Sequence[Program]], NDArray[np.float64]]

_PROGRAMS = "90 of 480 random small networks (multilayer, convolutional, attention), trained on the others, one core of this CPU"
_PIECES = 400
_WORD = re.compile(r"([a-z_]\w*)(?:=([\d.e+]+))?")


def text(graph: Graph, step: Step) -> str:
    """A graph at a step as text: `%2 = linear(%1) rows=32 inputs=128 outputs=64 ... as fp32 times=1`, one line an op."""
    lines, place = [], dict[str, int]()
    for i, op in enumerate(graph):
        operands = ", ".join(f"%{place[name]}" for name in op.inputs if name in place)
        sizes = " ".join(f"{name}={float(value):.12g}" for name, value in op.sized(step).items() if float(value))
        phase = "" if op.phase == "forward" else f" {op.phase}"
        lines.append(f"%{i} = {op.kind}({operands}){phase} {sizes} as {op.act.name} kernels={op.kernels} times={op.repeat}")
        place[op.name] = i
    return "\n".join(lines)


def words(line: str) -> list[tuple[str, float]]:
    """The words of a line with their numbers (1 where there is none); places of operands are left out."""
    return [(word, float(number or 1)) for word, number in _WORD.findall(re.sub(r"%\d+", "", line))]


@dataclass(frozen=True)
class MLIRCostModel(Measures):
    """A regression from a graph's text to what it costs."""

    card: ClassVar[Card] = Card(
        "ml-cost-model-for-mlir",
        relieves=(Limit.SCHEDULING,),
        phases=("prefill", "decode", "forward", "train"),
        exact=True,
        claims=(
            Claim("latency_error", "fraction", None, _PROGRAMS, "abstract", "run",
                  "mean absolute error of the time of networks that were not trained on, at most 20 %", at_most=0.20),
            Claim("memory_error", "fraction", None, _PROGRAMS, "abstract", "run",
                  "the same of the most bytes allocated at once: at most 20 %", at_most=0.20),
            Claim("gain_over_flop", "x less error", None, _PROGRAMS, "abstract", "run",
                  "error of the best line through FLOP over its own, the worse of time and memory: clearly better", at_least=1.5),
        ),
    )  # fmt: skip
    reads: str = choice("text", "flop", help="what is known of a program; flop: a line through its count of operations")
    width: int = choice(48, 32, 64, help="numbers that stand for a word")
    members: int = choice(3, 1, 5, help="networks whose mean is taken")
    epochs: int = choice(120, 60, 240, help="passes over the examples")

    def __post_init__(self) -> None:
        if self.reads not in ("text", "flop") or min(self.width, self.members, self.epochs) < 1:
            raise NarrowsError(
                f"{self} cannot be trained.", where=self.card.slug, remedy="Read text or flop, and give counts above 0."
            )

    def baseline(self) -> "MLIRCostModel":
        return MLIRCostModel("flop")

    def fit(self, programs: Sequence[Program], costs: Sequence[float]) -> Predictor:
        """What predicts a cost, in the unit of `costs`, from programs that were measured.

        Raises NarrowsError for fewer than eight programs and for costs that are not above zero; the predictor for a
        program with a word that no example has.
        """
        if len(programs) != len(costs) or len(programs) < 8 or not all(c > 0 and math.isfinite(c) for c in costs):
            raise NarrowsError(f"{len(programs)} programs with {len(costs)} costs.", where=f"{self.card.slug}: fit",
                               remedy="Give at least eight programs, each with a finite cost above zero.")  # fmt: skip
        return _line(programs, costs) if self.reads == "flop" else self._networks(programs, costs)

    def _networks(self, programs: Sequence[Program], costs: Sequence[float]) -> Predictor:
        import torch

        from narrows.modules.sequence_cost import fit, tensor

        read = [[words(line) for line in text(*program).splitlines()] for program in programs]
        place = {word: i for i, word in enumerate(sorted({word for lines in read for line in lines for word, _ in line}))}
        logs = np.log(costs)
        level = float(logs.mean())

        def numbered(lines: list[list[tuple[str, float]]]) -> list[list[tuple[int, float]]]:
            new = {word for line in lines for word, _ in line} - set(place)
            if new:
                raise NarrowsError(
                    f"no example has {', '.join(sorted(new))}.", where=self.card.slug, remedy="Measure some that have it."
                )
            return [[(place[word], number) for word, number in line] for line in lines]

        examples = tensor([numbered(lines) for lines in read], len(place))
        wanted = torch.tensor(logs - level, dtype=torch.float32)
        networks = [fit(examples, wanted, self.width, self.epochs, seed) for seed in range(self.members)]

        def predict(asked: Sequence[Program]) -> NDArray[np.float64]:
            inputs = tensor([numbered([words(line) for line in text(*program).splitlines()]) for program in asked], len(place))
            with torch.inference_mode():
                found = torch.stack([network(inputs) for network in networks]).mean(0)
            return np.asarray(np.exp(level + found.double().numpy()))

        return predict

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """How far a model of the text follows this machine: trained on pieces of the graph, asked about other pieces.

        The pieces, different runs of up to eight ops for one to eight times the step's batch, are priced by narrows' cost
        model. `text_error` and `flop_error` are mean errors on a quarter that was held out; a row each. Raises NarrowsError
        for a graph with too few ops to tell.
        """
        random = np.random.default_rng(0)
        ops = [op for op in graph if op.runs(step) and op.kind != "checkpoint"]
        drawn: dict[str, Program] = {}
        for _ in range(_PIECES if ops else 0):
            start, length, times = (int(random.integers(*ends)) for ends in ((0, len(ops)), (1, 9), (1, 9)))
            piece = Graph(graph.name, tuple(ops[start : start + length]), eager=graph.eager)
            sized = Step(times * step.batch, step.new, step.past, step.source, step.phase)
            drawn[text(piece, sized)] = piece, sized
        pieces = list(drawn.values())
        costs = [sum(float(op_time(op, sized, machine, graph.eager).seconds) for op in piece) for piece, sized in pieces]
        kept = 3 * len(pieces) // 4
        errors: dict[str, Any] = {}
        for one in (replace(self, members=1), self.baseline()):
            predicted = one.fit(pieces[:kept], costs[:kept])(pieces[kept:])
            errors[one.reads] = np.abs(predicted / costs[kept:] - 1)
        rows = tuple(
            {"from": piece.ops[0].name, "ops": len(piece.ops), "seconds": cost, "error": float(error)}
            for (piece, _), cost, error in zip(pieces[kept:], costs[kept:], errors[self.reads], strict=True)
        )
        return Reading({f"{name}_error": float(error.mean()) for name, error in errors.items()}, rows=rows)


def _line(programs: Sequence[Program], costs: Sequence[float]) -> Predictor:
    """The line through counts of operations with the least squares of relative errors."""

    def count(asked: Sequence[Program]) -> NDArray[np.float64]:
        return np.stack([np.ones(len(asked)), [float(total(*one).flop) for one in asked]], 1)

    weights = np.linalg.lstsq(count(programs) / np.asarray(costs)[:, None], np.ones(len(costs)), rcond=None)[0]
    return lambda asked: np.asarray(count(asked) @ weights)
