"""What 2BP claims: four pipelines of a 7B model in simulation, and the gradients of a small model run in its order."""

from dataclasses import replace
from functools import cache

from narrows.capture import capture
from narrows.experiments.pipelines import in_turn, largest_difference, whole
from narrows.machine import machine
from narrows.simulate.pipeline import Work
from narrows.simulate.stages import cut
from narrows.step import Step
from narrows.techniques.training_parallelism.two_bp import TwoBP

STAGES = 4
CASES = {"naive": ("gpipe", 1), "gpipe": ("gpipe", STAGES), "1f1b-1": ("1f1b", STAGES), "1f1b-2": ("1f1b", 2 * STAGES)}


@cache
def _gains(technique: TwoBP) -> dict[str, float]:
    """Speed-up over the same schedule with a whole backward pass."""
    work = cut(capture("llama-2-7b"), machine("a100-80gb"), Step.train(1, 1024), STAGES, 1)
    return {
        name: _gain(replace(technique, schedule=schedule), replace(work, microbatches=m)) for name, (schedule, m) in CASES.items()
    }


def _gain(technique: TwoBP, work: Work) -> float:
    return technique.baseline().play(work).seconds / technique.play(work).seconds


def best_gain(technique: TwoBP) -> float:
    """The best speed-up of four schedules."""
    return max(_gains(technique).values())


def least_gain(technique: TwoBP) -> float:
    """The least speed-up of four schedules."""
    return min(_gains(technique).values())


def naive_gain(technique: TwoBP) -> float:
    """The speed-up of a pipeline that one microbatch passes through."""
    return _gain(replace(technique, schedule="gpipe"), Work.of(STAGES, 1))


def deferred(technique: TwoBP) -> float:
    """Share of backward passes whose gradients of weights are computed apart; 0 if the gradients come out wrong."""
    microbatches = 2 * STAGES
    order = technique.order(Work.of(STAGES, microbatches))
    kinds = [one.kind for row in order.ranks for one in row]
    right = largest_difference(whole(STAGES), in_turn(order, STAGES, microbatches)) < 1e-9
    return kinds.count("W") / (kinds.count("I") + kinds.count("B")) if right else 0.0


def extra_memory(technique: TwoBP) -> float:
    """Peak of activations over that of the whole backward pass, which frees half of what it held with I."""
    work = Work.of(STAGES, 2 * STAGES, released_bytes=0.5)
    ours, plain = (max(one.play(work).peak_bytes.values()) for one in (technique, technique.baseline()))
    return ours / plain
