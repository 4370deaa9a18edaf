"""What the model of a program's text predicts of networks that it has not seen, measured on this CPU."""

import math
import random
from collections.abc import Sequence
from functools import cache
from time import thread_time
from typing import TYPE_CHECKING

import numpy as np

from narrows.step import Step
from narrows.techniques.profiling_cost_models.ml_cost_model_for_mlir import MLIRCostModel, Program

if TYPE_CHECKING:
    import torch

    Network = tuple[torch.nn.Module, torch.Tensor]

_NETWORKS, _TRAINED, _ROUNDS = 480, 390, 5
_CHANNELS = (8, 16, 24, 32, 48, 64, 96)  # of convolutional networks as they are published


def latency_error(technique: MLIRCostModel) -> float:
    """Mean absolute error of the seconds, over the seconds."""
    return _error(technique, 1)


def memory_error(technique: MLIRCostModel) -> float:
    """Mean absolute error of the most bytes allocated, over these bytes."""
    return _error(technique, 2)


def gain_over_flop(technique: MLIRCostModel) -> float:
    """How many times smaller both errors are than those of a line through FLOP, the worse of the two."""
    return min(_error(technique.baseline(), what) / _error(technique, what) for what in (1, 2))


@cache
def _error(technique: MLIRCostModel, what: int) -> float:
    found = measured()
    programs, costs = [row[0] for row in found], np.array([float(row[what]) for row in found])  # type: ignore[arg-type]
    predicted = technique.fit(programs[:_TRAINED], costs[:_TRAINED].tolist())(programs[_TRAINED:])
    return float(np.mean(np.abs(predicted / costs[_TRAINED:] - 1)))


@cache
def measured(networks: int = _NETWORKS) -> tuple[tuple[Program, float, int], ...]:
    """Random networks as captured, with CPU seconds of a forward pass and the most bytes that it allocates."""
    import torch

    from narrows.capture.torch import from_module

    draw = random.Random(0)
    drawn = [(_multilayer, _convolutional, _attention)[i % 3](draw) for i in range(networks)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # and processor time: what other processes take of the machine stays out
    try:
        with torch.inference_mode():
            seconds, held = [_seconds(*one) for one in drawn], _bytes(drawn)
    finally:
        torch.set_num_threads(threads)
    steps = [Step.forward(len(inputs), 1) for _, inputs in drawn]
    graphs = [from_module(model, step, inputs) for (model, inputs), step in zip(drawn, steps, strict=True)]
    return tuple(zip(zip(graphs, steps, strict=True), seconds, held, strict=True))


def _size(draw: random.Random, low: int, high: int) -> int:
    """A whole number between, evenly in the logarithm."""
    return round(math.exp(draw.uniform(math.log(low), math.log(high))))


def _multilayer(draw: random.Random) -> "Network":
    import torch
    from torch import nn

    width = _size(draw, 16, 1024)
    inputs, layers = torch.randn(_size(draw, 1, 256), width), list[nn.Module]()
    for _ in range(draw.randint(1, 4)):
        out = _size(draw, 16, 1024)
        layers += [nn.Linear(width, out), draw.choice((nn.ReLU, nn.GELU, nn.Tanh))()]
        if draw.random() < 0.3:
            layers.append(nn.LayerNorm(out))
        width = out
    return nn.Sequential(*layers).eval(), inputs


def _convolutional(draw: random.Random) -> "Network":
    import torch
    from torch import nn

    channels, side = draw.choice(_CHANNELS), draw.choice((7, 14, 28, 56))
    inputs, layers = torch.randn(_size(draw, 1, 4), channels, side, side), list[nn.Module]()
    for _ in range(draw.randint(1, 3)):
        out, kernel = draw.choice(_CHANNELS), draw.choice((1, 3))
        stride = draw.choice((1, 1, 2)) if kernel > 1 else 1
        layers += [nn.Conv2d(channels, out, kernel, stride, kernel // 2), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers).eval(), inputs


def _attention(draw: random.Random) -> "Network":
    import torch
    from torch import nn

    heads = draw.choice((1, 2, 4, 8))
    width = heads * draw.choice((16, 32, 64))
    layer = nn.TransformerEncoderLayer(width, heads, _size(draw, 32, 1024), dropout=0.0, batch_first=True, norm_first=True)
    inputs = torch.randn(_size(draw, 1, 4), _size(draw, 8, 128), width)
    return nn.Sequential(*(layer for _ in range(draw.randint(1, 2)))).eval(), inputs


def _seconds(model: "torch.nn.Module", inputs: "torch.Tensor") -> float:
    """Processor seconds of a forward pass: the least of some rounds, each of at least 2 ms."""
    model(inputs)
    start = thread_time()
    model(inputs)
    times = max(1, round(2e-3 / max(thread_time() - start, 1e-6)))
    rounds = []
    for _ in range(_ROUNDS):
        start = thread_time()
        for _ in range(times):
            model(inputs)
        rounds.append((thread_time() - start) / times)
    return min(rounds)


def _bytes(networks: "Sequence[Network]") -> list[int]:
    """The most bytes that a forward pass of each holds beside weights and inputs, as torch's allocator reports them."""
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        for i, (model, inputs) in enumerate(networks):
            with record_function(f"network {i}"):
                model(inputs)
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = np.array([(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"])
    found = {}
    for event in events:
        if event.name().startswith("network "):
            during = (changes[:, 0] >= event.start_ns()) & (changes[:, 0] <= event.end_ns())
            found[int(event.name().split()[1])] = int(np.cumsum(changes[during, 1]).max())
    return [found[i] for i in range(len(networks))]
