"""Read prompts beside decoding on one device, each on its own share of the units, chosen before every step by what it costs both.

Steps that hold both are as long as their prompts; two streams each take steps of their own length. A share of the units has
as much of the arithmetic, but decoding reaches the memory's bandwidth on a part of them, so prompts may have the rest. The
cost model says what each share makes of both steps: while blocks are free, prompts get what leaves decoding at most `slower`
times its best; when they run short, decoding goes first and frees some. Short prompts are read before long ones.

## When it helps
One device with a load of long prompts and answers that are to flow: near saturation the time between tokens falls to that of
decoding alone, and first tokens no longer wait behind the longest prompts.

## When it does not
Little load: a prompt on a share of the device takes longer than on all of it, and first tokens come a fifth later. A
device whose bandwidth takes all its units, few units, or an engine's steps that are bound by its host. Under a load of equal
prompts their order gains nothing.

## Reference
Shi et al., Nexus: Proactive Intra-GPU Disaggregation of Prefill and Decode in LLM Serving, 2025, arXiv 2507.06608. Its
curves of saturation are fitted to each model; here a unit asks for so many bytes a second (`simulate/sharing.py`). That the
caches which prompts read make decoding slower as they grow is not in the model.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.cost import Limit
from narrows.simulate.demand import Demand, Deployment
from narrows.simulate.sharing import SHARES, Sharing
from narrows.technique import Card, Claim, No, Serves, Verdict, choice


@dataclass(frozen=True)
class Nexus(Serves):
    """Two streams on shares of one device, and short prompts first."""

    card: ClassVar[Card] = Card(
        "nexus",
        relieves=(Limit.SCHEDULING,),
        phases=("prefill", "decode"),
        exact=True,
        price="each stream has a share of the arithmetic, and long prompts wait for short ones",
        claims=(
            Claim("throughput", "x", 2.2, "simulated, Llama-3.1-8B on an L20, three chats to two papers, steps of 2,048 tokens: "
                  "load with 90 % of first tokens within 10 s and of mean times between tokens within 0.2 s (limits and lengths "
                  "assumed), over pieces of prompts beside decoding", "abstract (up to, over vLLM)", "simulated",
                  "30 % of the paper's figure above; below, more than a fifth", at_least=1.2, at_most=2.86),
            Claim("between_tokens", "x", 2.5, "the same at the most that pieces serve: their mean time between tokens "
                  "over it", "abstract (up to, over vLLM)", "simulated", "30 % of the paper's figure either way",
                  at_least=1.75, at_most=3.25),
            Claim("first_token", "x", 20.0, "the same at a tenth more, where pieces no longer keep up: their mean time to the "
                  "first token of 1,000 requests over it (the longer the load, the more)", "abstract (up to, over vLLM)",
                  "simulated", "a quarter of the paper's best or more, at most 30 % above", at_least=5.0, at_most=26.0),
            Claim("over_half", "x", None, "the same as throughput, over half of the units always", "abstract: over shares that "
                  "do not anticipate", "simulated", "a tenth more", at_least=1.1),
            Claim("more_units", "of its time", 0.10, "tabled, the same device: by how much a step of 2,048 tokens of prompts is "
                  "shorter on 0.8 of the units than on 0.7", "section 3.2 (Qwen2.5-3B on an L20)", "checked",
                  "30 % of the paper's figure either way; not a number without shares", at_least=0.07, at_most=0.13),
        ),
    )  # fmt: skip
    beside: bool = choice(True, False, help="without: the engine as it stands")
    share: float = choice(0.0, 0.5, help="of the units for prompts; 0: before each of their steps, by the cost model")
    patience: float = choice(15.0, 0.0, help="tokens that a second of waiting outweighs; 0: prompts in the order of arrival")
    slower: float = choice(1.3, help="times its shortest step that the stream which goes second may take")

    def baseline(self) -> "Nexus":
        return Nexus(beside=False)

    def check(self, demand: Demand) -> Verdict:
        """Refuses a device with so few units that the least share is none."""
        units = demand.group.machine.units
        return True if units * SHARES[0] >= 1 else No(f"{demand.group.machine.name} has {units} units: too few to share")

    def deploy(self, demand: Demand) -> Deployment:
        """The same replicas with prompts in a stream of their own."""
        if not self.beside:
            return Deployment(demand.group)
        rules = replace(demand.group.rules, mixed=False, chunked=True, batched=False, layered=0, patience=self.patience)
        return Deployment(replace(demand.group, rules=rules, sharing=Sharing(self.share, slower=self.slower)))
