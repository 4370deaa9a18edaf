"""Cut a network into stages on several devices and a batch into microbatches that follow each other through them.

Every stage keeps of each microbatch what it was handed, and computes the rest again when the gradient comes back. All
microbatches count into one update, so training is that of one device.

## When it helps
A model that one device cannot hold. With four times as many microbatches as stages, or more, the devices are busy four
fifths of the time.

## When it does not
With few microbatches most devices wait: the bubble is (K - 1) / (M + K - 1) of the time for K stages and M microbatches.
The slowest stage sets the pace: eight stages of Llama-3.1-70B, whose output layer is as long as a block and a half, reach
0.77 of linear with 32 microbatches, those of the 405B model 0.81. 1F1B has the same bubble with the activations of K
microbatches instead of M; computing again costs a third more time than keeping activations.

## Reference
Huang et al., GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism, NeurIPS 2019, arXiv 1811.06965.
Measured: torchgpipe's benchmarks of AmoebaNet-D (18, 256) on Tesla P40 (docs/benchmarks.rst, BSD-3).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.cost import Limit
from narrows.simulate.orders import gpipe
from narrows.simulate.pipeline import Order, Work
from narrows.technique import Card, Claim, No, Schedules, Verdict, choice


@dataclass(frozen=True)
class GPipe(Schedules):
    """All microbatches forward, then all backward."""

    card: ClassVar[Card] = Card(
        "gpipe",
        relieves=(Limit.CAPACITY,),
        phases=("train",),
        exact=True,
        price="the forward pass twice where activations are computed again; devices wait while the pipeline fills and drains",
        claims=(
            Claim("bubble", "of the time", 7 / 39, "simulated, 8 equal stages, 32 microbatches", "section 2.3, O((K-1)/(M+K-1))",
                  "simulated", "a closed form: four digits", at_least=0.1794, at_most=0.1796),
            Claim("linear_speedup", "of linear", None, "simulated, stages cut from Llama-3.1-405B on A100, M = 4 K, least of K "
                  "= 2, 4, 8", "abstract, section 2.3: almost linear, the bubble negligible when M >= 4 K", "simulated",
                  "M = 4 K leaves a bubble of a fifth at most", at_least=0.8),
            Claim("peak_memory", "of one device's", 1 / 24, "simulated, 24 equal layers, K = 4, M = 8, layers hand on a quarter "
                  "of what they keep; infinite unless four processes leave the gradients of the whole batch",
                  "section 2.3, O(N + L/K x N/M)", "run", "the formula: a batch's boundary, and L/K layers of one microbatch",
                  at_most=1 / 24),
            Claim("measured_rank", "rank correlation", None, "throughput of AmoebaNet-D on 2, 4, 8 GPUs with 1, 4, 32 "
                  "microbatches, measured and simulated", "torchgpipe docs/benchmarks.rst", "simulated",
                  "nine configurations, few of them out of order", at_least=0.95),
        ),
    )  # fmt: skip
    recompute: bool = choice(True, False, help="keep only what a stage was handed, and compute the rest again")
    split: bool = choice(True, False, help="cut the batch into microbatches; without it one device works at a time")

    def baseline(self) -> "GPipe":
        return GPipe(recompute=False, split=False)

    def check(self, work: Work) -> Verdict:
        """Needs more than one stage."""
        return True if work.stages > 1 else No("one stage is no pipeline")

    def adapt(self, work: Work) -> Work:
        """The work with what the backward pass computes again, and whole batches where they are not split."""
        if self.recompute:
            again = tuple(map(sum, zip(work.of_kind("I"), work.of_kind("F"), strict=True)))
            working = tuple(held - given for held, given in zip(work.held_bytes, work.input_bytes, strict=True))
            work = replace(work, seconds={**work.seconds, "I": again}, held_bytes=work.input_bytes, working_bytes=working)
        if not self.split:
            m = work.microbatches
            grown = {kind: tuple(m * one for one in times) for kind, times in work.seconds.items()}
            held, given, working = (
                tuple(m * one for one in sizes) for sizes in (work.held_bytes, work.input_bytes, work.working_bytes)
            )
            work = replace(work, microbatches=1, seconds=grown, held_bytes=held, input_bytes=given, working_bytes=working)
        return work

    def order(self, work: Work) -> Order:
        """All forward passes, then all backward passes, last microbatch first."""
        return gpipe(work.stages, work.microbatches if self.split else 1)
