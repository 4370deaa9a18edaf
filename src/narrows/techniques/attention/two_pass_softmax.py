"""Compute softmax in two passes over memory instead of three: keep every exponential as a mantissa and an exponent.

The usual softmax first reads all logits for their maximum, so that no exponential overflows. A pair (m, n) for m 2^n cannot
overflow, so the sum can be taken at once: one pass sums pairs, the second computes them again, scales and writes. That moves
3 numbers for each logit where three passes move 4 (exponentials computed twice) or 5 (kept and read again).
`narrows.modules.two_pass_softmax.softmax` is the algorithm itself, compiled for this CPU.

## What it does
Reads which softmaxes of a step are too large for the machine's cache, and what they move by the chosen algorithm.

## When it helps
Rows that do not stay in cache between passes: large vocabularies and class lists, or many rows at once on few bytes of cache.

## When it does not
Rows that fit into cache: memory is then read once whatever the algorithm, and the pairs cost more arithmetic. Fused
attention, whose scores are never in memory; its rows are listed as they would be without fusion.

## Reference
Dukhan and Ablavatski, The Two-Pass Softmax Algorithm, 2020, arXiv 2001.04438. Polynomial, blocking and refusals are ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Graph, Op
from narrows.machine import Machine
from narrows.modules.two_pass_softmax import PASSES, softmax
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FP32 = 4  # bytes; libraries compute softmax in fp32 whatever the logits are kept in
_OUT = "compiled by cc for this CPU, one thread, one row of 2^26 normal fp32 logits: "


@dataclass(frozen=True)
class TwoPassSoftmax(Measures):
    """What the softmaxes of a step move by an algorithm; `softmax` computes them with it."""

    card: ClassVar[Card] = Card(
        "two-pass-softmax",
        relieves=(Limit.BANDWIDTH,),
        phases=("prefill", "decode", "forward", "train"),
        exact=True,
        claims=(
            Claim("traffic", "numbers per logit", 3.0, "the compiled code counting its loads and stores, on logits to +-1e4; "
                  "NaN where it is more than 1e-6 from torch.softmax", "traffic of the algorithms", "run",
                  "a count: two loads and a store", at_most=3.0),
            Claim("speedup", "x", 1.28, _OUT + "over three passes that compute exponentials twice", "abstract", "run",
                  "the paper's is for a Skylake-X with AVX512: a tenth at least", at_least=1.1),
            Claim("speedup_over_reload", "x", None, _OUT + "over three passes that keep the exponentials", "abstract", "run",
                  "fewer bytes for more arithmetic: quicker at all, beyond noise", at_least=1.05),
        ),
    )  # fmt: skip
    algorithm: str = choice(*PASSES, help="two_pass, or one of the two usual ones in three passes")

    def __post_init__(self) -> None:
        if self.algorithm not in PASSES:
            raise NarrowsError(f"{self.algorithm!r} is not one.", where=f"{self.card.slug}: algorithm",
                               remedy=f"Use one of {', '.join(PASSES)}.")  # fmt: skip

    def baseline(self) -> "TwoPassSoftmax":
        return TwoPassSoftmax("three_pass_recompute")

    def softmax(self, x: "NDArray[np.float32]") -> "NDArray[np.float32]":
        """Softmax of fp32 numbers along the last axis, on one thread of this CPU; refusals as in the module's function."""
        return softmax(x, self.algorithm)

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Bytes of main memory that the step's softmaxes move, and what that is less than in three passes.

        A row for the output over the vocabulary and for each attention (as if unfused): how many softmaxes of which
        width, and whether a row fits into the share of the outermost cache that a unit has. One that fits is read and
        written once. `speedup` is at the bandwidth, over recomputing in three passes: 1 where all of them fit.
        """
        cache = machine.memories[1].capacity_bytes if len(machine.memories) > 1 else 0.0
        rows: list[Mapping[str, Any]] = []
        for op in graph:
            count, width = _softmaxes(op, step)
            if not count or op.phase != "forward":
                continue
            fits = 2 * width * _FP32 <= cache / min(count / op.repeat, machine.units)
            moved, usual = (2 if fits else PASSES[a] for a in (self.algorithm, "three_pass_recompute"))
            each = count * width * _FP32
            rows.append({"op": op.name, "softmaxes": count, "width": width, "in_cache": fits,
                         "bytes": moved * each, "three_pass_bytes": usual * each})  # fmt: skip
        moved, usual = (sum(row[name] for row in rows) for name in ("bytes", "three_pass_bytes"))
        values = {"bytes": moved, "three_pass_bytes": usual, "speedup": usual / moved if moved else 1.0,
                  "seconds": moved / machine.memory.bandwidth_bytes_per_s}  # fmt: skip
        return Reading(values, {"bytes": "B", "three_pass_bytes": "B", "speedup": "x", "seconds": "s"}, tuple(rows))


def _softmaxes(op: Op, step: Step) -> tuple[float, float]:
    """How many rows an op's result or scores give to a softmax, over all repeats, and how wide they are."""
    dims = op.sized(step)
    if op.kind == "attention" and dims["queries"]:
        return dims["queries"] * dims["heads"] * op.repeat, dims["pairs"] / dims["queries"]
    if op.kind == "linear" and op.split == "vocabulary":
        return dims["rows"] * op.repeat, dims["outputs"]
    return 0.0, 0.0
