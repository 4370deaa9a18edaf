"""Read prompts whole, a group of layers a step, instead of in pieces through all layers.

Every step takes all sequences that decode through all layers, and the prompts on their way through one group of layers.
There are as many groups as there would be pieces, so a step is about as long; but each layer sees a prompt once, and its
experts are read once for it instead of once for every piece.

## When it helps
Many experts of which a piece of a prompt already needs nearly all: there a piece's time is that of reading them. Long
prompts, few sequences that decode, a limit on the time between tokens that keeps pieces small.

## When it does not
Models without experts, and pieces large enough to be bound by arithmetic: both read little again. Prompts of one piece.
Experts in few bits gain less: for gpt-oss-20b, whose experts have 4, the simulator finds first tokens no earlier at half
load, where the paper measured up to 70 %.

## Reference
Lee et al., From Tokens to Layers: Redefining Stall-Free Scheduling for LLM Serving with Layered Prefill, MLSys 2026, arXiv
2510.08055. The baseline reads pieces of 512 tokens.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.cost import Limit
from narrows.simulate.demand import Demand, Deployment
from narrows.technique import Card, Claim, No, Serves, Verdict, choice


@dataclass(frozen=True)
class LayeredPrefill(Serves):
    """Prompts advance by groups of layers, as much work a step as a piece of `tokens` tokens."""

    card: ClassVar[Card] = Card(
        "layered-prefill",
        relieves=(Limit.BANDWIDTH, Limit.SCHEDULING),
        phases=("prefill",),
        exact=True,
        price="hidden states of prompts on their way are kept between steps",
        claims=(
            Claim("first_token", "of the time", 0.70, "simulated, Qwen3-30B-A3B on 2 H100, papers to summarize, at 0.87 of the "
                  "load up to which pieces keep 90 % of first tokens within 10 s and 99 % of others within 0.125 s (limits "
                  "assumed: it breaks down where requests pile up): mean less",
                  "abstract (up to); figure 3: 1.3 of 1.5 requests/s", "simulated", "30 % of the paper's figure either way",
                  at_least=0.49, at_most=0.91),
            Claim("whole_answer", "of the time", 0.41, "the same, mean of whole requests", "table 6", "simulated",
                  "30 % of the paper's figure either way", at_least=0.287, at_most=0.533),
            Claim("capacity", "x", 1.23, "the same, load within both limits over that of pieces", "table 8: 1.6 over 1.3 "
                  "requests/s", "simulated", "30 % of the paper's figure either way, and above one", at_least=1.1, at_most=1.6),
            Claim("expert_loads", "of the bytes", 0.39, "the same at half of the load: expert weights that steps read, from "
                  "their number and their mean rows: less", "table 7", "simulated", "30 % of the paper's figure either way",
                  at_least=0.273, at_most=0.507),
        ),
    )  # fmt: skip
    tokens: int = choice(512, 256, 1024, help="a step reads about this many tokens' worth of prompts")
    layered: bool = choice(True, False, help="by groups of layers; without, by pieces of that many tokens")

    def baseline(self) -> "LayeredPrefill":
        return LayeredPrefill(layered=False)

    def check(self, demand: Demand) -> Verdict:
        """Refuses models without experts, and prompts of one piece."""
        if not demand.group.graph.find("expert"):
            return No(f"{demand.group.graph.name} has no experts: pieces of its prompts are bound by arithmetic")
        longest = max(r.prompt for r in demand.requests)
        return (
            True if longest > self.tokens else No(f"no prompt is longer than a piece of {self.tokens} tokens: {longest} at most")
        )

    def deploy(self, demand: Demand) -> Deployment:
        """The same replicas, with prompts by layers."""
        rules = replace(demand.group.rules, mixed=True, chunked=True, max_tokens=self.tokens)
        if self.layered:
            longest = max(r.prompt for r in demand.requests) + rules.max_sequences
            rules = replace(rules, chunked=False, layered=self.tokens, max_tokens=max(longest, demand.group.rules.max_tokens))
        return Deployment(replace(demand.group, rules=rules))
