"""Read prompts on one pool of machines and decode on another, each of the type and number that a budget makes best.

Reading is bound by arithmetic and decoding by memory: machines that are good at one are paid in vain for the other. Both
pools are sized by what one machine of each serves within its limits. Keys and values leave layer by layer while the prompt
is still read, so that little of their way is seen.

## When it helps
Clusters with limits on both phases: apart, the token pool needs no fast arithmetic, and older or capped machines do.

## When it does not
Batch jobs without limits, where machines that do both lose nothing. A handful of machines: one too many in a pool is idle.
The paper lets machines of both pools help out in a mixed one when load is uneven; here the pools are fixed, so a load
unlike the one they were sized for is served worse than there.

## Reference
Patel et al., Splitwise: Efficient generative LLM inference using phase splitting, ISCA 2024, arXiv 2311.18677.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.machine import Link, Machine, machine
from narrows.simulate.demand import Demand, Deployment, split
from narrows.simulate.fleet import Group
from narrows.technique import Card, Claim, No, Serves, Verdict, choice


@dataclass(frozen=True)
class Splitwise(Serves):
    """Pools of prompt and of token machines, as large as the power or the price of the machines that are there allows."""

    card: ClassVar[Card] = Card(
        "splitwise",
        relieves=(Limit.SCHEDULING, Limit.ENERGY),
        phases=("prefill", "decode"),
        exact=True,
        price="weights are held in both pools, and keys and values travel between machines",
        claims=(
            Claim("same_power", "x", 2.15, "simulated, BLOOM-176B, conversations, DGX-A100 for as much power as 8 DGX-H100: two "
                  "pools over machines that do both; nine limits relative to an idle A100", "section 6.2, figure 18a",
                  "simulated", "30 % of the paper's figure either way (a fifth of its machines, no mixed pool)",
                  at_least=1.505, at_most=2.795),
            Claim("same_cost", "x", 1.4, "the same for the price of 8 DGX-H100, over these doing both", "section 6.3, figure 18b",
                  "simulated", "30 % of the paper's figure above, at least a tenth better below", at_least=1.1, at_most=1.82),
            Claim("second_token", "of a token's time", 0.165, "simulated, code, idle A100: what the way of keys and values adds "
                  "to the second token; not a number where nothing travels", "section 6.1 (0.64 if sent after the prompt)",
                  "simulated", "at most the paper's, whose semaphores are not simulated", at_most=0.165),
        ),
    )  # fmt: skip
    apart: bool = choice(True, False, help="without: the machines as they stand, each doing both")
    reader: str = choice("", "h100-sxm", "a100-80gb", help="machine that reads prompts (none: the one that is there)")
    writer: str = choice("", "h100-sxm", "a100-80gb", help="machine that decodes (none: the one that is there)")
    budget: str = choice("power", "cost", help="what may not grow")
    gigabits: float = choice(200.0, 400.0, help="per second and device between machines")
    streams: bool = choice(True, False, help="keys and values leave layer by layer; without, after the prompt")

    def baseline(self) -> "Splitwise":
        return Splitwise(apart=False)

    def check(self, demand: Demand) -> Verdict:
        """Refuses where the budget does not hold a machine of each pool that keeps its limits."""
        found = self._sized(demand)[0][0]
        return True if found else No(f"the {self.budget} of {demand.group.replicas} machines is too little for a pool of each")

    def deploy(self, demand: Demand) -> Deployment:
        """Both pools; raises NarrowsError with the reason where the budget holds none."""
        if not self.apart:
            return Deployment(demand.group)
        (rate, _, _), readers, writers = self._sized(demand)
        if not rate:
            raise NarrowsError(f"the {self.budget} of {demand.group.replicas} machines is too little for a pool of each.",
                               where=self.card.slug, remedy="Give more machines, or looser limits.")  # fmt: skip
        reader, writer = self._pools(demand)
        return Deployment(replace(writer, replicas=writers), replace(reader, replicas=readers))

    def _sized(self, demand: Demand) -> tuple[tuple[float, float, float], int, int]:
        """What the best pools serve, and how many machines of each."""
        reader, writer = self._pools(demand)
        read, answer = demand.reading().capacity(Deployment(reader)), demand.answering().capacity(Deployment(writer))
        own = self._price(demand.group) * demand.group.replicas
        return split(own, (read, self._price(reader)), (answer, self._price(writer)))

    def _pools(self, demand: Demand) -> tuple[Group, Group]:
        """One machine of each pool."""
        wire = Link("infiniband", self.gigabits / 8 * 1e9, 5e-6)
        one = replace(demand.group, replicas=1, wire=wire, streams=self.streams)
        reader, writer = (machine(name) if name else one.machine for name in (self.reader, self.writer))
        return replace(one, machine=reader), replace(one, machine=writer)

    def _price(self, group: Group) -> float:
        """Watts or USD an hour of a replica's devices; raises NarrowsError where they are not known."""
        each = _figure(group.machine, "power_watts" if self.budget == "power" else "price_per_hour")
        return each * group.devices


def _figure(device: Machine, name: str) -> float:
    found = getattr(device, name)
    if not found:
        raise NarrowsError(f"its {name} is not known.", where=device.name, remedy="Add it to the machine's file.")
    return float(found)
