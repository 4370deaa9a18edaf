"""What SWARM claims, simulated: peers that come and go, peers unlike each other, and one layer of GPT-3 over 500 Mb/s."""

from dataclasses import replace
from functools import cache

from narrows.machine import machine
from narrows.measured.published import Shape, decoder
from narrows.step import Step
from narrows.techniques.training_parallelism.swarm_parallelism import STATE_BYTES, Swarm, load_of

_SECONDS, _SEEDS = 32 * 3600.0, 3
_STAGE = 3 * 12 * 4096**2  # parameters: three layers 4,096 wide, as the paper's stages


@cache
def _of_best(technique: Swarm) -> float:
    loading = _STAGE * STATE_BYTES / technique.bandwidth_bytes_per_s
    return sum(technique.of_best(_SECONDS, loading, seed) for seed in range(_SEEDS)) / _SEEDS


def of_optimal(technique: Swarm) -> float:
    """Throughput among preemptions over that of the best assignment at every moment."""
    return _of_best(technique)


def over_no_moves(technique: Swarm) -> float:
    """The same over that of a swarm in which no peer moves."""
    return _of_best(technique) / _of_best(Swarm(rebalance_seconds=0.0))


def over_fixed(technique: Swarm) -> float:
    """The same over that of fixed pipelines."""
    return _of_best(technique) / _of_best(technique.baseline())


def over_even_wiring(technique: Swarm) -> float:
    """Microbatches per second of peers of two speeds, over each peer in turn."""
    speeds, many = [[1.0, 0.5] * 4] * 8, 512
    close = replace(technique, round_trip_seconds=0.0)
    return close.microbatches_per_second(speeds, many) / replace(close, wired=False).microbatches_per_second(speeds, many)


def utilization(technique: Swarm) -> float:
    """Share of its time that a T4 computes which has a layer of GPT-3's width."""
    load = load_of(decoder(Shape(12288, 1, 96), 512), machine("t4"), Step.train(1, 512), 1)
    return replace(technique, bandwidth_bytes_per_s=62.5e6, round_trip_seconds=0.1).utilization(load)
