"""How many times as fast a change makes a step, and how far off that may be: the error of what it leaves alone cancels.

A prediction errs because constants do. Let each constant k be off by a factor with an 80 % interval of half-width h_k in
its logarithm, independent of the others'. If the times that rest on k are the shares s_k of a step before a change and t_k
after it, the logarithm of their ratio is off, to first order, by the sum over k of (s_k - t_k) times the error of k: an
interval of half-width sqrt(sum of ((s_k - t_k) h_k)^2). A format that the change brings in counts in full, and what stays
counts only as far as its share changes.

That constants of two formats err independently is the cautious reading: where formats were measured beside each other
(gpt-fast's tables of decoding on the A100) the errors of two were correlated by about a quarter.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from narrows.costmodel import OpTime, fitted, op_time, rests_on
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.step import Step

Gain = tuple[float, float, float]  # a speed-up, and the ends of its 80 % interval
NOISE = 0.01  # no gain is known better than a clock shows it: 80 % of the A/A pairs in results/verified.csv lie within


@dataclass(frozen=True)
class Parts:
    """The seconds of a step, and by constant those that rest on it times the half-width of its interval (logarithms)."""

    seconds: float
    spread: Mapping[str, float]

    def distance(self, other: "Parts") -> float:
        """The half-width of the 80 % interval of the logarithm of the ratio of two steps' seconds."""
        names = dict.fromkeys((*self.spread, *other.spread))
        mine, theirs = max(self.seconds, 1e-300), max(other.seconds, 1e-300)
        return math.hypot(*(self.spread.get(name, 0.0) / mine - other.spread.get(name, 0.0) / theirs for name in names))


def parts(ready: Graph, machine: Machine, step: Step) -> Parts:
    """The time of a graph as it stands (see `diagnose.prepared`) by the constants that it rests on."""
    seconds, spread = 0.0, dict[str, float]()
    for op in ready:
        if not op.runs(step):
            continue
        time = op_time(op, step, machine, ready.eager)
        half = _half_width(machine, step, time)
        seconds += float(time.seconds)
        for cause, each in time.causes.items():
            name = rests_on(op, cause, machine, ready.eager)
            spread[name] = spread.get(name, 0.0) + half * float(each)
    return Parts(seconds, spread)


def _half_width(machine: Machine, step: Step, time: OpTime) -> float:
    """Half of the 80 % interval of the logarithm of what an op's time rests on.

    A calibrated machine knows how far off the gains of small networks were (`gain`), or its steps. Elsewhere it is what
    kernels spread around their constant, and at least what predictions of unseen steps were off by.
    """
    known = machine.efficiency.get("gain")
    if known:
        return math.log(known["high"])
    own = math.log(float(time.high) / float(time.low)) / 2 if time.causes else 0.0
    if "step" in machine.efficiency:
        return own
    unseen = fitted()["residuals" if time.inside else "elsewhere"]["token" if step.phase == "decode" else "prompt"]
    return max(own, math.log(unseen["high"] / unseen["low"]) / 2)


def gain(before: Parts, after: Parts) -> Gain:
    """How many times as fast a step became, and both ends of the 80 % interval."""
    ratio, off = before.seconds / after.seconds, math.exp(math.hypot(NOISE, before.distance(after)))
    return ratio, ratio / off, ratio * off
