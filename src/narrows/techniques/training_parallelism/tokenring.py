"""Split each sequence over devices; keys and values stay, queries go round, and what they found goes straight home.

A device attends with whichever queries are there over its own keys and values. The queries travel on to its neighbour
meanwhile, and the finished block, with the logarithm of its sum of exponentials, to the device that they belong to, which merges
the blocks as they come: over another link of a mesh, which a ring of keys and values leaves idle.

## When it helps
Forward passes over long sequences on devices of which each pair has a link of its own (MI300X, Ascend, NVLink without a switch),
with as many key-value heads as heads: a message is half as long as keys and values together, and hides behind half as much work.

## When it does not
With grouped queries there are fewer keys and values than queries, and passing those round sends less. Through a switch, queries
and blocks leave by one port: nothing is gained, and the last blocks come home when all else is done. Weights lie whole.

## Reference
Wang et al., TokenRing: An Efficient Parallelism Framework for Infinite-Context LLMs via Bidirectional Communication,
2024, arXiv 2412.20501. The baseline is Ring Attention, Liu et al. 2023, arXiv 2310.01889.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.cost import Limit
from narrows.costmodel import op_time
from narrows.errors import NarrowsError
from narrows.graph import Graph, Op, at
from narrows.machine import Machine
from narrows.simulate.schedule import Task, play
from narrows.simulate.timeline import Timeline
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

SUM_BITS = 32  # the logarithm of a query's sum of exponentials, for each head


@dataclass(frozen=True)
class TokenRing(Measures):
    """One layer's attention over a sequence that devices share, message by message, beside Ring Attention."""

    card: ClassVar[Card] = Card(
        "tokenring",
        relieves=(Limit.COMMUNICATION,),
        phases=("prefill", "forward"),
        exact=True,
        price="every device holds all weights, and is joined to every other",
        claims=(
            Claim("error", "of the largest number", None, "causal attention of 4 heads over 96 tokens in float32, queries passed "
                  "round 2, 4 and 8 ranks, against attention over all tokens", "abstract: Query and block outputs", "run",
                  "rounding alone", at_most=1e-5),
            Claim("link_bytes", "x", None, "bytes on the busiest link, Ring Attention over ours, Llama-2-7B, 24,000 tokens",
                  "abstract: significant reductions in communication overhead", "simulated",
                  "two, less the sums that go home with each block", at_least=1.9, at_most=2.0),
            Claim("speed_4", "x", None, "time of a layer's attention on 4 MI300X, Ring Attention over ours", "abstract: enhances "
                  "throughput", "simulated", "a direction; more than 2 is not to be had", at_least=1.2, at_most=2.0),
            Claim("speed_8", "x", None, "the same on 8: work per step falls with the square, messages with the number",
                  "abstract: as the degree of SP increases", "simulated", "a direction; more than 2 is not to be had",
                  at_least=1.2, at_most=2.0),
        ),
    )  # fmt: skip
    devices: int = choice(4, 2, 8, 16, help="that share each sequence")
    passed: str = choice("queries", "keys", help="what goes round; keys is Ring Attention")
    wiring: str = choice("mesh", "switch", help="a link for each pair, or one port for all that a device sends")

    def __post_init__(self) -> None:
        if self.devices < 2 or self.passed not in ("queries", "keys") or self.wiring not in ("mesh", "switch"):
            raise NarrowsError(f"devices={self.devices}, passed={self.passed}, wiring={self.wiring}.", where=self.card.slug,
                               remedy="Give two devices or more, queries or keys, and mesh or switch.")  # fmt: skip

    def baseline(self) -> "TokenRing":
        return replace(self, passed="keys")

    def messages(self, attention: Op, step: Step) -> Iterator[tuple[str, float]]:
        """What one device sends in a step of the ring, and its bytes: on to its neighbour, and home."""
        dims = attention.sized(step)
        queries, bits = float(dims["queries"]) / self.devices, attention.act.bits
        if self.passed == "keys":
            yield "on", queries * float(dims["kv_heads"] * (dims["head_dim"] + dims["value_dim"])) * bits / 8
        else:
            yield "on", queries * float(dims["heads"] * dims["head_dim"]) * bits / 8
            yield "home", queries * float(dims["heads"]) * (float(dims["value_dim"]) * bits + SUM_BITS) / 8

    def play(self, attention: Op, machine: Machine, step: Step) -> Timeline:
        """Attention of a layer on devices and their links, each way; tokens are dealt so that every block is as much work."""
        if machine.link is None:
            raise NarrowsError(
                f"{machine.name} has no link.", where=self.card.slug, remedy="Give a machine that has one to others."
            )
        share, mesh = 1 / self.devices, self.wiring == "mesh"
        block = replace(attention, repeat=1).but(
            queries=at(attention["queries"], step) * share, pairs=at(attention["pairs"], step) * share**2,
            context=at(attention["context"], step) * share)  # fmt: skip
        seconds = float(op_time(block, step, machine).seconds)
        speed = machine.link.bandwidth_bytes_per_s / (self.devices - 1 if mesh else 1)
        joined = replace(machine, links=(replace(machine.link, bandwidth_bytes_per_s=speed),), sources={})
        sends = {what: float(op_time(_message(size, attention), step, joined).seconds)
                 for what, size in self.messages(attention, step)}  # fmt: skip
        tasks: list[Task] = []
        came = dict.fromkeys(range(self.devices), -1)  # what brought the queries, or keys, that a device now has
        for hop in range(self.devices):
            here, came = came, {}
            for rank in range(self.devices):
                needs = ((here[rank], 0.0),) if hop else ()
                tasks.append(Task(f"attend {rank}.{hop}", "attention", rank, seconds, needs))
                if "home" in sends and hop:
                    way, done = f"{rank} to {(rank - hop) % self.devices if mesh else 'all'}", ((len(tasks) - 1, 0.0),)
                    tasks.append(Task(f"home {rank}.{hop}", "home", way, sends["home"], done, priority=1.0))
                if hop + 1 < self.devices:
                    on = (rank + 1) % self.devices
                    came[on] = len(tasks)
                    way = f"{rank} to {on if mesh else 'all'}"
                    tasks.append(Task(f"on {rank}.{hop}", "on", way, sends["on"], needs, priority=0.0))
        return play(tasks)

    def link_bytes(self, attention: Op, step: Step) -> float:
        """Bytes of a layer's attention on the link that carries most: what goes round, or what comes home from all others."""
        return max(size for _, size in self.messages(attention, step)) * (self.devices - 1)

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Seconds of all layers' attention, both ways, and bytes that a device sends on and home in a step of the model."""
        layers = [op for op in graph.forward if op.kind == "attention"]
        rows, found = [], dict[str, float]()
        for way in (self, replace(self, passed="keys" if self.passed == "queries" else "queries")):
            seconds = sum(way.play(op, machine, step).seconds * op.repeat for op in layers)
            sent = {"on": 0.0, "home": 0.0}
            for op in layers:
                for what, size in way.messages(op, step):
                    sent[what] += size * (self.devices - 1) * op.repeat
            rows.append({"passed": way.passed, "seconds": seconds, **{f"{what}, bytes": size for what, size in sent.items()}})
            found = found or {"seconds": seconds, "sent_bytes": sum(sent.values())}
        return Reading(found, {"seconds": "s", "sent_bytes": "B"}, tuple(rows))


def _message(size_bytes: float, like: Op) -> Op:
    return Op("message", "send", {"elements": 8 * size_bytes / like.act.bits, "ranks": 2}, act=like.act)
