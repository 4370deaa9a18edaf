"""What vTrain claims, on published runs of Megatron-LM and on the plan that MT-NLG was trained with.

Constants of the cost model were fitted on a part of these runs (data/fitted_rows.txt says which), none on the others.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from narrows.graph import Graph
from narrows.layout import Layout
from narrows.machine import cluster
from narrows.measured.published import Shape, decoder
from narrows.techniques.profiling_cost_models.vtrain import VTrain

_SEQUENCE = 2048
_SELENE = cluster("selene")
_SIZES = {  # width, layers, heads
    "1.7B": (2304, 24, 24), "3.6B": (3072, 30, 32), "7.5B": (4096, 36, 32), "18B": (6144, 40, 48), "22B": (6144, 48, 64),
    "39B": (8192, 48, 64), "76B": (10240, 60, 80), "145B": (12288, 80, 96), "175B": (12288, 96, 96),
    "310B": (16384, 96, 128), "530B": (20480, 105, 128), "1T": (25600, 128, 160),
}  # fmt: skip
# model; tensor, pipeline, chunks, data; microbatch, global batch; TFLOP/s of a device with what it computes again.
# Narayanan et al., SC 2021 (arXiv 2104.04473), table 1 and, from the eleventh on, the PTD rows of table 2.
_RATES = (
    ("1.7B", 1, 1, 1, 32, 16, 512, 137), ("3.6B", 2, 1, 1, 32, 16, 512, 138), ("7.5B", 4, 1, 1, 32, 16, 512, 142),
    ("18B", 8, 1, 1, 32, 8, 1024, 135), ("39B", 8, 2, 1, 32, 4, 1536, 138), ("76B", 8, 4, 3, 32, 2, 1792, 140),
    ("145B", 8, 8, 2, 24, 2, 2304, 148), ("310B", 8, 16, 2, 15, 1, 2160, 155), ("530B", 8, 35, 3, 9, 1, 2520, 163),
    ("1T", 8, 64, 1, 6, 1, 3072, 163), ("175B", 8, 12, 1, 4, 1, 1536, 153), ("175B", 8, 12, 1, 8, 1, 1536, 149),
    ("175B", 8, 12, 1, 16, 1, 1536, 141), ("530B", 8, 35, 1, 2, 1, 2240, 171), ("530B", 8, 35, 1, 4, 1, 2240, 167),
    ("530B", 8, 35, 1, 8, 1, 2240, 159),
)  # fmt: skip
# model; tensor, pipeline, chunks, data; microbatch, global batch; recomputation; seconds of a step.
# Korthikanti et al. (arXiv 2205.05198), table 5, and section 6.3 for the last; selective comes with sequence parallelism.
_SECONDS = (
    ("22B", 8, 1, 1, 1, 4, 4, "full", 1.42), ("22B", 8, 1, 1, 1, 4, 4, "selective", 1.10),
    ("175B", 8, 8, 3, 1, 1, 64, "full", 18.13), ("175B", 8, 8, 3, 1, 1, 64, "selective", 13.75),
    ("530B", 8, 35, 3, 1, 1, 280, "full", 49.05), ("530B", 8, 35, 3, 1, 1, 280, "selective", 37.83),
    ("1T", 8, 64, 1, 1, 1, 512, "full", 94.42), ("1T", 8, 64, 1, 1, 1, 512, "selective", 71.49),
    ("530B", 8, 35, 3, 8, 1, 2240, "selective", 39.15),
)  # fmt: skip


@cache
def _graph(model: str) -> Graph:
    return decoder(Shape(*_SIZES[model], fused=False), _SEQUENCE)


def _layout(tensor: int, pipeline: int, chunks: int, data: int, micro: int, batch: int, recompute: str) -> Layout:
    return Layout(tensor, recompute == "selective", data=data, pipeline=pipeline, chunks=chunks, microbatch=micro,
                  accumulate=batch // data // micro, recompute=recompute, overlap=False)  # fmt: skip


def _flop(model: str, batch: int) -> float:
    """FLOP of a step without what is computed again (SC 2021, equation 3)."""
    width, deep, _ = _SIZES[model]
    return 72 * batch * _SEQUENCE * deep * width**2 * (1 + _SEQUENCE / (6 * width) + 51200 / (12 * deep * width))


@cache
def rows() -> tuple[tuple[str, Layout, float], ...]:
    """Published runs: model, layout and seconds of a step."""
    found = []
    for model, tensor, pipeline, chunks, data, micro, batch, rate in _RATES:
        layout = _layout(tensor, pipeline, chunks, data, micro, batch, "full")
        found.append((model, layout, 4 / 3 * _flop(model, layout.batch) / (rate * 1e12 * layout.devices)))
    for model, tensor, pipeline, chunks, data, micro, batch, recompute, seconds in _SECONDS:
        found.append((model, _layout(tensor, pipeline, chunks, data, micro, batch, recompute), seconds))
    return tuple(found)


@cache
def _predicted(technique: VTrain) -> tuple[float, ...]:
    return tuple(technique.seconds(_graph(model), _SELENE, layout, _SEQUENCE) for model, layout, _ in rows())


def iteration_error(technique: VTrain) -> float:
    """Mean absolute error of the step, over its published time."""
    return float(np.mean([abs(p / seconds - 1) for p, (_, _, seconds) in zip(_predicted(technique), rows(), strict=True)]))


def plan_rank_correlation(technique: VTrain) -> float:
    """Spearman's correlation of predicted and published FLOP/s of a device, less what is computed again."""
    work = [_flop(model, layout.batch) / layout.devices for model, layout, _ in rows()]
    ours, theirs = (np.divide(work, seconds) for seconds in (_predicted(technique), [seconds for _, _, seconds in rows()]))
    return float(np.corrcoef(_ranks(ours), _ranks(theirs))[0, 1])


def _ranks(values: Any) -> Any:
    return np.argsort(np.argsort(values))


def saving(technique: VTrain) -> float:
    """How much less a plan costs than MT-NLG's own for the same tokens: what the technique chooses, as played."""
    graph, own = _graph("530B"), Layout(8, True, data=8, pipeline=35, accumulate=240, recompute="full")
    chooser = replace(technique, devices=own.devices)
    plans = chooser.plans(graph, _SELENE, own.batch, _SEQUENCE, ("full",))
    chosen = list(chooser.cheapest(graph, _SELENE, plans, own, _SEQUENCE))[-1]
    paid = [VTrain().seconds(graph, _SELENE, plan, _SEQUENCE) * plan.devices for plan in (chosen, own)]
    return 1 - paid[0] / paid[1]
