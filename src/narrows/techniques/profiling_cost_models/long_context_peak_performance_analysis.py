"""Price serving a long context by four terms that all grow with the cache of keys and values, at the machine's peaks.

Reading the prompt is bound by arithmetic, the number of users by the memory's capacity, each answer by the memory's
bandwidth, and changing to a user whose cache was moved to the host by the link to it. From the four follows what one
session costs: a prompt, and rounds of an answer after a change of user. The same is told for the cache halved in four
ways: in layers that keep one, in heads, in tokens kept after the prompt was read, and in the bits of its numbers.

## When it helps
Deciding what a longer context costs before anything runs, and which compression of the cache cuts the term that hurts.

## When it does not
These are bounds: no kernel is faster, and real ones reach a part of each peak (`narrows diagnose` says how much).
What halving does to the answers' quality is not in it. A network without a cache has nothing to move.

## Reference
Fu, Challenges in Deploying Long-Context Transformers: A Theoretical Peak Performance Analysis, 2024, arXiv 2405.08944.
Its GB of a cache are GiB. Its time of reading a long prompt is what one of attention's two products takes; ours has both.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from narrows.cost import Limit, cost, total
from narrows.costmodel import ATTENTION, peak
from narrows.errors import NarrowsError
from narrows.footprint import footprint
from narrows.graph import Graph, Op
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

_KEEP = (*ATTENTION, "scan")  # the kinds that keep keys, values or a state from step to step
_TERMS = ("prefill_seconds", "user_bytes", "answer_seconds", "switch_seconds")
_SETTING = "Yi-34B in 16 bits on an A100 of 80 GB, 50K context"
_ROUNDED = "the paper rounds, and its model has 34e9 parameters: a tenth either way"


def _whole(graph: Graph) -> Graph:
    return graph


def _layers(graph: Graph) -> Graph:
    """Every other layer that keeps a cache goes without one, and without attention over the whole context."""
    seen = 0

    def change(op: Op) -> Op | None:
        nonlocal seen
        if op.kind not in _KEEP:
            return op
        kept, seen = (seen + op.repeat + 1) // 2 - (seen + 1) // 2, seen + op.repeat
        return replace(op, repeat=kept) if kept else None

    return graph.map(change)


def _heads(graph: Graph) -> Graph:
    return graph.map(lambda op: op.but(kv_heads=op["kv_heads"] * 0.5) if op.kind == "attention" else op)


def _tokens(graph: Graph) -> Graph:
    """Half of the tokens are dropped once the prompt was read, so that attention over the prompt stays as it is."""
    return graph.map(lambda op: op.but(context=op["context"] * 0.5, held=op["held"] * 0.5) if op.kind in ATTENTION else op)


def _bits(graph: Graph) -> Graph:
    def change(op: Op) -> Op:
        kept = op.cache or op.act
        return replace(op, cache=replace(kept, name=f"half of {kept.name}", bits=kept.bits / 2)) if op.kind in _KEEP else op

    return graph.map(change)


HALVED: Mapping[str, Callable[[Graph], Graph]] = {
    "nothing": _whole, "layers": _layers, "heads": _heads, "tokens": _tokens, "bits": _bits
}  # fmt: skip


@dataclass(frozen=True)
class LongContextCost(Measures):
    """The four terms of serving a context, the cost of a session, and what halving the cache in four ways cuts."""

    card: ClassVar[Card] = Card(
        "long-context-peak-performance-analysis",
        relieves=(Limit.CAPACITY, Limit.BANDWIDTH, Limit.COMPUTE, Limit.COMMUNICATION),
        phases=("prefill", "decode"),
        exact=True,
        claims=(
            Claim("cache_size", "GiB", 11.0, _SETTING, "section 2", "checked", _ROUNDED, at_least=9.9, at_most=12.1),
            Claim("prefill_long", "s", 14.1, f"{_SETTING}, one product of attention", "section 2", "checked", _ROUNDED,
                  at_least=12.7, at_most=15.5),
            Claim("prefill_growth", "x", 15.8, "the same over that at 4K (14.1 s and 0.89 s)", "section 2", "checked", _ROUNDED,
                  at_least=14.3, at_most=17.4),
            Claim("users_long", "users", 1.0, _SETTING, "section 2", "checked", "a whole number", at_least=1.0, at_most=1.0),
            Claim("users_short", "users", 20.0, "the same at 4K", "section 2", "checked",
                  "the paper says about 20: a fifth either way", at_least=16.0, at_most=24.0),
            Claim("answer_long", "s", 9.8, f"{_SETTING}, an answer of 250 tokens", "section 2", "checked", _ROUNDED,
                  at_least=8.9, at_most=10.8),
            Claim("switch_long", "s", 1.1, f"{_SETTING}, a link of 20 GiB/s", "section 2", "checked", _ROUNDED,
                  at_least=0.99, at_most=1.21),
            Claim("terms_cut", "terms", None, f"{_SETTING}: the fewest of the four terms that a way of halving the cache cuts",
                  "abstract", "checked", "one source of the costs: users, answers and switches at least", at_least=3.0),
        ),
    )  # fmt: skip
    cache: bool = choice(True, help="price the cache and the attention over it; False counts weights alone, as 2 N does")
    answer: int = choice(250, 1000, help="tokens of an answer")
    rounds: int = choice(5, 20, help="answers in a session after its prompt, each after a change of user")

    def __post_init__(self) -> None:
        for name in ("answer", "rounds"):
            if getattr(self, name) < 1:
                raise NarrowsError(f"{getattr(self, name)} is not a number of them.", where=f"{self.card.slug}: {name}",
                                   remedy="Give 1 or more.")  # fmt: skip

    def baseline(self) -> "LongContextCost":
        return LongContextCost(False, self.answer, self.rounds)

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """The four terms at the step's context per sequence, and a row for each way of halving the cache, cheapest first.

        cache_bytes of one user, prefill_seconds, users at a time, answer_seconds for one user alone, switch_seconds (one
        cache out, one in), session_seconds: what a session takes of the machine with `users` in a batch. In rows, `cuts`
        names the terms that become smaller. Raises NarrowsError for a machine without a link to its host, and where
        weights and one user's cache do not fit it.
        """
        context = math.ceil(float(step["context"]) / float(step["sequences"]))
        priced = graph if self.cache else graph.map(lambda op: None if op.kind in _KEEP else op)
        terms = {name: self._terms(halve(priced), machine, context) for name, halve in HALVED.items()}
        found = terms["nothing"]
        rows: list[Mapping[str, Any]] = [
            {"halved": name, **one, "cuts": tuple(term for term in _TERMS if one[term] < found[term] * (1 - 1e-6))}
            for name, one in terms.items()
        ]
        rows.sort(key=lambda row: float(row["session_seconds"]))
        seconds = ("prefill_seconds", "answer_seconds", "switch_seconds", "session_seconds")
        return Reading(found, {"cache_bytes": "B", "user_bytes": "B", **dict.fromkeys(seconds, "s")}, tuple(rows))

    def _terms(self, graph: Graph, machine: Machine, context: int) -> dict[str, float]:
        if machine.host_link is None:
            raise NarrowsError("it has no link to a host.", where=f"{machine.name}: links", remedy="Add its pcie link.")
        prompt, token = Step.prefill(1, context), Step.decode(1, context)
        cache = float(footprint(graph, prompt).kv_bytes)
        user = float(footprint(graph, token).total_bytes) - graph.weight_bytes
        if not user:
            raise NarrowsError("it does no work.", where=graph.name, remedy="Give a graph with ops.")
        users = math.floor((machine.memory.capacity_bytes - graph.weight_bytes) / user)
        if users < 1:
            raise NarrowsError(f"{graph.name} with {context:,} tokens needs {(graph.weight_bytes + user) / 1e9:,.0f} GB.",
                               where=machine.name, remedy="Take a larger machine, fewer tokens or smaller weights.")  # fmt: skip
        prefill = sum(float(cost(op, prompt, graph.eager).flop) / peak(op, machine) for op in graph)
        switch = 2 * cache / machine.host_link.bandwidth_bytes_per_s
        together = self._answer(graph, machine, Step.decode(users, context)) / users
        return {"cache_bytes": cache, "user_bytes": user, "prefill_seconds": prefill, "users": float(users),
                "answer_seconds": self._answer(graph, machine, token), "switch_seconds": switch,
                "session_seconds": prefill + self.rounds * (together + switch)}  # fmt: skip

    def _answer(self, graph: Graph, machine: Machine, step: Step) -> float:
        """Seconds of an answer at the memory's bandwidth: weights once per token, and each sequence's cache."""
        work = total(graph, step)
        return self.answer * float(work.weight_bytes + work.cache_bytes) / machine.memory.bandwidth_bytes_per_s
