"""What Flover claims: in the serving simulator over batches formed beforehand, and run on a small model for its tokens."""

import math
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from narrows.capture import capture
from narrows.experiments.serving import capacity_gain, load
from narrows.machine import machine
from narrows.simulate.demand import Demand, Objective
from narrows.simulate.fleet import Group, rules
from narrows.techniques.serving.flover import Flover

if TYPE_CHECKING:
    from narrows.modules.fused_generation import Generated

SLOTS = 64
UNLIKE = 0.6  # coefficient of variation of the answers' lengths
LATE = 2.0  # times its latency alone that a request may take
EVERY = 3  # passes between two arrivals of the run
TOKENS = (30, 4, 12, 6, 20, 5, 16, 8)  # that its requests ask for


@cache
def demand(model: str, devices: int, spread: float) -> Demand:
    """Short prompts and answers of a spread, with a limit on the whole latency."""
    engine = replace(rules("vllm-v0"), max_sequences=SLOTS)
    wanted = Demand(Group(capture(model), machine("a100-80gb"), engine, devices), load((128, 0.3), (256, spread), 2048, 400))
    alone = wanted.play(Flover().deploy(wanted), rate=1e-3)
    return replace(wanted, objectives=(Objective("e2e", 0.9, LATE * alone.e2e.quantile(0.9)),))


def gpt(technique: Flover) -> float:
    """Load within the limit over that of batches formed beforehand."""
    return capacity_gain(technique, demand("gpt-neox-20b", 1, UNLIKE))


def llama(technique: Flover) -> float:
    """The same with a model cut over four devices."""
    return capacity_gain(technique, demand("llama-2-70b", 4, UNLIKE))


def unlike_lengths(technique: Flover) -> float:
    """How many times the gain with answers of one length it is."""
    return gpt(technique) / capacity_gain(technique, demand("gpt-neox-20b", 1, 0.0))


def instances(technique: Flover) -> float:
    """Load within the limit over one request in the time that it takes alone."""
    wanted = demand("gpt-neox-20b", 1, UNLIKE)
    alone = wanted.play(Flover().deploy(wanted), rate=1e-3)
    return wanted.capacity(technique.deploy(wanted)) * alone.e2e.mean


@cache
def ran() -> tuple[list[list[int]], dict[bool, "Generated"]]:
    """What each request is answered with alone, and what became of all of them with and without fusing."""
    from narrows.modules.fused_generation import Asked, generate
    from narrows.samples import smollm2, text

    model, tokenizer = smollm2()
    ids = tokenizer(text()[1][:20_000])["input_ids"]
    asked = [Asked(i * EVERY, ids[200 * i : 200 * i + 8 + 3 * i], tokens) for i, tokens in enumerate(TOKENS)]
    alone = [generate(model, [one]).answers[0] for one in asked]
    return alone, {fused: generate(model, asked, fused) for fused in (True, False)}


def passes(technique: Flover) -> float:
    """Passes that batches formed beforehand take over its own; not a number where a token is not that of the request alone."""
    alone, found = ran()
    ours, theirs = (found[one.fused] for one in (technique, technique.baseline()))
    return theirs.passes / ours.passes if ours.answers == theirs.answers == alone else math.nan
