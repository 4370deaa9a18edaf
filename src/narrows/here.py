"""Is the calibrated machine true? Real models run here, beside what is predicted for them, and which of two is faster."""

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from narrows import samples
from narrows.calibrate import cpu_seconds
from narrows.capture.torch import from_module
from narrows.diagnose import seconds
from narrows.machine import Machine
from narrows.plan import Plan
from narrows.step import Step
from narrows.verify import generation_steps

if TYPE_CHECKING:
    import torch

# bf16, and plain rounding to 4 bits on top of it: what `awq` runs as, without the minute its search takes
PLANS = ("", "bf16", "bf16 + awq:group=64,search=False,clip=False")
TOO_CLOSE = 0.05  # a ratio nearer to one than this is neither faster nor slower


@dataclass(frozen=True)
class Case:
    """One model in one form at one kind of step: CPU seconds of a step, measured and predicted with its interval."""

    model: str
    plan: str
    step: str
    measured: float
    predicted: float
    low: float
    high: float

    @property
    def error(self) -> float:
        return abs(self.predicted / self.measured - 1)


def measure(machine: Machine, progress: Callable[[str], None] = lambda _: None) -> list[Case]:
    """SmolLM2-135M, all-MiniLM-L6-v2 and a ResNet-50 of random weights, in every form each takes; one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [case for make in (_smollm2, _minilm, _resnet) for case in _cases(machine, make, progress)]
    finally:
        torch.set_num_threads(threads)


Runs = Iterator[tuple[str, Step, Callable[[], object]]]


def _cases(
    machine: Machine, make: "Callable[[], tuple[str, torch.nn.Module, Callable[[Any], Runs]]]", progress: Callable[[str], None]
) -> list[Case]:
    found = []
    for text in PLANS:
        name, model, runs = make()
        plan = Plan.parse(text)
        if plan.steps and not plan.check(replace(from_module(model, Step.forward(1, 64)), eager=True), None, Step.forward(1, 64)):
            continue
        model = plan.apply(model, [samples_batch()]) if plan.steps else model
        for label, step, run in runs(model):
            progress(f"{name} {text} {label}")
            predicted, low, high = seconds(replace(from_module(model, step), eager=True), machine, step)
            found.append(
                Case(name, text, label, min(cpu_seconds(run, rounds=5, least=0.05)), float(predicted), float(low), float(high))
            )  # type: ignore[arg-type]
    return found


def samples_batch() -> "dict[str, torch.Tensor]":
    """One short batch: what plain rounding is given where a plan asks for data."""
    import torch

    return {"input_ids": torch.arange(1, 33)[None]}


def _smollm2() -> "tuple[str, torch.nn.Module, Callable[[Any], Runs]]":
    def runs(model: Any) -> Runs:
        for size in (32, 256):
            steps = generation_steps(model, size, size)
            yield f"prefill {size}", Step.prefill(1, size), steps["prefill"]
            yield f"decode after {size}", Step.decode(1, size), steps["decode"]

    return "smollm2-135m", samples.smollm2()[0], runs


def _minilm() -> "tuple[str, torch.nn.Module, Callable[[Any], Runs]]":
    import torch

    def runs(model: Any) -> Runs:
        for batch, tokens in ((1, 64), (16, 64), (4, 256)):
            ids = torch.randint(1000, 20_000, (batch, tokens), generator=torch.Generator().manual_seed(0))
            yield f"forward {batch} x {tokens}", Step.forward(batch, tokens), partial(_forward, model, input_ids=ids)

    return "all-minilm-l6-v2", samples.minilm()[0], runs


def _resnet() -> "tuple[str, torch.nn.Module, Callable[[Any], Runs]]":
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    def runs(model: Any) -> Runs:
        for batch in (1, 4):
            pixels = torch.ones(batch, 3, 224, 224, dtype=next(model.parameters()).dtype)
            yield f"forward {batch} images", Step.forward(batch), partial(_forward, model, pixel_values=pixels)

    return "resnet-50", ResNetForImageClassification(ResNetConfig(num_labels=1000)).eval(), runs


def _forward(model: Any, **inputs: Any) -> object:
    import torch

    with torch.inference_mode():
        return model(**inputs)


def summary(cases: list[Case]) -> dict[str, Any]:
    """Errors over the cases, and how often the prediction tells which of two forms of a model is the faster at a step."""
    calls = right = 0
    for a, b in itertools.combinations(cases, 2):
        if (a.model, a.step) == (b.model, b.step) and abs(a.measured / b.measured - 1) > TOO_CLOSE:
            calls += 1
            right += (a.measured < b.measured) == (a.predicted < b.predicted)
    worst = max(cases, key=lambda c: c.error)
    return {
        "name": "here",
        "rows": len(cases),
        "covered": len(cases),
        "mape": statistics.fmean(c.error for c in cases),
        "median": statistics.median(c.error for c in cases),
        "worst": {**asdict(worst), "error": worst.error},
        "coverage80": statistics.fmean(c.low <= c.measured <= c.high for c in cases),
        "faster_or_slower": {"cases": calls, "right": right},
        "measurements": [{**asdict(c), "error": c.error} for c in cases],
    }
