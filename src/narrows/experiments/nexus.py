"""What Nexus claims, in the serving simulator: Llama-3.1-8B on one L20, chats and papers, against pieces beside decoding."""

import math
from dataclasses import replace
from functools import cache

from narrows.capture import capture
from narrows.experiments.sarathi_serve import CHATS, PAPERS
from narrows.experiments.serving import capacity_gain
from narrows.machine import Machine, machine
from narrows.simulate.demand import Demand, Objective
from narrows.simulate.fleet import Group, rules
from narrows.simulate.outcome import Outcome
from narrows.simulate.sharing import part, reach
from narrows.techniques.serving.nexus import Nexus

CHAT = 5, 3  # of so many requests, chats: the paper's mixed load is 60 % ShareGPT


def l20() -> Machine:
    """An L40S with an L20's units and arithmetic (NVIDIA's datasheet: 92 and 119.5 TFLOP/s in bf16): their memories are alike."""
    like = machine("l40s")
    return replace(like.scaled(compute=119.5e12 / like.peak("bf16")), units=92)


@cache
def demand() -> Demand:
    """1,000 requests, three chats to two papers; 10 s to the first token, 0.2 s a token after it."""
    group = Group(capture("llama-3.1-8b"), l20(), replace(rules("vllm-v1"), prefix_cache=False, max_tokens=2048))
    every, chats = CHAT
    mixed = tuple(
        replace(paper, prompt=chat.prompt, output=chat.output) if i % every < chats else paper
        for i, (chat, paper) in enumerate(zip(CHATS, PAPERS, strict=False))
    )
    return Demand(group, mixed, (Objective("ttft", 0.9, 10.0), Objective("tpot", 0.9, 0.2)))


@cache
def most() -> float:
    """Requests per second that pieces beside decoding serve within the limits."""
    return demand().capacity(Nexus(beside=False).deploy(demand()))


def played(technique: Nexus, share: float) -> Outcome:
    """What clients see at a share of that load."""
    return demand().play(technique.deploy(demand()), share * most())


def throughput(technique: Nexus) -> float:
    """Load within the limits over that of pieces."""
    return capacity_gain(technique, demand())


def between_tokens(technique: Nexus) -> float:
    """Mean time between tokens of pieces over it, at the most that these serve."""
    return played(technique.baseline(), 1.0).tbt.mean / played(technique, 1.0).tbt.mean


def first_token(technique: Nexus) -> float:
    """Mean time to the first token of pieces over it, at a tenth more than these serve."""
    return played(technique.baseline(), 1.1).ttft.mean / played(technique, 1.1).ttft.mean


def over_half(technique: Nexus) -> float:
    """Load within the limits over that with half of the units for prompts, whatever waits."""
    ours, half = (demand().capacity(one.deploy(demand())) for one in (technique, replace(technique, share=0.5)))
    return ours / half


def more_units(technique: Nexus) -> float:
    """By how much a full step of prompts is shorter on 0.8 of the units than on 0.7, nothing beside it."""
    group = technique.deploy(demand()).group
    if not group.sharing:
        return math.nan
    few, many = (replace(group, machine=part(group.machine, s, reach(group.machine, s))).times() for s in (0.7, 0.8))
    tokens = group.rules.max_tokens
    return 1 - (many.rows(tokens) + many.prompt(tokens, 0)) / (few.rows(tokens) + few.prompt(tokens, 0))
