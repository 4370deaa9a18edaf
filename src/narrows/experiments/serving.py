"""Loads and comparisons that the experiments on serving share; everything is played by the serving simulator."""

import math

from narrows.simulate.demand import Demand
from narrows.simulate.requests import Request
from narrows.simulate.workload import Lengths, generate
from narrows.technique import Serves

COUNT = 1000  # requests of a load


def through(median: float, ninety: float) -> tuple[float, float]:
    """Mean and coefficient of variation of the log-normal lengths with a median and a 90th percentile."""
    spread = math.log(ninety / median) / 1.2816  # the 90th percentile of the normal distribution
    return median * math.exp(spread**2 / 2), math.sqrt(math.exp(spread**2) - 1)


def load(prompt: tuple[float, float], output: tuple[float, float], longest: int, count: int = COUNT,
         seed: int = 1) -> tuple[Request, ...]:  # fmt: skip
    """Poisson arrivals with lengths of a (mean, spread), without requests longer than a model's context."""
    lengths = Lengths(prompt[0], output[0], prompt[1], output[1])
    return tuple(r for r in generate(1.0, count, lengths, seed) if r.prompt + r.output <= longest)


def capacity_gain(technique: Serves, demand: Demand) -> float:
    """How many times the load of its baseline a policy serves per device, within the demand's limits."""
    ours, theirs = (one.deploy(demand) for one in (technique, technique.baseline()))
    return demand.capacity(ours) / ours.devices / (demand.capacity(theirs) / theirs.devices)
