"""Let each half of a layer read the residual without the output of the half before it, whose sum is then still on its way.

Under tensor parallelism each half layer (attention, feed-forward) ends in an all-reduce that the next half waits for. In a
ladder the next half does not need it yet: x_i = x_(i-1) + h_i(x_(i-2)). All but the last sum of the network run beside
computing. The network is another one, to be trained so from the start, or retrained.

## When it helps
Serving over tensor parallelism with long all-reduces: links without NVLink, several nodes, large batches.

## When it does not
What computes less than it sends still waits. A trained model cannot be converted without retraining, though part of its
layers can at little cost. One device has nothing to send.

## Reference
Zhang et al., Ladder-residual: parallelism-aware architecture for accelerating large model inference with communication
overlapping, ICML 2025, arXiv 2501.06589.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

from narrows.cost import Limit
from narrows.costmodel import op_time
from narrows.graph import Graph
from narrows.kinds import COLLECTIVES
from narrows.machine import Machine
from narrows.parallel import tensor_parallel
from narrows.simulate.schedule import Task, play
from narrows.simulate.timeline import Timeline
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice


def halves(graph: Graph, machine: Machine, step: Step) -> Iterator[tuple[float, float]]:
    """Seconds of computing up to each exchange of a cut graph, and of the exchange; the last ends in none."""
    busy = 0.0
    for repeat, group in groupby(graph, key=lambda op: op.repeat):
        ops = [(op.kind in COLLECTIVES, float(op_time(op, step, machine).seconds) / repeat) for op in group if op.runs(step)]
        for _ in range(repeat):
            for sends, seconds in ops:
                if sends:
                    yield busy, seconds
                busy = 0.0 if sends else busy + seconds
    yield busy, 0.0


def timeline(graph: Graph, machine: Machine, step: Step, ladder: bool) -> Timeline:
    """A forward step of a cut graph: computing on the device, exchanges on its link, each after what it needs."""
    parts = list(halves(graph, machine, step))
    tasks: list[Task] = []
    for i, (busy, wire) in enumerate(parts):
        stale = ladder and i < len(parts) - 1  # the end of the network needs every half
        waits = () if i == 0 else ((2 * (max(i - 2, 0) if stale else i - 1) + 1, 0.0),)
        tasks += [
            Task(f"half {i}", "compute", "device", busy, waits),
            Task(f"sum {i}", "exchange", "link", wire, ((2 * i, 0.0),)),
        ]
    return play(tasks)


@dataclass(frozen=True)
class LadderResidual(Measures):
    """What tensor parallelism takes if each half layer may be one half behind."""

    card: ClassVar[Card] = Card(
        "ladder-residual",
        relieves=(Limit.COMMUNICATION,),
        phases=("prefill", "decode"),
        exact=False,
        price="another network: trained so from scratch it is as good, a trained one must be retrained",
        claims=(
            Claim("overlapped", "of products", None, "products of a small Llama's halves that ran while the sum of the half "
                  "before was on its way, over all but the first half's, on 2 and 4 ranks over gloo; NaN if a rank differs "
                  "from one process by more than 1e-9, or sends more", "abstract: decouple communication from computation", "run",
                  "a count", at_least=1.0, at_most=1.0),
            Claim("speedup", "x", 1.30, "Llama-3.1-70B on 8 H100: 64 prompts of 1,024 tokens, then 512 tokens each", "abstract",
                  "simulated", "the row asks for eight points", at_least=1.22, at_most=1.38),
            Claim("slow_links", "x", None, "the same on 8 L40S without NVLink, over that on 8 H100", "section 3.2", "simulated",
                  "links that are slower for what is computed gain more", at_least=1.05),
            Claim("loss", "of the standard's", 1.0, "held-out loss of byte-level Llamas of four layers after 200 steps, a "
                  "ladder's over one with a standard residual; NaN if no sum is hidden", "abstract: comparable performance",
                  "run", "the row asks for 2 %", at_most=1.02),
        ),
    )  # fmt: skip
    devices: int = choice(8, 2, 4, 16, help="of the tensor group")
    ladder: bool = choice(True, False, help="without it: the residual as usual")

    def baseline(self) -> "LadderResidual":
        return LadderResidual(self.devices, False)

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Seconds of a forward step over a tensor group with this residual and with the usual one, and what still shows."""
        cut = tensor_parallel(graph, self.devices)
        ours, usual = (timeline(cut, machine, step, ladder).seconds for ladder in (self.ladder, False))
        busy = sum(seconds for seconds, _ in halves(cut, machine, step))
        values = {"seconds": ours, "standard_seconds": usual, "speedup": usual / ours, "exposed_seconds": ours - busy}
        return Reading(values, {name: "x" if name == "speedup" else "s" for name in values})
