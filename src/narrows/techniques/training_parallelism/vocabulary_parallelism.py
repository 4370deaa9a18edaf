"""Spread the vocabulary layers over all stages of a pipeline, and run their share of each as a pass of its own.

The output layer of a large vocabulary takes as long as many blocks, on the last stage, and all others wait for it. Here
each stage has an even part of the vocabulary. A pass S computes its logits, sum and gradients once the last stage has the
microbatch's output; an online softmax corrects them when the sums of all stages are there.

## When it helps
Large vocabularies, small hidden sizes, many stages: wherever the output layer is longer than what a stage would otherwise
take. Parameters and logits spread too.

## When it does not
Every S pass waits for the last stage, and its backward pass for every S pass: one microbatch more is in flight for each
barrier. A pipeline whose stages are even already gains nothing.

## Reference
Yeung, Qi, Lin and Wan, Balancing Pipeline Parallelism with Vocabulary Parallelism, MLSys 2025, arXiv 2411.05288. Measured:
the artifact of its repository (sail-sg/VocabularyParallelism) on 8 A100.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.simulate.orders import one_f_one_b
from narrows.simulate.pipeline import Order, Pass, Work
from narrows.simulate.timeline import Timeline
from narrows.technique import Card, Claim, No, Schedules, Verdict, choice


@dataclass(frozen=True)
class VocabularyParallelism(Schedules):
    """1F1B with a pass S on every stage for each microbatch; the work's `S` is what an even share of the vocabulary takes."""

    card: ClassVar[Card] = Card(
        "vocabulary-parallelism",
        relieves=(Limit.SCHEDULING, Limit.CAPACITY),
        phases=("train",),
        exact=True,
        price="one microbatch more in flight for each barrier, and an exchange of sums and gradients among all stages",
        claims=(
            Claim("iteration_error", "of the time", None, "simulated from measured stage times against 16 measured iterations, "
                  "8 A100, 32k to 256k words; one constant, from 8 others without the technique", "artifact", "simulated",
                  "a mean error of 1.5 %", at_most=0.015),
            Claim("gain_32k", "%", 5, "simulated from measured stage times, 8 A100, 2048 tokens, over the output layer on the "
                  "last stage", "abstract: 5 % to 51 %", "simulated", "the paper's least", at_least=5),
            Claim("gain_256k", "%", 51, "the same with 256k words", "abstract: 5 % to 51 %", "simulated", "the paper's most",
                  at_least=51),
            Claim("balance", "of an even share", 1.0, "logits that a device holds, 8 shards of a 50,257-word layer in float32; "
                  "infinite unless loss and gradients are the dense layer's to 1e-5", "abstract", "run",
                  "even but for a remainder", at_most=1.001),
            Claim("in_flight", "microbatches", 9, "simulated, 8 stages, one barrier: the most on a rank", "table 2: p + 1",
                  "simulated", "exact", at_least=9, at_most=9),
        ),
    )  # fmt: skip
    barriers: int = choice(1, 2, 0, help="exchanges between S and the backward pass; 0 leaves the layer on the last stage")

    def __post_init__(self) -> None:
        if self.barriers not in (0, 1, 2):
            raise NarrowsError(
                f"{self.barriers} barriers.", where="vocabulary-parallelism", remedy="Use 1, 2, or 0 for none of it."
            )

    def baseline(self) -> "VocabularyParallelism":
        return VocabularyParallelism(0)

    def check(self, work: Work) -> Verdict:
        """Needs the time of an even share of the vocabulary (`S`), and several stages to share it."""
        if "S" not in work.seconds:
            return No("the work does not say what a share of the vocabulary takes (S)")
        return True if work.stages > 1 else No("one stage has nobody to share with")

    def adapt(self, work: Work) -> Work:
        """The work; without barriers the last stage has the whole vocabulary, a third of it forward, a third each of I and W."""
        if self.barriers:
            return work
        whole = sum(work.of_kind("S")) / 3
        parts = {kind: (*work.of_kind(kind)[:-1], work.of_kind(kind)[-1] + whole) for kind in ("F", "I", "W")}
        return replace(work, seconds=parts)

    def order(self, work: Work) -> Order:
        """1F1B with a microbatch more ahead for each barrier, and an S where the last stage's output comes out.

        That is found with every stage as long as their mean; a pass that has run for a third of its time ends before S.
        Runtimes that take orders know no S: it tells them where to put theirs.
        """
        p, m = work.stages, work.microbatches
        if not self.barriers:
            return one_f_one_b(p, m)
        base = one_f_one_b(p, m, self.barriers)
        mean = [sum(work.of_kind(kind)) / p for kind in ("F", "I", "W")]
        spans = {span.name: span for span in base.play(Work.of(p, m, *mean)).spans}
        rows = []
        for rank, row in enumerate(base.ranks):
            shares = [(spans[Pass("F", p - 1, i)].end, 0, Pass("S", rank, i)) for i in range(m)]
            begun = [(spans[one].start + (spans[one].end - spans[one].start) / 3, 1, one) for one in row]
            rows.append(tuple(one for *_, one in sorted(shares + begun, key=lambda item: item[:2])))
        return Order(tuple(rows))

    def play(self, work: Work) -> Timeline:
        """What runs when; S waits for the last stage, and the last stage's backward pass for every S."""
        adapted, last = self.adapt(work), work.stages - 1
        also: dict[Pass, list[Pass]] = {}
        if self.barriers:
            for m in range(work.microbatches):
                shares = [Pass("S", rank, m) for rank in range(work.stages)]
                also.update({one: [Pass("F", last, m)] for one in shares})
                also[Pass("B", last, m)] = shares
        return self.order(work).play(adapted, also)
