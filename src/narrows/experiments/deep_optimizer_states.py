"""What Deep Optimizer States claims: iterations simulated on four H100, and subgroups updated by two threads at once."""

import math
import threading
from functools import cache

from narrows.experiments.offloaded import network, train
from narrows.experiments.steady import one_thread
from narrows.machine import cluster
from narrows.measured.published import Shape, decoder
from narrows.simulate.offload import Offloaded
from narrows.techniques.training_memory_offload.deep_optimizer_states import DeepOptimizerStates

_SHAPE, _SEQUENCE, _STATIC = Shape(6144, 44, 64), 2048, 0.2
_GROUP = cluster("dgx-h100")


@cache
def _model(technique: DeepOptimizerStates) -> Offloaded:
    return technique.model(decoder(_SHAPE, _SEQUENCE), _GROUP, 1, _SEQUENCE)


def iteration_speedup(technique: DeepOptimizerStates) -> float:
    """An iteration whose states the processor updates, over the technique's."""
    model = _model(technique)
    return technique.baseline().best(model, _GROUP.machine)[1].seconds / technique.best(model, _GROUP.machine)[1].seconds


def over_static(technique: DeepOptimizerStates) -> float:
    """An iteration with a share that stays on the device, over the technique's."""
    model = _model(technique)
    still = technique.baseline().iteration(model, _GROUP.machine, _STATIC, static=True)
    return still.seconds / technique.best(model, _GROUP.machine)[1].seconds


def balance(technique: DeepOptimizerStates) -> float:
    """The less busy of processor and link (the busier way of it) during the update, as a share of the update."""
    timeline = technique.best(_model(technique), _GROUP.machine)[1]
    begins = max(span.end for span in timeline.spans if span.kind in ("backward", "gradients out"))
    busy = {
        on: sum(s.end - s.start for s in timeline.spans if s.resource == on and s.start >= begins)
        for on in ("processor", "in", "out")
    }
    return min(busy["processor"], max(busy["in"], busy["out"])) / (timeline.seconds - begins)


@one_thread()
def updated_beside(technique: DeepOptimizerStates) -> float:
    """Share of the parameters that a second thread updates; not a number unless all weights are those of Adam."""
    import torch

    plain, other = network(), network()
    train(plain, torch.optim.Adam(plain.parameters(), 1e-2).step)
    halves = (
        [list(other.parameters())[::2], list(other.parameters())[1::2]] if technique.interleaved else [list(other.parameters())]
    )
    own = [torch.optim.Adam(half, 1e-2) for half in halves]

    def beside() -> None:
        workers = [threading.Thread(target=optimizer.step) for optimizer in own]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    train(other, beside)
    if not all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True)):
        return math.nan
    sizes = [sum(p.numel() for p in half) for half in halves]
    return float(sum(sizes[1:]) / sum(sizes))
