"""Is the calibrated machine true? Real models run here, beside what is predicted for them, and which of two is faster."""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from narrows import samples
from narrows.calibrate import cpu_seconds
from narrows.capture.torch import from_module
from narrows.diagnose import seconds
from narrows.errors import NarrowsError
from narrows.gain import Parts, gain, parts
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
    """One model in one form at one kind of step: CPU seconds of a step, measured and predicted with its interval.

    parts: what the prediction rests on (see `gain`).
    """

    model: str
    plan: str
    step: str
    measured: float
    predicted: float
    low: float
    high: float
    parts: Parts

    @property
    def error(self) -> float:
        return abs(self.predicted / self.measured - 1)

    @property
    def row(self) -> dict[str, Any]:
        """The case as plain data, without what its prediction rests on."""
        return {**{f.name: getattr(self, f.name) for f in fields(self) if f.name != "parts"}, "error": self.error}


def measure(machine: Machine, progress: Callable[[str], None] = lambda _: None) -> tuple[list[Case], dict[str, str]]:
    """SmolLM2-135M, all-MiniLM-L6-v2, EfficientNet-Lite0 and a ResNet-50 (the last two of random weights), on one thread.

    Each in every form that it takes. Second: the models that are not installed, each with the reason.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cases: list[Case] = []
    absent: dict[str, str] = {}
    try:
        for name, (make, runs) in _MODELS.items():
            try:
                make()
            except NarrowsError as error:
                absent[name] = f"{error.problem} {error.remedy}"
                continue
            cases += _cases(machine, name, make, runs, progress)
    finally:
        torch.set_num_threads(threads)
    return cases, absent


Runs = Iterator[tuple[str, Step, Callable[[], object]]]


def _cases(
    machine: Machine,
    name: str,
    make: "Callable[[], torch.nn.Module]",
    runs: Callable[[Any], Runs],
    progress: Callable[[str], None],
) -> list[Case]:
    found = []
    for text in PLANS:
        model, plan, step = make(), Plan.parse(text), Step.forward(1, 64)
        if plan.steps and not plan.check(replace(from_module(model, step), eager=True), None, step):
            continue
        model = plan.apply(model, [samples_batch()]) if plan.steps else model
        for label, step, run in runs(model):
            progress(f"{name} {text} {label}")
            graph = replace(from_module(model, step), eager=True)
            predicted, low, high = (float(end) for end in seconds(graph, machine, step))  # type: ignore[arg-type]
            measured = min(cpu_seconds(run, rounds=5, least=0.05))
            found.append(Case(name, text, label, measured, predicted, low, high, parts(graph, machine, step)))
    return found


def samples_batch() -> "dict[str, torch.Tensor]":
    """One short batch: what plain rounding is given where a plan asks for data."""
    import torch

    return {"input_ids": torch.arange(1, 33)[None]}


def _generation(model: Any) -> Runs:
    for size in (32, 256):
        steps = generation_steps(model, size, size)
        yield f"prefill {size}", Step.prefill(1, size), steps["prefill"]
        yield f"decode after {size}", Step.decode(1, size), steps["decode"]


def _sentences(model: Any) -> Runs:
    import torch

    for batch, tokens in ((1, 64), (16, 64), (4, 256)):
        ids = torch.randint(1000, 20_000, (batch, tokens), generator=torch.Generator().manual_seed(0))
        yield f"forward {batch} x {tokens}", Step.forward(batch, tokens), partial(_forward, model, input_ids=ids)


def _images(model: Any, name: str) -> Runs:
    import torch

    for batch in (1, 4):
        pixels = torch.ones(batch, 3, 224, 224, dtype=next(model.parameters()).dtype)
        yield f"forward {batch} images", Step.forward(batch), partial(_forward, model, **{name: pixels})


def _resnet() -> "torch.nn.Module":
    from transformers import ResNetConfig, ResNetForImageClassification

    model: torch.nn.Module = ResNetForImageClassification(ResNetConfig(num_labels=1000)).eval()
    return model


_MODELS: "dict[str, tuple[Callable[[], torch.nn.Module], Callable[[Any], Runs]]]" = {
    "smollm2-135m": (lambda: samples.smollm2()[0], _generation),
    "all-minilm-l6-v2": (lambda: samples.minilm()[0], _sentences),
    "efficientnet-lite0": (samples.efficientnet, partial(_images, name="inputs")),
    "resnet-50": (_resnet, partial(_images, name="pixel_values")),
}


def _forward(model: Any, **inputs: Any) -> object:
    import torch

    with torch.inference_mode():
        return model(**inputs)


def summary(cases: list[Case], absent: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Errors over the cases, and how often the prediction tells which of two forms of a model is the faster at a step.

    `absent`: the models that were not measured, and why.
    """
    calls = right = 0
    gains: list[dict[str, Any]] = []
    for a, b in itertools.combinations(cases, 2):
        if (a.model, a.step) != (b.model, b.step):
            continue
        predicted, low, high = gain(a.parts, b.parts)
        gains.append({"model": a.model, "step": a.step, "before": a.plan, "after": b.plan, "measured": a.measured / b.measured,
                      "predicted": predicted, "low": low, "high": high})  # fmt: skip
        if abs(a.measured / b.measured - 1) > TOO_CLOSE:
            calls += 1
            right += (a.measured < b.measured) == (a.predicted < b.predicted)
    worst = max(cases, key=lambda c: c.error)
    return {
        "name": "here",
        "rows": len(cases) + len(absent or {}),
        "covered": len(cases),
        "mape": statistics.fmean(c.error for c in cases),
        "median": statistics.median(c.error for c in cases),
        "worst": worst.row,
        "coverage80": statistics.fmean(c.low <= c.measured <= c.high for c in cases),
        "faster_or_slower": {"cases": calls, "right": right},
        "gains": gains,
        "gains_coverage80": statistics.fmean(g["low"] <= g["measured"] <= g["high"] for g in gains) if gains else None,
        "absent": [{"model": model, "reason": reason} for model, reason in (absent or {}).items()],
        "measurements": [c.row for c in cases],
    }
