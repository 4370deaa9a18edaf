"""Share long sequences over many devices and short ones over few, in the same step, so that all groups end together.

Sequence parallelism exchanges heads (Ulysses) among all devices of a group, and a group larger than a node does it over slow
links. One size for all must be that of the longest sequence; yet most sequences are short. Here every step looks at its
lengths: it cuts them into microbatches, the devices into groups of several sizes, and assigns sequences to groups so that
the slowest group takes the least time and none overflows.

## When it helps
Lengths with a long tail, links between nodes much slower than inside: only the few long sequences pay for them.

## When it does not
Equal lengths, or all so short that they fit a device. Lengths that are all near the limit leave one choice.

## Reference
Wang et al., Data-Centric and Heterogeneity-Adaptive Sequence Parallelism for Efficient LLM Training (FlexSP), ASPLOS 2025,
arXiv 2412.01523. There the groups come out of a linear program over buckets of lengths; here groups are split and merged
while that helps, and sequences go, longest first, to the group that ends first with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.layout import Layout, divisors
from narrows.machine import Cluster, Machine, cluster
from narrows.simulate.memory import constants as memory_constants
from narrows.simulate.memory import memory
from narrows.simulate.network import Axes, constants, network
from narrows.simulate.training import hidden_behind, ledger
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

_TOKENS = 1024  # of a device: the cost model goes through these and four times as many
_TAIL = "a GPT of 7B, 64 A100 40 GB, 3 steps of 512 sequences with a long tail up to 384 Ki tokens"


class Rates(NamedTuple):
    """By size of a group: seconds of a token and of a squared token, of one sequence; and what a device holds.

    exchange   seconds of gathering weights and summing gradients, once a microbatch;  exposed  of it, what shows in any case
    """

    sizes: tuple[int, ...]
    per_token: NDArray[np.float64]
    per_square: NDArray[np.float64]
    tokens_held: float
    exchange: float
    exposed: float

    def seconds(self, size: int, length: Any) -> Any:
        """Of a sequence in a group."""
        at = self.sizes.index(size)
        return self.per_token[at] * length + self.per_square[at] * length**2


class Group(NamedTuple):
    """Devices that share sequences, the lengths of these, and the seconds they take."""

    size: int
    lengths: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class FlexSP(Measures):
    """Groups and microbatches for the lengths of one step."""

    card: ClassVar[Card] = Card(
        "flexsp-heterogeneity-adaptive-sp",
        relieves=(Limit.COMMUNICATION, Limit.CAPACITY),
        phases=("train",),
        exact=True,
        claims=(
            Claim("speedup", "x", 1.98, _TAIL + ": one size that holds the limit over ours; NaN if a device overflows",
                  "abstract: up to", "simulated", "the lengths are ours: at least 1.3", 1.3, 2.6),
            Claim("over_best_static", "x", None, "the same against the best single size for each step", "section 6",
                  "simulated", "groups of several sizes, beyond the choice of one", at_least=1.05),
            Claim("gap_to_exhaustive", "x", None, "30 random small steps (4 nodes of 2, up to 6 sequences): worst time over the "
                  "least of all groups and assignments", "section 4", "checked", "within 5 %", at_most=1.05),
        ),
    )  # fmt: skip
    wiring: str = choice("aws-p4d", "dgx-h100", help="the cluster whose links join the devices")
    devices: int = choice(64, 8, 256)
    limit: int = choice(393_216, 65_536, help="longest sequence there may be: what a single size must hold")
    flexible: bool = choice(True, help="groups of several sizes; False: one size that holds the limit")

    def baseline(self) -> "FlexSP":
        return replace(self, flexible=False)

    def rates(self, graph: Graph, group: Cluster) -> Rates:
        """The cost model of a graph on as many devices of a cluster."""
        return _rates(graph, replace(group, nodes=max(1, -(-self.devices // group.devices_per_node))), self.devices)

    def plan(self, rates: Rates, lengths: Sequence[int]) -> list[list[Group]]:
        """Microbatches of groups. Raises NarrowsError for a sequence that all devices together cannot hold."""
        longest = max(lengths)
        if longest > rates.tokens_held * self.devices:
            raise NarrowsError(f"{longest} tokens; {self.devices} devices hold {rates.tokens_held * self.devices:.0f}.",
                               where=f"{self.card.slug}: lengths", remedy="Give more devices.")  # fmt: skip
        if not self.flexible:
            return self.single(rates, lengths, max(self.limit, longest))
        least = int(np.ceil(sum(lengths) / (rates.tokens_held * self.devices)))
        found = [self._cut(rates, sorted(lengths), many) for many in range(least, least + 3)]
        # what one size for all comes to is a plan as well
        found += [
            self.single(rates, lengths, int(size * rates.tokens_held))
            for size in rates.sizes
            if size * rates.tokens_held >= longest
        ]
        return min((plan for plan in found if plan), key=lambda plan: step_seconds(rates, plan))

    def single(self, rates: Rates, lengths: Sequence[int], limit: int) -> list[list[Group]]:
        """Groups of one size, the least that holds `limit`, filled longest first; a new microbatch where none has room."""
        size = next(s for s in rates.sizes if s * rates.tokens_held >= min(limit, rates.tokens_held * self.devices))
        left, plan = sorted(lengths, reverse=True), list[list[Group]]()
        while left:
            groups, left = assign(rates, [size] * (self.devices // size), left)
            plan.append(groups)
        return plan

    def _cut(self, rates: Rates, lengths: list[int], many: int) -> list[list[Group]]:
        """`many` microbatches of like lengths and equal tokens, each with its best groups; none where one does not fit."""
        ends = np.searchsorted(np.cumsum(lengths), np.arange(1, many) * sum(lengths) / many)
        plan = [self.groups(rates, [int(n) for n in part]) for part in np.split(np.array(lengths), ends) if len(part)]
        return plan if all(plan) else []

    def groups(self, rates: Rates, lengths: list[int]) -> list[Group]:
        """The groups of one microbatch: split and merged while the slowest gets faster; none where they cannot hold it."""
        lengths = sorted(lengths, reverse=True)
        seen: dict[tuple[int, ...], list[Group]] = {}

        def slowest(sizes: tuple[int, ...]) -> float:
            if sizes not in seen:
                groups, left = assign(rates, sizes, lengths) if sizes[0] * rates.tokens_held >= lengths[0] else ([], lengths)
                seen[sizes] = [] if left else groups
            return max((g.seconds for g in seen[sizes]), default=np.inf)

        for size in rates.sizes:
            here = (size,) * (self.devices // size)
            while (best := min(_near(here, max(rates.sizes)), key=slowest, default=here)) and slowest(best) < slowest(here):
                here = best
        return seen[min(seen, key=slowest)]

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Seconds of a step whose sequences have the step's lengths, flexible and with one size; a row for each group.

        Raises NarrowsError where no link joins the machine's devices, or a sequence is too long for all of them.
        """
        if machine.link is None:
            raise NarrowsError("no link joins its devices.", where=machine.name, remedy="Give a machine with a link.")
        group = replace(cluster(self.wiring), machine=machine, scale_up=machine.link)
        many, new = np.broadcast_arrays(step.batch, step.new)
        lengths = [int(n) for n in np.repeat(new.ravel(), many.ravel().astype(int))]
        rates = self.rates(graph, group)
        plans = {"seconds": self.plan(rates, lengths), "seconds_of_one_size": self.baseline().plan(rates, lengths)}
        values = {name: step_seconds(rates, plan) for name, plan in plans.items()} | {
            "microbatches": float(len(plans["seconds"]))
        }
        rows = [{"microbatch": m, "devices": g.size, "sequences": len(g.lengths), "longest": max(g.lengths), "seconds": g.seconds}
                for m, groups in enumerate(plans["seconds"]) for g in groups if g.lengths]  # fmt: skip
        return Reading(values, {"seconds": "s", "seconds_of_one_size": "s"}, tuple(rows))


def assign(rates: Rates, sizes: Sequence[int], lengths: Sequence[int]) -> tuple[list[Group], list[int]]:
    """Groups of these sizes with their sequences, longest first to where it ends first, and the lengths that found no room."""
    size = np.array(sizes)
    room, spent = size * rates.tokens_held, np.zeros(len(size))
    at = np.array([rates.sizes.index(s) for s in size])
    per_token, per_square = rates.per_token[at], rates.per_square[at]
    own: list[list[int]] = [[] for _ in size]
    left = []
    for length in lengths:
        after = np.where(room >= length, spent + per_token * length + per_square * length**2, np.inf)
        i = int(after.argmin())
        if not np.isfinite(after[i]):
            left.append(length)
            continue
        spent[i], room[i] = after[i], room[i] - length
        own[i].append(length)
    return [Group(int(s), tuple(o), float(t)) for s, o, t in zip(size, own, spent, strict=True)], left


def step_seconds(rates: Rates, plan: Sequence[Sequence[Group]]) -> float:
    """Microbatches one after another, each as long as its slowest group, with the exchange of weights beside it."""
    return float(sum(hidden_behind(rates.exchange, max(g.seconds for g in groups), rates.exposed) + max(g.seconds for g in groups)
                     for groups in plan))  # fmt: skip


def _near(sizes: Sequence[int], most: int) -> set[tuple[int, ...]]:
    """The sizes with one group split in two, or two equal ones merged."""
    found = set()
    for size in set(sizes):
        rest = list(sizes)
        rest.remove(size)
        if size > 1:
            found.add(tuple(sorted([*rest, size // 2, size // 2], reverse=True)))
        if size in rest and 2 * size <= most:
            rest.remove(size)
            found.add(tuple(sorted([*rest, 2 * size], reverse=True)))
    return found


@lru_cache(maxsize=16)
def _rates(graph: Graph, group: Cluster, devices: int) -> Rates:
    sizes = tuple(size for size in divisors(devices) if size & (size - 1) == 0)
    plain = Layout(data=devices, shard=3)
    net, axes = network(graph, group, plain, _TOKENS, framework="fsdp"), Axes.of(plain)
    needs = memory(net, plain, axes, 0, "fsdp")
    fixed = float(needs.allocated - needs.activations - needs.margin)
    room = (group.machine.memory.capacity_bytes - float(needs.runtime)) / (1 + memory_constants("fsdp")["margin"]) - fixed
    held = room / (float(needs.activations) / _TOKENS)
    coefficients = []
    for size in sizes:
        layout = Layout(context=size, context_by="ulysses", data=devices // size, shard=3)
        found = []
        for length in (_TOKENS * size, 4 * _TOKENS * size):
            own = network(graph, group, layout, length, framework="fsdp")
            spent = ledger(own, layout, Axes.of(layout), "fsdp")
            busy = sum(float(spent[cause]) for cause in ("forward", "backward", "recompute", "context", "ends"))
            found.append((length, busy))
        (a, s), (b, t) = found
        square = max((t / b - s / a) / (b - a), 0.0)
        coefficients.append((s / a - square * a, square))
    alone = ledger(net, replace(plain, overlap=False), axes, "fsdp")
    linear, squares = np.array(coefficients).T
    return Rates(sizes, linear, squares, max(held, 1.0), float(alone["gradients"]), constants("fsdp")["exposed"])
