"""What DistServe claims, in the serving simulator: OPT models on A100 with the paper's lengths and limits."""

import math
from dataclasses import replace

from narrows.capture import capture
from narrows.experiments.serving import load
from narrows.machine import machine
from narrows.simulate.demand import Demand, Deployment, Objective
from narrows.simulate.fleet import Group, rules
from narrows.simulate.requests import Request
from narrows.techniques.serving.distserve import DistServe


def demand(model: str, devices: int, width: int, requests: tuple[Request, ...], ttft: float, tpot: float) -> Demand:
    """So many A100 in replicas of `width`, whole prompts first as vLLM had it, 90 % of requests within both limits."""
    group = Group(capture(model), machine("a100-80gb"), rules("vllm-v0"), width, devices // width)
    return Demand(group, requests, (Objective("ttft", 0.9, ttft), Objective("tpot", 0.9, tpot)))


def synthetic() -> Demand:
    """Figure 1: every prompt 512 tokens, every answer 64."""
    return demand("opt-13b", 3, 1, load((512, 0), (64, 0), 2048), 0.4, 0.04)


def goodput(technique: DistServe) -> float:
    """Requests per second and device within both limits, over those of one device doing both."""
    wanted = synthetic()
    found, alone = technique.deploy(wanted), Deployment(replace(wanted.group, replicas=1))
    return wanted.capacity(found) / found.devices / wanted.capacity(alone)


def readers_per_writer(technique: DistServe) -> float:
    """Replicas that read for one that decodes; 0 where they are not apart."""
    found = technique.deploy(synthetic())
    return found.prefill.replicas / found.group.replicas if found.prefill else 0.0


def transfer(technique: DistServe) -> float:
    """The share of the latency of all requests in which keys and values travel."""
    wanted = synthetic()
    found = technique.deploy(wanted)
    if not found.prefill:
        return math.nan
    ledger = wanted.play(found, 0.9 * wanted.capacity(found)).ledger()
    return ledger["transfer"] / sum(ledger.values())
