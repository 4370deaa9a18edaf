"""Let requests join the batch that generates as soon as they come, and leave it as soon as they have their tokens.

A pass that generates one token for every sequence reads all weights once, however many sequences there are. A new request
reads its prompt by itself and is in the next pass; one that is done gives its slot of the buffer to the last one, so that
the others stay packed. The slots' tensors are cut over devices as the model is.

## When it helps
Requests that come at any time and want answers of unlike lengths: a batch formed beforehand lets those who come later wait
for its longest answer, and instances beside each other on a device read all weights each for its own sequence.

## When it does not
Requests that come together and want equally many tokens are a batch already. Little load: nobody is there to share a pass
with. The gain in load hangs on the limit: here it is fourteen times where a request may take twice its time alone, and four
where it may take three times. Long prompts, for which those that generate wait: pieces beside them are better
(`sarathi-serve`). Engines since Orca batch this way; the gain is over those that do not.

## Reference
Yao et al., Flover: A Temporal Fusion Framework for Efficient Autoregressive Model Parallel Inference, HiPC 2023, arXiv
2305.13484. `modules/fused_generation.py` runs it on one device.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.cost import Limit
from narrows.simulate.demand import Demand, Deployment
from narrows.technique import Card, Claim, No, Serves, Verdict, choice


@dataclass(frozen=True)
class Flover(Serves):
    """One batch that requests join and leave between passes."""

    card: ClassVar[Card] = Card(
        "flover",
        relieves=(Limit.BANDWIDTH, Limit.SCHEDULING),
        phases=("decode",),
        exact=True,
        price="those that generate wait while the prompt of a new request is read",
        claims=(
            Claim("gpt", "x", None, "simulated, GPT-NeoX-20B on an A100, Poisson arrivals, prompts of 128 and answers of 256 "
                  "tokens (spread 0.6), at most 64 at a time: load whose 90th percentile of latency is twice that of requests "
                  "alone, over batches of who waits (all assumed)", "abstract: over 11 x, no setting named: the direction",
                  "simulated", "twice: what it gives hangs on the limit, and a loose one forgives batches", at_least=2.0),
            Claim("llama", "x", None, "the same, Llama-2-70B on four A100 (tensor parallel)",
                  "abstract: 16 x, no setting named: the direction", "simulated", "as gpt", at_least=2.0),
            Claim("unlike_lengths", "x", None, "the same as gpt, over its gain where all answers are of 256 tokens",
                  "abstract: various generation lengths, eviction of finished tasks", "simulated",
                  "a fifth more: a batch waits for its longest answer", at_least=1.2),
            Claim("instances", "x", None, "the same as gpt, over the most that instances beside each other can serve, whose "
                  "passes read all weights each: one request in the time it takes alone", "abstract: bandwidth contention",
                  "simulated", "an order of magnitude", at_least=10.0),
            Claim("passes", "x", None, "run, SmolLM2-135M in fp32, 8 prompts, one every 3 passes, 4 to 30 tokens each: passes "
                  "over all weights in batches of who waits, over it; not a number unless all tokens are those of requests alone",
                  "abstract: fuses the generation process temporally", "run", "a fifth of the passes saved", at_least=1.25),
        ),
    )  # fmt: skip
    fused: bool = choice(True, False, help="requests join and leave between passes; without, a batch ends before the next begins")

    def baseline(self) -> "Flover":
        return Flover(fused=False)

    def check(self, demand: Demand) -> Verdict:
        """Refuses loads in which no two requests generate, since nothing could be fused."""
        generating = sum(r.longest > 1 for r in demand.requests)
        return True if generating > 1 else No(f"{generating} of its requests generate more than a token: nothing to fuse")

    def deploy(self, demand: Demand) -> Deployment:
        """The same replicas; prompts are read whole, between passes."""
        rules = demand.group.rules
        longest = max(r.prompt for r in demand.requests) + rules.max_sequences
        rules = replace(rules, mixed=False, chunked=False, layered=0, batched=not self.fused,
                        max_tokens=max(longest, rules.max_tokens))  # fmt: skip
        return Deployment(replace(demand.group, rules=rules, sharing=None))
