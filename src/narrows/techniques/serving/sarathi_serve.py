"""Read prompts in pieces beside those that decode, never more a step than the time between two tokens allows.

Every step takes all sequences that decode first and fills what is left of its budget of tokens with pieces of prompts, so
nobody who is being answered waits for a whole prompt. The budget is the largest whose step keeps the limit on the time
between tokens.

## When it helps
Long prompts under a limit on the time between tokens: an engine that reads prompts whole must stay at a fraction of its
load, so that few of its tokens are stalled; this one can be loaded until requests queue up.

## When it does not
Without such a limit: reading prompts whole is as fast or faster, since every piece reads the weights and the keys before
it again. A tight limit means small pieces, and with many experts each of them reads nearly all weights. For chats under
the paper's relaxed limit of 0.5 s the simulator finds 1.3x where the paper measured 2.15x: half a second forgives the stalls
of the baseline here, whose kernels are those of a later engine.

## Reference
Agrawal et al., Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve, OSDI 2024, arXiv 2403.02310.
The vLLM of its time, which put whole prompts first, is the baseline.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.cost import Limit
from narrows.simulate.demand import Demand, Deployment
from narrows.simulate.step_times import PS
from narrows.technique import Card, Claim, No, Serves, Verdict, choice

BUDGETS = (256, 512, 1024, 2048)  # beyond, a step is bound by arithmetic and gains nothing by being larger


@dataclass(frozen=True)
class SarathiServe(Serves):
    """Chunked prefill and stall-free batching under a budget of tokens a step."""

    card: ClassVar[Card] = Card(
        "sarathi-serve",
        relieves=(Limit.SCHEDULING,),
        phases=("prefill", "decode"),
        exact=True,
        price="first tokens of long prompts come later, and each piece reads the weights and the keys before it again",
        claims=(
            Claim("strict_capacity", "x", 2.6, "simulated, Mistral-7B on an A100, chats, 99 % of tokens within 0.1 s of the last,"
                  " half let in within 2 s", "abstract (up to, of two datasets), settings of tables 2 and 3", "simulated",
                  "30 % of the paper's figure either way: lengths are log-normal through the medians and 90th percentiles of its"
                  " table 2", at_least=1.82, at_most=3.38),
            Claim("strict_capacity_of_papers", "x", 1.82, "the same with long papers to summarize", "figure 10", "simulated",
                  "30 % of the paper's figure either way", at_least=1.27, at_most=2.37),
            Claim("relaxed_capacity_of_papers", "x", 1.97, "the same with 0.5 s between tokens", "figure 10", "simulated",
                  "30 % of the paper's figure either way", at_least=1.38, at_most=2.56),
            Claim("logits", "of the largest logit", None, "run, a two-layer Llama in fp32: prompt in pieces of 16 tokens against "
                  "the whole, with the pieces' cache; infinite where it is not read in pieces",
                  "section 4.1: a prompt in pieces is the same", "run", "sums in another order", at_most=1e-5),
        ),
    )  # fmt: skip
    tokens: int = choice(0, 256, 512, 1024, 2048, help="rows of a step; 0: the most that keep the limit between tokens")
    pieces: bool = choice(True, False, help="prompts in pieces beside decoding; without, whole ones before it")

    def baseline(self) -> "SarathiServe":
        return SarathiServe(pieces=False)

    def budget(self, demand: Demand) -> int:
        """Rows of a step: as set, or the most of BUDGETS whose step keeps the demand's limit on the time between tokens."""
        kept = [n for n in BUDGETS if self._seconds(demand, n) <= _limit(demand)]
        return self.tokens or max(kept, default=BUDGETS[0])

    def _seconds(self, demand: Demand, tokens: int) -> float:
        """A full step: as many sequences decode as there is room for, and a piece of a prompt fills it up."""
        group, requests = demand.group, demand.requests
        prompt = sum(r.prompt for r in requests) // len(requests)
        length = prompt + sum(r.output for r in requests) // len(requests)
        rules = group.rules
        times = replace(group, rules=replace(rules, max_tokens=max(BUDGETS))).times()
        decoding = max(1, min(rules.max_sequences, tokens // 2, group.room() * rules.block // length))
        context = decoding * (prompt + length) // 2
        segment = times.decoding(decoding, context, tokens)
        took = times.rows(decoding) + times.reading(tokens - decoding, decoding)
        took += times.outputs(decoding) + times.ending(1, decoding) + times.host(decoding, 1)
        took += segment.base + segment.slope * (context - segment.start) + times.prompt(tokens - decoding, prompt // 2)
        return took / PS

    def check(self, demand: Demand) -> Verdict:
        """Refuses where even the smallest step breaks the limit between tokens."""
        least = self._seconds(demand, BUDGETS[0])
        if least > _limit(demand):
            return No(f"a step of {BUDGETS[0]} tokens takes {least:.3g} s, longer than {_limit(demand):g} s between two tokens")
        return True

    def deploy(self, demand: Demand) -> Deployment:
        """The same replicas, with pieces of prompts in every step."""
        longest = max(r.prompt for r in demand.requests)
        tokens = self.budget(demand) if self.pieces else max(longest, demand.group.rules.max_tokens)
        rules = replace(demand.group.rules, mixed=self.pieces, chunked=self.pieces, max_tokens=tokens)
        return Deployment(replace(demand.group, rules=rules))


def _limit(demand: Demand) -> float:
    return min((one.seconds for one in demand.objectives if one.measure == "tbt"), default=math.inf)
