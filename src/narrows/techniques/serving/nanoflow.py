"""Cut every step in two and run the halves side by side on one device: one computes while the other reads or sends.

Products are bound by arithmetic, attention of decoding by memory, collectives by links, and engines run them one after
another. Of two halves of a batch one can be in each; every kind is given the share of the device's units at which it
loses least. What runs beside the products lengthens them by the units it takes: about half a second for each second of
attention (0.4 of the units for 0.8 of its speed).

## When it helps
Throughput above all: thousands of requests in steps large enough that halves still saturate arithmetic, a model cut over
devices (its collectives are a fifth of a step), long contexts beside many products.

## When it does not
Small steps: weights are read once for each half, so the cut costs more than it hides, and the step is left whole. A step
bound by memory has nothing to hide its reading behind. The paper's 1.91x is over TensorRT-LLM, engine against engine; the
overlap alone, which is what is simulated here, gives 1.17x by its own ablation.

## Reference
Zhu et al., NanoFlow: Towards Optimal Large Language Model Serving Throughput, OSDI 2025, arXiv 2408.12757. The share of
the units for attention is the paper's (section 4.1.4); that for collectives (0.2 for half their speed) is an assumption.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.cost import Limit
from narrows.simulate.demand import Demand, Deployment
from narrows.simulate.fleet import Group
from narrows.simulate.step_times import Overlap
from narrows.technique import Card, Claim, No, Serves, Verdict, choice

STEP = 2048  # tokens: the paper's dense batch


@dataclass(frozen=True)
class NanoFlow(Serves):
    """Steps of a fixed size whose products, attention and collectives overlap in nano-batches."""

    card: ClassVar[Card] = Card(
        "nanoflow",
        relieves=(Limit.BANDWIDTH, Limit.COMMUNICATION),
        phases=("prefill", "decode"),
        exact=True,
        price="weights are read once for every nano-batch, and large steps make single tokens slower",
        claims=(
            Claim("decode_heavy", "x", 1.17, "simulated, Llama-2-70B on 8 A100, prompts of 512 and answers of 1,024 tokens, "
                  "steps of 2,048: throughput over the same without overlap", "section 6.4, figure 9", "simulated",
                  "half of the paper's gain or more, no more than half as much again", at_least=1.085, at_most=1.255),
            Claim("prefill_heavy", "x", 1.07, "the same, prompts of 512 tokens alone: only collectives can be hidden",
                  "section 6.4, figure 9", "simulated", "half of the paper's gain or more, no more than half as much again",
                  at_least=1.035, at_most=1.105),
            Claim("cut", "of a step", 0.132, "simulated, what two halves of a step of 2,048 tokens take, one after the other, "
                  "over the whole, less one (without attention)", "section 6.4: nano-batches without overlap", "simulated",
                  "30 % of the paper's figure either way", at_least=0.092, at_most=0.172),
            Claim("best_of_optimal", "of arithmetic's bound", 0.685, "simulated, the best of four mixes of prompts and answers, "
                  "over 1,857 tokens/s and device", "section 6.2; 0.50 to 0.72 over models", "simulated",
                  "in the paper's range, and above what the same engine reaches in sequence (0.59)", at_least=0.61, at_most=0.72),
        ),
    )  # fmt: skip
    parts: int = choice(2, 3, 4, help="nano-batches of a step; 1: nothing overlaps")
    memory: float = choice(0.5, help="seconds of products that a second of attention costs while both run")
    network: float = choice(0.4, help="seconds of products that a second of collectives costs while both run")

    def baseline(self) -> "NanoFlow":
        return NanoFlow(parts=1)

    def check(self, demand: Demand) -> Verdict:
        """Refuses where a full step, half of it decoding, is not shorter in parts."""
        cut, whole = (_full_step(one.deploy(demand).group, demand) for one in (self, self.baseline()))
        return (
            True
            if cut < whole
            else No(f"in parts a step of {STEP} tokens takes {cut / whole:.3f} of its time: nothing is gained")
        )

    def _overlap(self) -> Overlap | None:
        return Overlap(self.parts, self.memory, self.network) if self.parts > 1 else None

    def deploy(self, demand: Demand) -> Deployment:
        """The same replicas with steps of 2,048 tokens, cut where that makes them shorter."""
        rules = replace(demand.group.rules, mixed=True, chunked=True, max_tokens=STEP, max_sequences=STEP)
        return Deployment(replace(demand.group, rules=rules, overlap=self._overlap()))


def _full_step(group: Group, demand: Demand) -> int:
    """Picoseconds of a step of which half the tokens are of sequences that decode, before what is the same in parts."""
    times, context = group.times(), sum(r.prompt + r.output // 2 for r in demand.requests) // len(demand.requests)
    segment = times.decoding(STEP // 2, STEP // 2 * context, STEP)
    rows = times.rows(STEP // 2) + times.reading(STEP // 2, STEP // 2)
    return rows + segment.base + segment.slope * (STEP // 2 * context - segment.start)
