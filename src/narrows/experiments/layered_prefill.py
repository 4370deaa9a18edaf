"""What layered prefill claims, in the serving simulator: Qwen3-30B-A3B on two H100, long papers to summarize."""

from dataclasses import replace
from functools import cache
from math import ceil

from narrows.capture import capture
from narrows.cost import cost
from narrows.experiments.serving import capacity_gain, load, through
from narrows.machine import machine
from narrows.parallel import tensor_parallel
from narrows.simulate.demand import Demand, Objective
from narrows.simulate.fleet import Group, rules
from narrows.simulate.outcome import Outcome
from narrows.step import Step
from narrows.techniques.serving.layered_prefill import LayeredPrefill

NEAR = 1.3 / 1.5  # of the load at which pieces no longer keep up: where the paper compares latencies


@cache
def demand() -> Demand:
    """Median prompt 7,059 tokens, median answer 208; 10 s to the first token, 0.125 s between tokens."""
    group = Group(capture("qwen3-30b-a3b"), machine("h100-sxm"), replace(rules("vllm-v1"), prefix_cache=False), devices=2)
    requests = load(through(7059, 12985), through(208, 371), 16384)
    return Demand(group, requests, (Objective("ttft", 0.9, 10.0), Objective("tbt", 0.99, 0.125)))


@cache
def pieces_capacity() -> float:
    """Requests per second that are served within the limits if prompts are read in pieces."""
    return demand().capacity(LayeredPrefill(layered=False).deploy(demand()))


def played(technique: LayeredPrefill, share: float) -> Outcome:
    """What clients see at a share of that load."""
    return demand().play(technique.deploy(demand()), share * pieces_capacity())


def first_token(technique: LayeredPrefill) -> float:
    """By how much of its time the first token comes earlier than with pieces."""
    return 1 - played(technique, NEAR).ttft.mean / played(technique.baseline(), NEAR).ttft.mean


def whole_answer(technique: LayeredPrefill) -> float:
    """By how much of its time the last token comes earlier than with pieces."""
    return 1 - played(technique, NEAR).e2e.mean / played(technique.baseline(), NEAR).e2e.mean


def capacity(technique: LayeredPrefill) -> float:
    """Load within the limits over that of pieces."""
    return capacity_gain(technique, demand())


def loads(technique: LayeredPrefill) -> float:
    """Bytes of expert weights that all steps read: rows of those that decode at their mean, and of each prompt."""
    experts = tensor_parallel(demand().group.graph, demand().group.devices).find("expert")
    found = played(technique, 0.5)
    beside = max(round(found.tbt.count / found.steps), 1)

    @cache
    def read(rows: int) -> float:
        return sum(float(cost(op, Step.decode(rows, 1)).weight_bytes) for op in experts)

    total, reading = 0.0, 0
    for request in demand().requests:
        steps = ceil(request.prompt / technique.tokens)
        reading += steps
        if technique.layered:  # every layer once with the prompt, and otherwise without
            total += read(request.prompt + beside) + (steps - 1) * read(beside)
        else:
            total += steps * read(min(request.prompt, technique.tokens) + beside)
    return total + (found.steps - reading) * read(beside)


def expert_loads(technique: LayeredPrefill) -> float:
    """By how much of theirs fewer bytes of experts are read than with pieces."""
    return 1 - loads(technique) / loads(technique.baseline())
