"""What each step of a plan does alone and what they do together: whether the product of the gains holds."""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from narrows.gain import Gain
from narrows.machine import Machine
from narrows.plan import Plan
from narrows.progress import Tell, silent
from narrows.technique import Recovers
from narrows.verify import Batches, Judge, foreseen, resident_bytes, steps_of, time_pair

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Variant:
    """A part of a plan, measured beside the original: ratios of quality and bytes, and speed-ups by kind of step.

    noise: how far two timings of the original were apart, as a ratio of at least 1. predicted: speed-ups with their intervals.
    added: ratios not to the original, but to what the steps before it had made of it.
    """

    plan: str
    quality: float
    bytes: float
    speed: Mapping[str, float]
    noise: Mapping[str, float]
    predicted: Mapping[str, Gain]
    added: bool = False

    def gain(self, of: str) -> float:
        """The ratio to the original of quality, bytes, or the speed of a kind of step."""
        return {"quality": self.quality, "bytes": self.bytes, **self.speed}[of]

    def over(self, before: "Variant", plan: str) -> "Variant":
        """What the step that this variant has beyond `before` adds: the ratios to it."""
        return Variant(
            plan,
            self.quality / before.quality,
            self.bytes / before.bytes,
            {kind: speed / before.speed[kind] for kind, speed in self.speed.items()},
            {kind: noise * before.noise[kind] for kind, noise in self.noise.items()},
            {kind: (said[0] / before.predicted[kind][0],) * 3 for kind, said in self.predicted.items()},
            added=True,
        )


@dataclass(frozen=True)
class Product:
    """The product of what single steps gained, beside what the whole plan did; `predicted` likewise, for speeds alone."""

    of_steps: float
    whole: float
    predicted_of_steps: float | None = None
    predicted_whole: float | None = None

    @property
    def interaction(self) -> float:
        """What the whole is of the product: 1 where the steps do not touch each other."""
        return self.whole / self.of_steps


@dataclass(frozen=True)
class Ablation:
    """Each step of a plan `alone`, and the plan `up_to` each of its steps; `measure` names the quality.

    A step that recovers stands in `alone` with what it adds to the steps before it.
    """

    measure: str
    alone: tuple[Variant, ...]
    up_to: tuple[Variant, ...]

    @property
    def products(self) -> dict[str, Product]:
        """For quality, bytes and each kind of step, whether the product of the single gains is that of the whole plan."""
        whole = self.up_to[-1]
        found = {}
        for of in ("quality", "bytes", *whole.speed):
            steps = math.prod(one.gain(of) for one in self.alone)
            if of in whole.predicted:
                said = math.prod(one.predicted[of][0] for one in self.alone), whole.predicted[of][0]
                found[of] = Product(steps, whole.gain(of), *said)
            else:
                found[of] = Product(steps, whole.gain(of))
        return found


def ablate(
    model: "torch.nn.Module",
    plan: Plan,
    machine: Machine,
    prompt: int,
    context: int,
    seen: Batches,
    held_out: Batches,
    rounds: int = 15,
    tell: Tell = silent,
    training: Batches = (),
) -> Ablation:
    """Apply each step of a plan alone, and the plan step by step, to copies of a model, and measure them beside it.

    seen: batches to calibrate on; training: to recover on; held_out: those for quality. Timings interleave with the
    original on one thread. A step that recovers has nothing to do alone: what counts is what it adds to those before it.
    """
    import torch

    from narrows.capture.torch import from_module

    torch.set_num_threads(1)
    judge = Judge(model, held_out, None)
    sizes, ours = steps_of(model, prompt, context, held_out[0])
    images = held_out[0] if any(value.is_floating_point() for value in held_out[0].values()) else None
    graphs = {kind: replace(from_module(model, step, images), eager=True) for kind, step in sizes.items()}
    size = resident_bytes(model)

    def measure(part: Plan, changed: "torch.nn.Module") -> Variant:
        quality = judge.judge(changed)
        theirs = steps_of(changed, prompt, context, held_out[0])[1]
        times = {kind: time_pair(ours[kind], theirs[kind], rounds, tell, f"timing {part}") for kind in sizes}
        return Variant(
            str(part),
            quality.after / quality.before,
            resident_bytes(changed) / size,
            {kind: ratio for kind, (_, _, ratio, _) in times.items()},
            {kind: max(same, 1 / same) for kind, (_, _, _, same) in times.items()},
            {kind: foreseen(graph, part, machine, sizes[kind])[2] for kind, graph in graphs.items()},
        )

    parts = [Plan(plan.steps[: i + 1]) for i in range(len(plan.steps))]
    up_to = [measure(*made) for made in zip(parts, plan.applied(deepcopy(model), seen, training, tell), strict=True)]
    alone = [up_to[0]]
    for i, step in enumerate(plan.steps[1:], 1):
        single = Plan((step,))
        if isinstance(step, Recovers):
            alone.append(up_to[i].over(up_to[i - 1], str(single)))
        else:
            alone.append(measure(single, single.apply(deepcopy(model), seen, training, tell)))
    return Ablation(judge.measure, tuple(alone), tuple(up_to))


def as_json(found: Ablation) -> dict[str, Any]:
    """An ablation as plain data."""
    products = {of: {**asdict(product), "interaction": product.interaction} for of, product in found.products.items()}
    return {**asdict(found), "products": products}
