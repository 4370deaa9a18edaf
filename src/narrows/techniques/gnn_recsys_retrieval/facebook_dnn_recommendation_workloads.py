"""Tell whether a recommender waits for its embedding tables or its dense layers, and how many a server holds within a bound.

A recommender gathers a few rows of huge tables for each item and runs small dense layers on their sums. A core has few
requests to memory in flight, so that gathering proceeds at their number times a cache line per miss, far below what the
memory could give, until co-located instances share it. Dense layers run from the last-level cache while an instance's
share of it holds them; then they wait for memory as well. From both follow latency, and the batch and the number of
instances that serve most items within a latency bound.

## When it helps
Choosing a server generation, a batch and a number of instances for a recommender; seeing that a faster matrix unit would
not help a model that gathers.

## When it does not
Tables that are small or visited unevenly lie in caches: their gathers are faster than told here. Threads within one
inference, and tables spread over machines, are not in the model.

## Reference
Gupta et al., The Architectural Implications of Facebook's DNN-based Personalized Recommendation, HPCA 2020,
arXiv 1906.03109. The model of a core is ours.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.cost import Limit, cost
from narrows.costmodel import peak, useful
from narrows.errors import NarrowsError
from narrows.graph import Graph, Op
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

if TYPE_CHECKING:
    import torch

# line fill buffers of a core (Intel optimization manual: 10 on Haswell and Broadwell) x 64 bytes, per miss of 90 ns (assumption)
GATHER_BYTES_PER_SECOND = 10 * 64 / 90e-9
BATCHES = tuple(4**power for power in range(7))
_MODELS = "open RMC1, RMC2 and RMC3"
_CORE = f"{_MODELS} with an eighth of their rows, on one core"
_SERVERS = f"{_MODELS}, one core of Haswell, Broadwell and Skylake"


@dataclass(frozen=True)
class RecommenderServing(Measures):
    """Where a recommender's time goes on one core, and what batches and co-location serve within a latency bound."""

    card: ClassVar[Card] = Card(
        "facebook-dnn-recommendation-workloads",
        relieves=(Limit.BANDWIDTH, Limit.COMPUTE, Limit.SCHEDULING),
        phases=("forward",),
        exact=True,
        claims=(
            Claim("bottleneck_flip", "fraction", None, f"{_CORE}, batch 64: least share of gathers in the first two models, of "
                  "dense layers in the last", "section 5", "run", "the named part takes more than half", at_least=0.5),
            Claim("share_error", "fraction", None, f"{_CORE}, batch 64: share of gathers, predicted to measured", "section 5",
                  "run", "far less than the half that decides which part it is", at_most=0.25),
            Claim("batching_gain", "x", None, f"{_CORE}: items per second within 10 ms over those at batch 1, the least",
                  "abstract", "run", "drastically: at least three times", at_least=3.0),
            Claim("colocation_gain", "x", None, f"{_MODELS} on Broadwell, batch 16: items per second within 10 ms over those "
                  "of one instance, the least", "abstract", "simulated", "drastically: at least three times", at_least=3.0),
            Claim("generation_spread", "x", 1.6, f"{_SERVERS}: slowest over fastest, the most over models and batches to 256",
                  "abstract", "simulated", "varies by 60 %: an eighth either way", at_least=1.4, at_most=1.8),
            Claim("order_flip", "x", None, f"{_SERVERS}, RMC3: Broadwell's lead at batch 1, Skylake's at 64, the smaller",
                  "section 5", "simulated", "each is ahead by more than a tenth where it leads", at_least=1.1),
        ),
    )  # fmt: skip
    memory: bool = choice(True, help="model cores, caches and gathers; False takes operations at the server's peak alone")
    pack: bool = choice(True, help="batch and co-locate up to the bound; False serves one item at a time")
    bound_seconds: float = choice(0.01, 0.1, help="that an item may take")

    def __post_init__(self) -> None:
        if not self.bound_seconds > 0:
            raise NarrowsError(f"{self.bound_seconds!r} s is no bound.", where=f"{self.card.slug}: bound_seconds",
                               remedy="Give more than 0.")  # fmt: skip

    def baseline(self) -> "RecommenderServing":
        return RecommenderServing(False, False, self.bound_seconds)

    def seconds(self, graph: Graph, machine: Machine, step: Step, instances: int = 1) -> dict[str, float]:
        """Seconds of one inference by part: `gather`, `dense` (matrix products) and `other`, beside `instances` - 1 others.

        On a CPU each instance has a core; any other device is one core. Raises NarrowsError for more instances than cores.
        """
        cores = machine.units if machine.kind == "cpu" else 1
        if not 1 <= instances <= cores:
            raise NarrowsError(f"{instances} instances on {cores} cores.", where=machine.name, remedy=f"Give 1 to {cores}.")
        found = {"gather": 0.0, "dense": 0.0, "other": 0.0}
        slow, fast = _bandwidths(graph, machine, instances, cores)
        for op in graph:
            work = cost(op, step, graph.eager)
            arithmetic = float(work.flop) / peak(op, machine)
            if not self.memory:
                found[_part(op)] += arithmetic
                continue
            arithmetic *= cores / float(useful(op, op.sized(step), _core(machine) if cores > 1 else machine))
            moved = float(work.weight_bytes) / (slow if op.kind == "embedding" else fast)
            found[_part(op)] += max(arithmetic, moved) + float(work.launches) * machine.launch_seconds
        return found

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Parts of one inference at the step, and the best batch and number of instances within the bound.

        gather_share and dense_share of `seconds`; items_per_second (items are the step's sequences) at best_batch and
        best_instances with their latency_seconds, and gain over one item at a time; a row for each batch with its best
        number of instances. A graph that was traced has the batch it was traced at. Raises NarrowsError where one item
        takes longer than the bound.
        """
        parts = self.seconds(graph, machine, step)
        whole = math.fsum(parts.values())
        if not whole:
            raise NarrowsError("it does no work.", where=graph.name, remedy="Give a graph with ops.")
        own = int(step["sequences"])
        cores = machine.units if machine.kind == "cpu" and self.pack else 1
        batches = sorted({1, own, *BATCHES} if self.pack else {1}) if graph.fields else [own]
        rows: list[Mapping[str, Any]] = []
        for batch in batches:
            tried = [(count, self._latency(graph, machine, step, batch, count)) for count in range(1, cores + 1)]
            fitting = [(batch * count / took, count, took) for count, took in tried if took <= self.bound_seconds]
            if fitting:
                rate, count, took = max(fitting)
                rows.append({"batch": batch, "instances": count, "items_per_second": rate, "latency_seconds": took})
        if not rows:
            raise NarrowsError(f"{batches[0]} items take {self._latency(graph, machine, step, batches[0], 1):.3g} s.",
                               where=f"{graph.name} on {machine.name}", remedy="Give a larger bound_seconds.")  # fmt: skip
        best = max(rows, key=lambda row: float(row["items_per_second"]))
        single = batches[0] / self._latency(graph, machine, step, batches[0], 1)
        values = {"seconds": whole, "gather_share": parts["gather"] / whole, "dense_share": parts["dense"] / whole,
                  "best_batch": float(best["batch"]), "best_instances": float(best["instances"]),
                  "items_per_second": float(best["items_per_second"]), "latency_seconds": float(best["latency_seconds"]),
                  "gain": float(best["items_per_second"]) / single}  # fmt: skip
        return Reading(values, {"seconds": "s", "latency_seconds": "s", "items_per_second": "1/s", "gain": "x"}, tuple(rows))

    def _latency(self, graph: Graph, machine: Machine, step: Step, batch: int, instances: int) -> float:
        size = Step(batch, step.new, step.past, step.source, step.phase)
        return math.fsum(self.seconds(graph, machine, size, instances).values())

    def profile(
        self, model: "torch.nn.Module", inputs: tuple[Any, ...], runs: int = 7, clock: Callable[[], float] = perf_counter
    ) -> Reading:
        """Time a real model's inference by the same parts: gather_share and dense_share of `seconds` (medians of the runs)."""
        import torch

        gathers, products = (torch.nn.Embedding, torch.nn.EmbeddingBag), (torch.nn.Linear, torch.nn.Conv2d)
        kinds: dict[str, tuple[type[torch.nn.Module], ...]] = {"gather": gathers if self.memory else (), "dense": products}
        spent, started = dict.fromkeys(kinds, 0.0), [0.0]

        def enter(*_: Any) -> None:
            started[0] = clock()

        def leave(part: str) -> Callable[..., None]:
            def stop(*_: Any) -> None:
                spent[part] += clock() - started[0]

            return stop

        hooks = []
        for part, classes in kinds.items():
            for module in (m for m in model.modules() if isinstance(m, classes)):
                hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave(part))]
        found: list[dict[str, float]] = []
        try:
            with torch.inference_mode():
                model(*inputs)
                for _ in range(runs):
                    spent.update(dict.fromkeys(kinds, 0.0))
                    start = clock()
                    model(*inputs)
                    found.append({"seconds": clock() - start, **spent})
        finally:
            for hook in hooks:
                hook.remove()
        shares = {f"{part}_share": median(run[part] / run["seconds"] for run in found) for part in kinds}
        return Reading({"seconds": median(run["seconds"] for run in found), **shares}, {"seconds": "s"})


def _part(op: Op) -> str:
    return "gather" if op.kind == "embedding" else "dense" if op.spec.matmul else "other"


def _bandwidths(graph: Graph, machine: Machine, instances: int, cores: int) -> tuple[float, float]:
    """Bytes per second at which one of so many instances gathers from memory, and reads its other weights."""
    memory = machine.memory.bandwidth_bytes_per_s / instances
    slow = min(memory, GATHER_BYTES_PER_SECOND) if cores > 1 else memory
    weights = sum(op.stored_bytes * op.repeat for op in graph if op.kind != "embedding")
    held = len(machine.memories) > 1 and weights <= machine.memories[1].capacity_bytes / instances
    return slow, machine.memories[1].bandwidth_bytes_per_s / cores if held else slow


@cache
def _core(machine: Machine) -> Machine:
    return replace(machine, units=1)
