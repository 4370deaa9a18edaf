"""What CubicML claims, on narrows' training simulator: every setting of three jobs is simulated to know the best one."""

import math
from collections.abc import Mapping
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from narrows.capture.config import from_config
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.layout import Layout
from narrows.machine import cluster
from narrows.simulate.memory import peak_bytes
from narrows.simulate.network import Axes, network
from narrows.simulate.training import step_seconds
from narrows.technique import Trial
from narrows.techniques.profiling_cost_models.cubicml import CubicML

_SEQUENCE, _SHARE = 2048, 0.05
_SEEDS = range(10, 17)  # others than those that the defaults were chosen with
_SELENE = cluster("selene")
# width, layers and heads of a GPT; devices; sequences of a global batch
JOBS = ((4096, 32, 32, 64, 512), (8192, 48, 64, 256, 1024), (12288, 96, 96, 512, 1536))
_CHOICES: dict[str, tuple[Any, ...]] = {
    "tensor": (1, 2, 4, 8, 16),
    "pipeline": (1, 2, 4, 8, 16, 32),
    "microbatch": (1, 2, 4, 8, 16),
    "chunks": (1, 2, 4),
    "recompute": ("none", "selective", "full"),
    "shard": (0, 1, 3),
    "sequence": (False, True),
}


@cache
def _graph(job: int) -> Graph:
    width, layers, heads, _, _ = JOBS[job]
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "vocab_size": 51200, "n_positions": _SEQUENCE}
    return from_config({"model_type": "gpt2", "torch_dtype": "float16", "tie_word_embeddings": True, **sizes}, f"gpt {width}")


@cache
def _candidates(job: int) -> tuple[Mapping[str, Any], ...]:
    every = (dict(zip(_CHOICES, values, strict=True)) for values in product(*_CHOICES.values()))
    return tuple(one for one in every if _layout(job, one))


def _layout(job: int, one: Mapping[str, Any]) -> Layout | None:
    """The layout of a candidate over all devices of a job, if it is a legal one."""
    _, _, _, devices, batch = JOBS[job]
    data = devices // (one["tensor"] * one["pipeline"])
    try:
        found = Layout(data=data, accumulate=batch // (max(data, 1) * one["microbatch"]), **one)
        found.require(_graph(job), devices=devices, batch=batch, sequence=_SEQUENCE)
    except NarrowsError:
        return None
    return found


@cache
def _seconds(job: int) -> dict[tuple[Any, ...], float]:
    return {tuple(one.values()): _simulate(job, one) for one in _candidates(job)}


def _simulate(job: int, one: Mapping[str, Any]) -> float:
    """Seconds of a step; infinite where the memory of a device does not suffice."""
    graph, layout = _graph(job), _layout(job, one)
    assert layout, "candidates are legal"
    net = network(graph, _SELENE, layout, _SEQUENCE)
    if peak_bytes(net, layout, Axes.of(layout)) > _SELENE.machine.memory.capacity_bytes:
        return math.inf
    return sum(step_seconds(graph, _SELENE, layout, _SEQUENCE).values())


@cache
def _run(technique: CubicML, job: int, seed: int) -> tuple[Trial, ...]:
    known = _seconds(job)
    return technique.search(_candidates(job), lambda one: known[tuple(one.values())], budget(job), seed)


def budget(job: int) -> int:
    """How many settings of a job are tried."""
    return math.floor(_SHARE * len(_candidates(job)))


def _found(technique: CubicML, job: int, seed: int) -> float:
    """The best that was found, over the best there is, less one."""
    return min(t.score for t in _run(technique, job, seed)) / min(_seconds(job).values()) - 1


def _gaps(technique: CubicML) -> Any:
    return np.array([_found(technique, job, seed) for job in range(len(JOBS)) for seed in _SEEDS])


def gap_to_exhaustive(technique: CubicML) -> float:
    """How much slower the setting found is than the best of all, in the mean."""
    return float(_gaps(technique).mean())


def worst_gap(technique: CubicML) -> float:
    """The same, in the worst run."""
    return float(_gaps(technique).max())


def beats_random(technique: CubicML) -> float:
    """Share of the runs that found something faster than as many random trials with the same seed did."""
    return float(np.mean(_gaps(technique) < _gaps(technique.baseline())))


def rank_correlation(technique: CubicML) -> float:
    """Spearman's correlation of what the regression expects after random trials and what the simulator gives for the rest."""
    found = []
    for job in range(len(JOBS)):
        seconds, tried = _seconds(job), _run(technique.baseline(), job, 0)
        seen = {tuple(t.candidate.values()) for t in tried}
        rest = [one for one in _candidates(job) if (key := tuple(one.values())) not in seen and math.isfinite(seconds[key])]
        expected = technique.predict(tried, rest)
        if np.ptp(expected) == 0:
            return 0.0
        actual = [seconds[tuple(one.values())] for one in rest]
        found.append(np.corrcoef(np.argsort(np.argsort(expected)), np.argsort(np.argsort(actual)))[0, 1])
    return float(np.mean(found))
