"""What Facebook's study of recommenders claims: its three open models on this core, and on three servers by the model of one."""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from time import thread_time

import torch

from narrows.calibrate import cpu_seconds
from narrows.capture.generalize import generalize
from narrows.capture.torch import from_module
from narrows.experiments.steady import one_thread
from narrows.graph import Graph
from narrows.machine import Machine, machine
from narrows.step import Step
from narrows.techniques.gnn_recsys_retrieval.facebook_dnn_recommendation_workloads import RecommenderServing

SERVERS = ("xeon-haswell", "xeon-broadwell", "xeon-skylake")
_BATCH = 64
_BATCHES = (1, 4, 16, 64, 256)
_SHRINK = 8  # fewer rows than the open models, so that tables fit small machines: still far more than a core's caches hold


@dataclass(frozen=True)
class Shape:
    """Widths of the layers before and after the interaction; tables, rows and width of each, rows looked up for an item."""

    bottom: tuple[int, ...]
    top: tuple[int, ...]
    tables: int
    rows: int
    width: int
    lookups: int


# as the paper's authors published them (DeepRecSys, models/configs/dlrm_rm*.json)
SHAPES = {
    "RMC1": Shape((128, 64, 32), (256, 64, 1), 8, 4_000_000, 32, 80),
    "RMC2": Shape((256, 128, 64), (128, 64, 1), 32, 500_000, 64, 120),
    "RMC3": Shape((2560, 1024, 256, 32), (512, 256, 1), 10, 2_000_000, 32, 20),
}


class Recommender(torch.nn.Module):  # type: ignore[misc]
    """Dense features through layers, beside sums of rows of tables; all of it concatenated through more layers."""

    def __init__(self, shape: Shape, rows: int) -> None:
        super().__init__()
        self.bottom = _layers(shape.bottom)
        self.tables = torch.nn.ModuleList(torch.nn.EmbeddingBag(rows, shape.width, mode="sum") for _ in range(shape.tables))
        self.top = _layers((shape.bottom[-1] + shape.tables * shape.width, *shape.top))

    def forward(self, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        """dense [batch, features], sparse [tables, batch, lookups] -> [batch, 1]."""
        found = [self.bottom(dense), *(table(rows) for table, rows in zip(self.tables, sparse, strict=True))]
        return self.top(torch.cat(found, 1))


def _layers(widths: tuple[int, ...]) -> torch.nn.Sequential:
    return torch.nn.Sequential(*(part for a, b in pairwise(widths) for part in (torch.nn.Linear(a, b), torch.nn.ReLU())))


def _inputs(shape: Shape, batch: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(batch)
    sparse = torch.randint(rows, (shape.tables, batch, shape.lookups), generator=random)
    return torch.randn(batch, shape.bottom[0], generator=random), sparse


@cache
def graph(name: str, shrink: int = 1) -> Graph:
    """A model's graph for every batch, captured without its weights."""
    shape = SHAPES[name]
    rows = shape.rows // shrink
    with torch.device("meta"):
        model = Recommender(shape, rows).eval()

    def build(step: Step) -> Graph:
        return from_module(model, step, _inputs(shape, int(step["sequences"]), rows), name)

    return generalize(build, [Step.forward(3), Step.forward(7), Step.forward(11)])


@cache
@one_thread()
def _profiled(technique: RecommenderServing, name: str) -> dict[int, dict[str, float]]:
    """What a real model takes at each batch, in processor time."""
    shape = SHAPES[name]
    rows = shape.rows // _SHRINK
    with torch.device("meta"):
        model = Recommender(shape, rows).eval()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1e-3)  # pages that were never written are all one page: reading them would be too fast
    return {batch: dict(technique.profile(model, _inputs(shape, batch, rows), clock=thread_time).values) for batch in _BATCHES}


@cache
@one_thread()
def _this_core() -> Machine:
    """A server of cores that multiply as fast as this one; its memory is a Skylake's."""
    like, left, right = machine("xeon-skylake"), torch.ones(512, 1024), torch.ones(1024, 1024)
    rate = 2 * left.numel() * 1024 / min(cpu_seconds(lambda: left @ right, rounds=3))
    return like.scaled(compute=rate * like.units / like.peak("fp32"))


def bottleneck_flip(technique: RecommenderServing) -> float:
    """The least share of the part that should bound each model."""
    shares = {name: _profiled(technique, name)[_BATCH] for name in SHAPES}
    return min(shares["RMC1"]["gather_share"], shares["RMC2"]["gather_share"], shares["RMC3"]["dense_share"])


def share_error(technique: RecommenderServing) -> float:
    """How far the predicted share of gathers is from the measured one, the furthest of the three."""

    def error(name: str) -> float:
        predicted = technique.measure(graph(name, _SHRINK), _this_core(), Step.forward(_BATCH)).values["gather_share"]
        return abs(predicted - _profiled(RecommenderServing(), name)[_BATCH]["gather_share"])

    return max(error(name) for name in SHAPES)


def batching_gain(technique: RecommenderServing) -> float:
    """Measured items per second at the best batch within the bound over those at batch 1, the least of the three."""

    def gain(name: str) -> float:
        took = {batch: found["seconds"] for batch, found in _profiled(technique, name).items()}
        allowed = [batch for batch in took if batch == 1 or (technique.pack and took[batch] <= technique.bound_seconds)]
        return max(batch / took[batch] for batch in allowed) * took[1]

    return min(gain(name) for name in SHAPES)


def colocation_gain(technique: RecommenderServing) -> float:
    """Items per second of the best number of instances within the bound over those of one, the least of the three."""
    there, step = machine("xeon-broadwell"), Step.forward(16)

    def latency(name: str, instances: int) -> float:
        return sum(technique.seconds(graph(name), there, step, instances).values())

    def gain(name: str) -> float:
        counts = range(1, there.units + 1 if technique.pack else 2)
        return max(n * latency(name, 1) / latency(name, n) for n in counts if latency(name, n) <= technique.bound_seconds)

    return min(gain(name) for name in SHAPES)


def _on_servers(technique: RecommenderServing, name: str, batch: int) -> list[float]:
    return [sum(technique.seconds(graph(name), machine(server), Step.forward(batch)).values()) for server in SERVERS]


def generation_spread(technique: RecommenderServing) -> float:
    """The slowest server's latency over the fastest's, where they are furthest apart."""
    found = [_on_servers(technique, name, batch) for name in SHAPES for batch in _BATCHES]
    return max(max(times) / min(times) for times in found)


def order_flip(technique: RecommenderServing) -> float:
    """How far Broadwell leads at batch 1, and Skylake at 64: the smaller of the two."""
    _, small_old, small_new = _on_servers(technique, "RMC3", 1)
    _, large_old, large_new = _on_servers(technique, "RMC3", 64)
    return min(small_new / small_old, large_old / large_new)
