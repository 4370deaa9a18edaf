"""Split the backward pass of a pipeline in two: gradients of inputs go up at once, those of weights wait for idle time.

Automatic differentiation gives both together, so that each stage computes gradients of weights while the stage above it
waits for its own. Nothing waits for them but the update: they fill the bubble instead.

## When it helps
Few microbatches for each stage, so that the bubble is large: a naive pipeline, GPipe, 1F1B alike.

## When it does not
What a layer needs for the gradients of its weights stays in memory until they are computed. With many microbatches
there is little bubble left to fill. The order among the other passes stays as it was: a plan that moves forward passes
too, as zero-bubble schedules do, leaves less.

## Reference
Rae, Lee and Richings, 2BP: 2-Stage Backpropagation, 2024, arXiv 2405.18047. The 1.70 x of the paper is measured on four
GPUs, and its implementation also joins the gradients of weights of several microbatches into one product; here is what
the order of the passes alone gives.
"""

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.simulate.orders import gpipe, one_f_one_b
from narrows.simulate.pipeline import Order, Work
from narrows.simulate.planned import split
from narrows.technique import Card, Claim, No, Schedules, Verdict, choice

ORDERS = {"1f1b": one_f_one_b, "gpipe": gpipe}


@dataclass(frozen=True)
class TwoBP(Schedules):
    """A fixed order, its backward passes in two parts; `narrows.modules.pipeline_run` does so with real modules."""

    card: ClassVar[Card] = Card(
        "2bp",
        relieves=(Limit.SCHEDULING,),
        phases=("train",),
        exact=True,
        price="activations and gradients stay in memory until the gradients of weights are computed",
        claims=(
            Claim("best_gain", "x", 1.70, "simulated, Llama-2-7B cut over 4 A100, 1024 tokens: the best of naive, GPipe, 1F1B-1 "
                  "and 1F1B-2", "abstract", "simulated", "measured there, with products joined over microbatches; the order "
                  "alone gives 1.4 where F, I and W are equal", at_least=1.3),
            Claim("least_gain", "x", None, "the same: the least of the four", "abstract: increases in all cases", "simulated",
                  "more than a rounding", at_least=1.05),
            Claim("naive_gain", "x", 4 / 3, "simulated, 4 equal stages, one microbatch, F = I = W", "12 passes over 9",
                  "checked", "four digits", at_least=1.333, at_most=1.334),
            Claim("deferred", "of backward passes", 1.0, "a 4-stage language model in float64, 8 microbatches; 0 unless "
                  "its gradients are those of autograd to 1e-9", "section 3", "run", "every one", at_least=1.0),
            Claim("extra_memory", "x", None, "simulated, peak of activations of 1F1B-2 over 1F1B, 4 stages, 8 microbatches",
                  "section 4: memory rises", "simulated", "the price is seen", at_least=1.05, at_most=2.0),
        ),
    )  # fmt: skip
    schedule: str = choice("1f1b", "gpipe", help="the order whose backward passes are split")
    stages: int = choice(2, 1, help="parts of the backward pass; 1 leaves it whole")

    def __post_init__(self) -> None:
        if self.schedule not in ORDERS:
            raise NarrowsError(f"{self.schedule!r} is no schedule.", where="2bp: schedule", remedy=f"Use {', '.join(ORDERS)}.")

    def baseline(self) -> "TwoBP":
        return TwoBP(self.schedule, stages=1)

    def check(self, work: Work) -> Verdict:
        """Needs work in the gradients of weights, and another stage that need not wait for it."""
        if work.stages == 1:
            return No("one stage has no other that waits")
        return True if sum(work.of_kind("W")) else No("gradients of weights take no time")

    def order(self, work: Work, limit_bytes: float = inf) -> Order:
        """The schedule's order; W fills idle time, and comes earlier where `limit_bytes` asks for it."""
        order = ORDERS[self.schedule](work.stages, work.microbatches)
        return split(order, work, limit_bytes) if self.stages == 2 else order
