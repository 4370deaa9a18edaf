"""Run every step at one size: long prompts split, short ones fused, beside those that decode.

A step's throughput rises with its tokens until arithmetic bounds it. Dynamic SplitFuse runs all steps at about the
smallest size that is nearly as fast as any: decoding tokens first, then pieces of prompts.

## When it helps
Prompts much longer than answers: an engine that stops decoding to read whole prompts makes every tenth token wait for
one; here the slowest tokens wait for a step of one size.

## When it does not
Throughput and mean latency are those of the steps it is made of: where prompts already saturate the device, neither
gains. Beside an engine that schedules as vLLM 0.2 did and is otherwise the same, the half latency that the paper measures
at equal throughput does not show here: what is left of it lies in the two engines' kernels.

## Reference
Holmes et al., DeepSpeed-FastGen: High-throughput Text Generation for LLMs via MII and DeepSpeed-Inference, 2024, arXiv
2401.08671; the settings are those of its blog.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.cost import Limit
from narrows.simulate.demand import Demand, Deployment
from narrows.technique import Card, Claim, Serves, Verdict, choice

SIZES = (128, 256, 512, 1024, 2048)
LARGEST = 8192


@dataclass(frozen=True)
class DynamicSplitFuse(Serves):
    """Steps of one size: those that decode, and pieces of prompts to fill them up."""

    card: ClassVar[Card] = Card(
        "deepspeed-fastgen-dynamic-splitfuse",
        relieves=(Limit.SCHEDULING,),
        phases=("prefill", "decode"),
        exact=True,
        price="the first token of a long prompt comes later",
        claims=(
            Claim("token_tail", "x", 3.7, "simulated, Llama-2-70B on 4 A100, 16 clients, prompts of 2,600 and answers of 128 "
                  "tokens, 30 % spread: 95th percentile between tokens, prompts first over this", "figure 5 of the blog",
                  "simulated", "30 % of the paper's figure either way", at_least=2.6, at_most=4.8),
            Claim("effective_throughput", "requests/s", 1.42, "simulated, Poisson arrivals, answers of 60 tokens: 90 % of first "
                  "tokens within prompt / 512 s, 99 % of others within 1/4 s", "section 4C of the blog (there less than 1 % of "
                  "requests fail a moving average of 4 tokens/s)", "simulated", "30 % of the paper's figure either way",
                  at_least=0.99, at_most=1.85),
            Claim("effective_gain", "x", 2.3, "the same over prompts first", "abstract, figure 4", "simulated",
                  "30 % below the paper's figure; ours is more, as the paper's moving average forgives single stalls",
                  at_least=1.61),
            Claim("step_size", "of the fastest", None, "tokens per second of a step of the size it chooses over those of "
                  "a step of 8,192 tokens; 0 if that is more than an eighth of them", "section 3: steps at a consistent size in "
                  "the region of saturated throughput", "simulated", "its own threshold of what counts as saturated",
                  at_least=0.75),
        ),
    )  # fmt: skip
    saturated: float = choice(0.75, 0.6, 0.85, help="share of the throughput of a very large step that a step must reach")
    fused: bool = choice(True, False, help="without: whole prompts, before decoding")

    def baseline(self) -> "DynamicSplitFuse":
        return DynamicSplitFuse(fused=False)

    def check(self, demand: Demand) -> Verdict:
        """It applies to every model that decodes."""
        return True

    def size(self, demand: Demand) -> int:
        """Tokens of a step: the fewest of SIZES that reach the share of the throughput of a step of LARGEST."""
        times = replace(demand.group, rules=replace(demand.group.rules, max_tokens=LARGEST)).times()
        best = LARGEST / times.reading(LARGEST, 0)
        return next((n for n in SIZES if n / times.reading(n, 0) >= self.saturated * best), SIZES[-1])

    def deploy(self, demand: Demand) -> Deployment:
        """The same replicas, with steps of one size."""
        whole = max(max(r.prompt for r in demand.requests), demand.group.rules.max_tokens)
        tokens = self.size(demand) if self.fused else whole
        rules = replace(demand.group.rules, mixed=self.fused, chunked=self.fused, max_tokens=tokens)
        return Deployment(replace(demand.group, rules=rules))
