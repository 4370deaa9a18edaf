"""Read prompts and decode on devices of their own, each phase cut and repeated as its own limit asks.

A simulator finds how many requests per second one replica of each phase serves within its limit, for every degree of
tensor parallelism; replicas of the two best are then matched to each other's rate. Keys and values travel inside a node.

## When it helps
Limits on both the first and the later tokens, of which one machine doing both keeps the looser one at a fraction of its
throughput: decoding is held up by prompts, and the limit on later tokens is the narrow place.

## When it does not
Where the first token's limit binds and prompts alone need all devices; where a replica for each phase does not fit; and
where keys and values cannot hold the batch that decoding alone could run. An engine that reads prompts in pieces has less
to lose: the paper's baseline, and the one here, puts whole prompts first. Against it the simulator finds less than the
paper measured: 1.2x on 16 devices for long prompts to OPT-66B (4.3x there), 1.1x for chats with OPT-13B (2.0x there); its
baseline is a later and faster engine, and replicas that share a queue lose less to bursts than one alone.

## Reference
Zhong et al., DistServe: Disaggregating Prefill and Decoding for Goodput-optimized Large Language Model Serving, OSDI 2024,
arXiv 2401.09670.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.simulate.demand import Demand, Deployment, split
from narrows.simulate.fleet import Group
from narrows.technique import Card, Claim, No, Serves, Verdict, choice

NODE = 8  # devices that a link joins: a replica is not cut further
TRIED = 3  # placements that are played as a whole, the best by their phases


@dataclass(frozen=True)
class DistServe(Serves):
    """Prefill and decoding apart, placed by the goodput of each."""

    card: ClassVar[Card] = Card(
        "distserve",
        relieves=(Limit.SCHEDULING,),
        phases=("prefill", "decode"),
        exact=True,
        price="weights are held twice, and keys and values travel",
        claims=(
            Claim("goodput", "x per device", 2.1, "simulated, OPT-13B on A100, prompts of 512 and answers of 64 tokens, 90 % "
                  "within 0.4 s and 0.04 s: three devices apart over one together", "section 1, figure 1", "simulated",
                  "30 % of the paper's figure either way", at_least=1.47, at_most=2.73),
            Claim("readers_per_writer", "replicas", 2, "the same: what the search places on three devices", "section 1, figure 1",
                  "simulated", "the paper's placement", at_least=2, at_most=2),
            Claim("transfer", "of the latency", 0.001, "simulated, the same as goodput, near the most it serves; not a number "
                  "where nothing travels", "section 6.3", "simulated", "the paper's bound: below 0.1 %", at_most=0.001),
        ),
    )  # fmt: skip
    apart: bool = choice(True, False, help="without: the replicas as they stand, each doing both")

    def baseline(self) -> "DistServe":
        return DistServe(apart=False)

    def check(self, demand: Demand) -> Verdict:
        """Refuses where no replica of each phase fits into the devices, or none keeps its limit."""
        if not demand.objectives:
            return No("no objective for first or later tokens is given: there is nothing that one phase disturbs in the other")
        found = self.place(demand)
        return True if found else No(f"{_devices(demand)} devices hold no replica of each phase that keeps its limits")

    def place(self, demand: Demand) -> Deployment | None:
        """The most requests per second on the demand's devices: tensor parallelism of each phase, and their replicas."""
        widths = [width for width in (1, 2, 4, NODE) if width < _devices(demand) and _fits(demand.group, width)]
        alone = [(width, Deployment(replace(demand.group, devices=width, replicas=1))) for width in widths]
        reading = [(demand.reading().capacity(one), width) for width, one in alone]
        answering = [(demand.answering().capacity(one), width) for width, one in alone]
        ranked = sorted(((*split(_devices(demand), r, a), r[1], a[1]) for r in reading for a in answering), reverse=True)
        found = [
            Deployment(replace(demand.group, devices=y, replicas=writers), replace(demand.group, devices=x, replicas=readers))
            for (rate, _, _), readers, writers, x, y in ranked[:TRIED]
            if rate
        ]
        return max(found, key=lambda one: (demand.capacity(one) / one.devices, *(-g.devices for g in one.groups)), default=None)

    def deploy(self, demand: Demand) -> Deployment:
        """The placement; raises NarrowsError with the reason where there is none."""
        if not self.apart:
            return Deployment(demand.group)
        found = self.place(demand)
        if found is None:
            raise NarrowsError(f"{_devices(demand)} devices hold no replica of each phase that keeps its limits.",
                               where=self.card.slug, remedy="Use more devices, or looser limits.")  # fmt: skip
        return found


def _devices(demand: Demand) -> int:
    return demand.group.devices * demand.group.replicas


def _fits(group: Group, width: int) -> bool:
    """Whether a replica cut over so many devices leaves room for keys and values."""
    try:
        return replace(group, devices=width).room() > 0
    except NarrowsError:
        return False
