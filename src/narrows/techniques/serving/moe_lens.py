"""How fast a mixture of experts can run with its weights and caches in the host's memory, and what stands in its way.

Weights cross the link to the device once a step, whatever the batch; the processor attends where the caches lie. A step is worth
what it can do in that time, and the caches that the host holds bound the tokens of a step: a prompt brings all its tokens
at once, an answer one for each sequence that is kept. Tokens per step and token of cache, over a request's life, times
the room for caches is the bound; prompts read beside decoding reach it, prompts read before it leave link or device idle.

## When it helps
Batch jobs of a model several times larger than the device's memory, with much memory in the host: it says what to buy.

## When it does not
Answers in time: a step takes seconds. Long answers to short prompts, where caches bound the tokens of a step at a small part
of the device's arithmetic. The rates are peaks but for the link, whose rate can be given.

## Reference
Yuan et al., MoE-Lens: Towards the Hardware Limit of High-Throughput MoE LLM Serving Under Resource Constraints, 2025, arXiv
2504.09345. The bound is its stage 1. The time of so many requests is our own form of its stage 2.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from narrows.cost import Limit, cost
from narrows.costmodel import ATTENTION, peak
from narrows.errors import NarrowsError
from narrows.footprint import footprint
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice


@dataclass(frozen=True)
class Host:
    """What bounds a model on a host and a device: seconds to bring all weights, tokens a second of the device's products, tokens
    of cache that fit, and tokens of cache that the processor reads in a second."""

    load: float
    compute: float
    room: float
    attended: float

    @property
    def most(self) -> float:
        """Tokens of a step beyond which the device's arithmetic takes longer than the link."""
        return self.load * self.compute


@dataclass(frozen=True)
class MoELens(Measures):
    """The bound on throughput out of the host's memory, what it is set by, and the time of a batch of requests."""

    card: ClassVar[Card] = Card(
        "moe-lens",
        relieves=(Limit.CAPACITY, Limit.COMMUNICATION),
        phases=("prefill", "decode"),
        exact=True,
        price="steps of seconds: throughput alone",
        claims=(
            Claim("cache_to_saturate", "GB", 1228.0, "Mixtral-8x7B on an A40 at 150 TFLOP/s and 32 GB/s, 512 tokens a sequence: "
                  "caches that keep all arithmetic busy", "table 2", "checked",
                  "the paper leaves the attention's weights out and mixes GB with GiB: 15 % either way",
                  at_least=1044.0, at_most=1412.0),
            Claim("cache_to_saturate_a100", "GB", 1277.0, "the same on an A100 at 312 TFLOP/s, 256 tokens a sequence", "table 2",
                  "checked", "15 % either way", at_least=1085.0, at_most=1469.0),
            Claim("accuracy", "of the simulated time", 0.94, "mean over 12 loads of 10,000 requests of 98 or 926 tokens, answers "
                  "of 32 to 256, 70 or 210 GB: predicted against played request by request, page by page (the paper: against its "
                  "engine)", "abstract", "simulated", "four points below the paper's", at_least=0.90),
            Claim("gain", "x", None, "mean over the same loads, played: prompts beside decoding in all the room, over prompts "
                  "first in the share of the room that MoE-Lightning's plans use (table 1)", "abstract (4.6x, with its kernels)",
                  "simulated", "the schedule alone, without the engines' kernels and stalls: twice as fast", at_least=2.0),
        ),
    )  # fmt: skip
    beside: bool = choice(True, False, help="prompts beside decoding, in all the room; without, prompts first, in part of it")
    cache_gb: float = choice(70.0, 210.0, help="GB of the host's memory for caches")
    answer: int = choice(128, 32, 512, help="tokens of an answer")
    link_gb_per_s: float = choice(0.0, 19.5, help="GB a second that the link reaches (0: the machine's own)")
    host_gb_per_s: float = choice(150.0, 300.0, help="GB a second of the host's memory")

    def __post_init__(self) -> None:
        for name in ("cache_gb", "answer", "host_gb_per_s"):
            if not getattr(self, name) > 0:
                raise NarrowsError(f"it is {getattr(self, name)}.", where=f"{self.card.slug}: {name}", remedy="Give more than 0.")
        if not self.link_gb_per_s >= 0:
            raise NarrowsError(f"it is {self.link_gb_per_s}.", where=f"{self.card.slug}: link_gb_per_s", remedy="Give 0 or more.")

    def baseline(self) -> "MoELens":
        return replace(self, beside=False)

    def host(self, graph: Graph, on: Machine) -> Host:
        """The bounds of a model with attention on the processor; a machine without a link to its host raises NarrowsError."""
        if on.host_link is None and not self.link_gb_per_s:
            raise NarrowsError(f"{on.name} has no link to a host.", where=self.card.slug, remedy="Give link_gb_per_s.")
        link = self.link_gb_per_s * 1e9 or on.host_link.bandwidth_bytes_per_s  # type: ignore[union-attr]
        step = Step.decode(4096, 1)
        products = sum(float(cost(op, step).flop) / peak(op, on) for op in graph if op.spec.matmul and op.kind not in ATTENTION)
        token = _token_bytes(graph)
        return Host(graph.weight_bytes / link, 4096 / products, self.cache_gb * 1e9 / token, self.host_gb_per_s * 1e9 / token)

    def to_saturate(self, graph: Graph, on: Machine, length: int) -> float:
        """Bytes of caches with which sequences of `length` tokens, one token each a step, keep all arithmetic busy.

        The prior model knows link and arithmetic alone: 0.
        """
        return self.host(graph, on).most * length * _token_bytes(graph) if self.beside else 0.0

    def bounds(self, host: Host, prompt: int) -> dict[str, float]:
        """Tokens per second, of prompts and answers, that each resource allows; the least is what no schedule exceeds."""
        found = {"compute": host.compute}
        if self.beside:
            held = self.answer * prompt + self.answer * (self.answer + 1) / 2  # tokens of cache of a request, over all its steps
            each = (prompt + self.answer) / held
            found |= {"capacity": each * host.room / host.load, "host memory": each * host.attended}
        return found

    def seconds(self, host: Host, prompt: int, requests: int) -> float:
        """Predicted time of so many requests: all their tokens at the bound, and the steps of one answer to fill and to drain."""
        drain = self.answer * host.load if self.beside else 0.0
        return requests * (prompt + self.answer) / min(self.bounds(host, prompt).values()) + drain

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Tokens per second for the step's prompt (its context in decode, else its new tokens), and a row for each bound.

        `saturating_bytes`: caches with which arithmetic would be the limit. A network that keeps no cache of keys and values
        gives no answers: zeros.
        """
        if not any(op["held"] for op in graph.find(*ATTENTION)):
            return Reading({"tokens_per_second": 0.0}, {"tokens_per_second": "tokens/s"})
        prompt = int(np.max(step.past)) or int(np.max(step.new))
        host = self.host(graph, machine)
        bounds = self.bounds(host, prompt)
        rate = min(bounds.values())
        values = {"tokens_per_second": rate, "requests_per_second": rate / (prompt + self.answer), "step": host.load,
                  "of_arithmetic": rate / host.compute}  # fmt: skip
        if self.beside:
            values["saturating_bytes"] = host.compute / bounds["capacity"] * self.cache_gb * 1e9
        units = {"tokens_per_second": "tokens/s", "requests_per_second": "requests/s", "step": "s", "saturating_bytes": "B"}
        rows = tuple({"bound": name, "tokens_per_second": bounds[name]} for name in sorted(bounds, key=lambda one: bounds[one]))
        return Reading(values, {name: unit for name, unit in units.items() if name in values}, rows)


def _token_bytes(graph: Graph) -> float:
    """Bytes of keys and values of a token."""
    return float(footprint(graph, Step.decode(1, 4095)).kv_bytes) / 4096
