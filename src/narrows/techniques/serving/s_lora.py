"""Serve thousands of adapters of one model together: the model's products once for all requests, each one's adapter on top.

Merged adapters are copies of the model: kept beside each other they share no memory, merged one after another no batch.
Unmerged, every request rides in the same batch; kernels gather the low-rank weights that each row needs, whatever their
ranks. Adapters wait in the host's memory; those of the requests that run lie in one pool of pages with keys and values.

## When it helps
Many adapters with few requests each: memory and batches as of one model, whatever the number of adapters.

## When it does not
One or two adapters with all the load: merged, they cost nothing in a step. High ranks in large batches: every running adapter's
weights are read in every step.

## Reference
Sheng et al., S-LoRA: Serving Thousands of Concurrent LoRA Adapters, MLSys 2024, arXiv 2311.03285. Bringing adapters from the
host is taken as hidden, as its prefetching does; adapters are asked for equally often, merging one is free, and on several
devices each holds them whole (the paper cuts them as the products beside them).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Dim, Graph, Op
from narrows.simulate.demand import Demand, Deployment
from narrows.technique import Card, Claim, No, Serves, Verdict, choice

_ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")  # the paper's: products around attention


@dataclass(frozen=True)
class SLoRA(Serves):
    """Unmerged adapters in one batch and one pool of memory."""

    card: ClassVar[Card] = Card(
        "s-lora",
        relieves=(Limit.CAPACITY, Limit.BANDWIDTH),
        phases=("prefill", "decode"),
        exact=True,
        price="two thin products beside each adapted one, and the weights of all running adapters read in every step",
        claims=(
            Claim("over_switching", "x", None, "simulated, Llama-2-7B on an A100 of 80 GB, 100 adapters of rank 8, prompts and "
                  "answers of 260 tokens, all there at once: requests per second over one merged adapter after another",
                  "section 7.2 (up to 4x over copies beside each other, up to 30x over switching)", "simulated",
                  "the paper's factor over the better of the two; switching takes no time here", at_least=4.0),
            Claim("flat", "of the throughput", None, "the same, 2,000 adapters over 5", "section 7.2: a slight decline first",
                  "simulated", "a tenth lost at the most", at_least=0.9, at_most=1.0),
            Claim("outputs", "of the largest output", None, "run, four requests with adapters of ranks 8 to 64 in one batch out "
                  "of one pool of pages, against each with its own merged weights; infinite where they cannot share a batch",
                  "section 5.3", "run", "sums in another order, in fp32", at_most=1e-5),
        ),
    )  # fmt: skip
    adapters: int = choice(100, 5, 2000, help="that requests ask for, equally often")
    rank: int = choice(8, 16, 64, help="of the adapters")
    merged: bool = choice(
        False, True, help="one adapter after another is merged into the model, for free, and serves its requests"
    )

    def __post_init__(self) -> None:
        for name in ("adapters", "rank"):
            if getattr(self, name) < 1:
                raise NarrowsError(f"it is {getattr(self, name)}.", where=f"{self.card.slug}: {name}", remedy="Give 1 or more.")

    def baseline(self) -> "SLoRA":
        return replace(self, merged=True)

    def graph(self, graph: Graph, running: int) -> Graph:
        """The graph with the low-rank products of at most `running` adapters that are on the device."""
        held = min(self.adapters, running)

        def change(op: Op) -> Op | Iterable[Op]:
            if op.kind != "linear" or not op.name.endswith(_ADAPTED):
                return op
            down = self._thin(op, "lora_A", held, inputs=op["inputs"], outputs=self.rank)
            up = self._thin(op, "lora_B", held, inputs=self.rank, outputs=op["outputs"])
            return op, down, replace(up, inputs=(down.name,))

        return graph.map(change)

    def _thin(self, op: Op, name: str, held: int, **sizes: Dim) -> Op:
        """One of an adapted product's two, of which each row uses its own."""
        dims = {"rows": op["rows"], "experts": held, "top_k": 1, **sizes}
        return replace(op, name=f"{op.name}.{name}", kind="expert", dims=dims, weight=op.act, split="")

    def check(self, demand: Demand) -> Verdict:
        """Refuses a model without the products that it adapts."""
        graph = demand.group.graph
        if any(op.kind == "linear" and op.name.endswith(_ADAPTED) for op in graph):
            return True
        return No(f"{graph.name} has no products named {', '.join(_ADAPTED)}")

    def deploy(self, demand: Demand) -> Deployment:
        """The same replicas with adapters beside the model; merged, a step holds the requests of one adapter alone."""
        group = demand.group
        most = group.rules.max_sequences
        if self.merged:
            return Deployment(replace(group, rules=replace(group.rules, max_sequences=max(1, most // self.adapters))))
        return Deployment(replace(group, graph=self.graph(group.graph, most)))
