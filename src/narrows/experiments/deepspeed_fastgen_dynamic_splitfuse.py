"""What Dynamic SplitFuse claims, in the serving simulator on the setting of its figures: Llama-2-70B on four A100."""

from dataclasses import replace

from narrows.capture import capture
from narrows.experiments.serving import capacity_gain, load
from narrows.machine import machine
from narrows.simulate.demand import Demand, Objective
from narrows.simulate.fleet import Group, clients, rules
from narrows.techniques.serving.deepspeed_fastgen_dynamic_splitfuse import LARGEST, DynamicSplitFuse

PROMPT, SPREAD = 2600, 0.3  # tokens, and their coefficient of variation


def demand(output: int) -> Demand:
    """Long prompts and short answers, with the limits of figure 4."""
    engine = replace(rules("vllm-v1"), prefix_cache=False)
    group = Group(capture("llama-2-70b"), machine("a100-80gb"), engine, devices=4)
    requests = load((PROMPT, SPREAD), (output, SPREAD), 8192, 512)
    return Demand(group, requests, (Objective("ttft", 0.9, PROMPT / 512), Objective("tbt", 0.99, 1 / 4)))


def token_tail(technique: DynamicSplitFuse) -> float:
    """95th percentile of the time between tokens for 16 clients, of the baseline over the technique's."""
    wanted = demand(128)
    whole, ours = (
        clients(wanted.requests, one.deploy(wanted).group, 16).tbt.quantile(0.95) for one in (technique.baseline(), technique)
    )
    return whole / ours


def effective_throughput(technique: DynamicSplitFuse) -> float:
    """Requests per second within both limits."""
    wanted = demand(60)
    return wanted.capacity(technique.deploy(wanted))


def effective_gain(technique: DynamicSplitFuse) -> float:
    """Requests per second within both limits, of the technique over the baseline's."""
    return capacity_gain(technique, demand(60))


def step_size(technique: DynamicSplitFuse) -> float:
    """Throughput of its step over that of a step of 8,192 tokens; 0 if its step is not an eighth of that or less."""
    group = technique.deploy(demand(60)).group
    times, tokens = replace(group, rules=replace(group.rules, max_tokens=LARGEST)).times(), group.rules.max_tokens
    return tokens / times.rows(tokens) * times.rows(LARGEST) / LARGEST if tokens * 8 <= LARGEST else 0.0
