"""What DeepFlow's fast scaling claims, in the serving simulator: Llama-3.1-8B on H100, a load that rises twentyfold at once."""

import math
import random
from dataclasses import replace
from functools import cache

from narrows.capture import capture
from narrows.experiments.serving import load, through
from narrows.machine import machine
from narrows.simulate.demand import Demand, Deployment
from narrows.simulate.fleet import Group, rules, serve
from narrows.simulate.outcome import Outcome
from narrows.simulate.requests import Request
from narrows.simulate.scaling import Replicas
from narrows.simulate.serving import Engine
from narrows.simulate.step_times import PS
from narrows.simulate.traffic import fewest
from narrows.simulate.workload import Lengths, generate, like
from narrows.techniques.serving.deepflow_serverless_llm import DeepFlow

QUIET, BURST, PERIOD, RISES = 1.0, 20.0, 300, 4  # requests a second; seconds from one burst to the next; bursts
ORDERS = 8
LIMIT = 2.0  # seconds to the first token


@cache
def bursts() -> tuple[Request, ...]:
    """Chats that arrive evenly but for the middle minute of every period, in which they arrive as a burst."""
    every = iter(load(through(1730, 5696), through(415, 834), 8192, 20_000))
    found, now = [], 0.0
    while now < PERIOD * RISES:
        found.append(replace(next(every), arrival=round(now * PS)))
        now += 1 / (BURST if PERIOD * 0.4 <= now % PERIOD < PERIOD * 0.6 else QUIET)
    return tuple(found)


@cache
def demand() -> Demand:
    return Demand(Group(capture("llama-3.1-8b"), machine("h100-sxm"), rules("vllm-v1"), replicas=8), bursts())


def played(technique: DeepFlow) -> Outcome:
    """What clients see of the bursts."""
    return demand().play(technique.deploy(demand()))


def to_64(technique: DeepFlow) -> float:
    """Seconds from the first of 1,000 requests a second, with one replica there, until all of 64 decode."""
    group = replace(demand().group, replicas=64)
    scaling = technique.deploy(replace(demand(), group=group)).group.scaling
    assert scaling
    served: set[int] = set()
    engines: list[Engine] = []

    def engine(ready: int) -> Engine:
        number = len(engines)
        engines.append(Engine(group.times(), group.rules, group.room(), lambda answer: None, lambda request, why: None,
                              lambda *run: served.add(number), ready=ready))  # fmt: skip
        return engines[-1]

    there = Replicas(scaling, 64, engine, lambda gone: None)
    for request in (Request(i * PS // 1000, 100, 2000) for i in range(100_000)):
        ready = there.at(request.arrival)
        if len(served) == 64:
            return request.arrival / PS
        ready[fewest(request, ready)].push(request)
    return math.inf


def tail(technique: DeepFlow) -> float:
    """The 99th percentile of the time to the first token with cold starts over it."""
    return played(technique.baseline()).ttft.quantile(0.99) / played(technique).ttft.quantile(0.99)


def by_phase(technique: DeepFlow) -> float:
    """Mean time to the last token with as many requests sent to each kind of replica at random, over it with the sooner kind."""
    engine = replace(rules("vllm-v1", max_tokens=2048), prefix_cache=False)
    group = Group(capture("qwen3-32b"), machine("a100-80gb"), engine, devices=4)
    code, chats = (like(name, 600, 5.0, seed) for name, seed in (("azure-2023-code", 1), ("azure-2023-conv", 2)))
    moments = generate(5.0, 600, Lengths(1, 1), seed=3)
    mixed = [replace((one, other)[i % 2], arrival=moment.arrival)
             for i, (one, other, moment) in enumerate(zip(code, chats, moments, strict=True))]  # fmt: skip

    def mean(apart: list[bool]) -> float:
        both = serve([r for r, alone in zip(mixed, apart, strict=True) if not alone], replace(group, replicas=2))
        pair = serve([r for r, alone in zip(mixed, apart, strict=True) if alone], group, group)
        return (both.e2e.total + pair.e2e.total) / len(mixed)

    chosen, others = [technique.apart(group, r) for r in mixed], []
    for order in range(ORDERS):
        others.append(chosen.copy())
        random.Random(order).shuffle(others[-1])
    return sum(map(mean, others)) / ORDERS / mean(chosen)


def saved(technique: DeepFlow) -> float:
    """Replica seconds less than of the fewest replicas, always there, that give 99 % of first tokens within LIMIT.

    Not a number where it breaks that limit itself.
    """
    seen = played(technique)
    for count in range(1, demand().group.replicas + 1):
        kept = demand().play(Deployment(replace(demand().group, replicas=count)))
        if kept.ttft.quantile(0.99) <= LIMIT:
            return 1 - seen.replica_seconds / kept.replica_seconds if seen.ttft.quantile(0.99) <= LIMIT else math.nan
    return math.nan
