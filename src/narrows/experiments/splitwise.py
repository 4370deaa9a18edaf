"""What Splitwise claims, in the serving simulator: BLOOM-176B on clusters of DGX, with its limits relative to an idle A100."""

import math
from dataclasses import replace
from functools import cache
from statistics import mean

from narrows.capture import capture
from narrows.experiments.serving import load
from narrows.machine import machine
from narrows.simulate.demand import Demand, Deployment, Objective
from narrows.simulate.fleet import Group, rules
from narrows.techniques.serving.splitwise import Splitwise

# Mean and coefficient of variation of the tokens in the public Azure traces of 2023: prompts, then answers.
CONVERSATION = (1155.0, 0.96), (211.0, 0.77)
CODE = (2048.0, 0.96), (28.0, 2.15)
SEEDS = range(1, 6)  # of loads: where 99 % must keep a limit, one load more or less decides
PRICES = 38 / 17.6  # of a DGX-H100 over that of a DGX-A100: the paper's table 1
# Table 6: how many times slower than alone on an idle DGX-A100, for half, 90 and 99 % of them.
SLOWER = {"ttft": (2.0, 3.0, 6.0), "tbt": (1.25, 1.5, 5.0), "e2e": (1.25, 1.5, 5.0)}


@cache
def demand(kind: str, replicas: int, seed: int = 1) -> Demand:
    """Conversations on so many machines of a kind that do both, prompts whole beside decoding."""
    engine = rules("vllm-v0", mixed=True)
    group = Group(capture("bloom-176b"), machine(kind), engine, devices=8, replicas=replicas)
    requests = load(*CONVERSATION, longest=32768, count=1000, seed=seed)
    alone = Deployment(replace(group, machine=machine("a100-80gb"), replicas=1))
    idle = Demand(alone.group, requests).play(alone, 0.005)
    return Demand(group, requests, tuple(
        Objective(measure, share, times * getattr(idle, measure).quantile(share))
        for measure, slower in SLOWER.items() for share, times in zip((0.5, 0.9, 0.99), slower, strict=True)
    ))  # fmt: skip


def same_power(technique: Splitwise) -> float:
    """Load within the limits over that of the same A100 machines doing both; 14 of them draw what 8 DGX-H100 do."""
    return mean(_gain(technique, demand("a100-80gb", 14, seed)) for seed in SEEDS)


def same_cost(technique: Splitwise) -> float:
    """Load within the limits over that of 8 DGX-H100 doing both, for two pools of A100 machines at their price."""
    price = PRICES * (machine("a100-80gb").price_per_hour or math.nan)
    ours = replace(technique, reader="a100-80gb", writer="a100-80gb", budget="cost")

    def priced(wanted: Demand) -> Demand:
        return replace(wanted, group=replace(wanted.group, machine=replace(wanted.group.machine, price_per_hour=price)))

    return mean(_gain(ours, priced(demand("h100-sxm", 8, seed))) for seed in SEEDS)


def _gain(technique: Splitwise, wanted: Demand) -> float:
    return wanted.capacity(technique.deploy(wanted)) / wanted.capacity(Deployment(wanted.group))


def second_token(technique: Splitwise) -> float:
    """Time that keys and values are on their way, after the prompt, over the time between two tokens."""
    wanted = replace(demand("a100-80gb", 2), requests=load(*CODE, longest=32768, count=300), objectives=())
    found = technique.deploy(wanted)
    if not found.prefill:
        return math.nan
    seen = wanted.play(found, 0.005)
    return seen.ledger()["transfer"] * seen.requests / seen.tpot.count / seen.tbt.quantile(0.5)
