"""What DistZO2 claims: steps of OPT-175B simulated on H100, and zeroth-order steps of a small model split over ranks."""

import math
from dataclasses import replace
from functools import cache

from narrows.capture import capture
from narrows.experiments.offloaded import STEPS, network
from narrows.experiments.pipelines import tokens
from narrows.experiments.steady import one_thread
from narrows.machine import cluster
from narrows.modules import zeroth_order
from narrows.simulate.offload import alone
from narrows.techniques.training_memory_offload.distzo2 import DistZO2

_EPSILON, _RATE = 1e-3, 1e-2


@cache
def _seconds(technique: DistZO2, batch: int) -> float:
    """A step on so many sequences of 2048 tokens."""
    group = cluster("dgx-h100") if technique.devices > 1 else alone(cluster("dgx-h100").machine)
    return technique.play(technique.model(capture("opt-175b"), group, batch // technique.pairs, 2048)).seconds


def speedup(technique: DistZO2) -> float:
    """A step of ZO2 on one device over the technique's, on the same two sequences."""
    return _seconds(technique.baseline(), 2) / _seconds(technique, 2)


def sliced(technique: DistZO2) -> float:
    """A step of the same devices that each bring whole blocks over the technique's."""
    return _seconds(replace(technique, slices=False), 2) / _seconds(technique, 2)


@one_thread()
def exchanged(technique: DistZO2) -> float:
    """Numbers that a rank sends in a step; not a number unless the weights of all ranks are those of one device."""
    import torch

    model = network()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    batches = [tokens()[part :: technique.pairs] for part in range(technique.pairs)]

    def loss(batch: torch.Tensor) -> float:
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()))

    def load(values: "list[torch.Tensor]") -> "list[torch.Tensor]":
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.data.copy_(value)
        return list(model.parameters())

    alone_, ranks, sent = weights, [list(weights) for _ in range(technique.devices)], 0
    for seed in range(STEPS):
        # one device takes both passes over all parts; a rank takes what is its own, and all add up what the ranks found
        both = [zeroth_order.losses(load(alone_), lambda b=b: loss(b), seed, _EPSILON, (1, -1)) for b in batches]  # type: ignore[misc]
        slope = sum(one - other for one, other in both) / (2 * _EPSILON * len(batches))
        shares = []
        for rank, held in enumerate(ranks):
            batch = batches[rank // 2 if technique.apart else rank]
            signs = ((1, -1)[rank % 2],) if technique.apart else (1, -1)
            found = zeroth_order.losses(load(held), lambda b=batch: loss(b), seed, _EPSILON, signs)  # type: ignore[misc]
            shares.append(sum(sign * value for sign, value in zip(signs, found, strict=True)))
        pairs = [sum(shares[i : i + len(shares) // len(batches)]) for i in range(0, len(shares), len(shares) // len(batches))]
        agreed = sum(pairs) / (2 * _EPSILON * len(batches))
        sent += technique.devices > 1
        for values, by in [(alone_, slope), *((held, agreed) for held in ranks)]:
            parameters = load(values)
            zeroth_order.step(parameters, by, seed, _RATE)
            values[:] = [parameter.detach().clone() for parameter in parameters]
    same = all(torch.equal(a, b) for held in ranks for a, b in zip(held, alone_, strict=True))
    moved = any(not torch.equal(a, b) for a, b in zip(alone_, network().parameters(), strict=True))
    return sent / STEPS if same and moved else math.nan
