"""The two jobs that load real models: apply a plan to one, and verify the result beside the original."""

import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrows import directory, samples
from narrows import verify as verifying
from narrows.capture.torch import from_module
from narrows.diagnose import Diagnosis, diagnose
from narrows.errors import NarrowsError
from narrows.free import Bf16
from narrows.machine import Machine
from narrows.own import Int8
from narrows.plan import Plan
from narrows.progress import Tell
from narrows.search import budget as budgets
from narrows.staging import check_place
from narrows.step import Step
from narrows.technique import No, Verdict

if TYPE_CHECKING:
    import torch

CALIBRATION, HELD_OUT, LENGTH = 8, 8, 256  # batches, batches, tokens: a minute for a 135M model, figures stable to a percent


def _prose(text: str | None) -> tuple[str, str]:
    return (Path(text).name, Path(text).read_text("utf-8", "replace")) if text else samples.text()


def _batches(model: "torch.nn.Module", tokenizer: Any, prose: str, held_out: bool) -> verifying.Batches:
    if tokenizer is None:
        raise NarrowsError("it has no tokenizer.", where="model", remedy="Use narrows.verify from Python with your own batches.")
    limit = int(getattr(model.config, "max_position_embeddings", LENGTH))  # type: ignore[union-attr, arg-type]
    places = samples.token_batches(tokenizer, CALIBRATION + HELD_OUT, min(LENGTH, limit), prose=prose)
    return places[CALIBRATION:] if held_out else places[:CALIBRATION]


def _function(name: str) -> Any:
    """The user's own `module:function`, looked for in the working directory too."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise NarrowsError(
            f"it cannot be imported ({error}).", where=f"quality: {name}", remedy="Give module:function."
        ) from error
    finally:
        sys.path.pop(0)


def _quiet() -> None:
    """Keep transformers' own progress bars from breaking ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _require(verdict: Verdict, model: str) -> None:
    if isinstance(verdict, No):
        raise NarrowsError(
            f"the plan does not apply: {verdict.reason}.", where=model, remedy="`narrows prescribe` lists what does."
        )


def apply(model: str, plan_text: str, out: str, text: str | None, overwrite: bool, tell: Tell) -> Mapping[str, Any]:
    """Load, check, apply, save: the manifest of the directory that `out` then is. Nothing is written on a refusal."""
    plan = Plan.parse(plan_text)
    if not plan.steps:
        raise NarrowsError("no technique is named.", where="plan", remedy="Write it like 'awq:group=64'.")
    _require(plan.conflict(), model)
    check_place(Path(out), overwrite, "config.json")  # before minutes are spent
    _quiet()
    tell(f"loading {model}")
    loaded, tokenizer = directory.load(model)
    tell("checking the plan")
    step = Step.forward(1, 128)
    _require(plan.check(replace(from_module(loaded, step), eager=True), None, step), model)
    data = _batches(loaded, tokenizer, _prose(text)[1], held_out=False)
    tell(f"applying {plan}")
    changed = plan.apply(loaded, data)
    tell(f"writing {out}")
    return directory.save(changed, tokenizer, out, plan, source=model, overwrite=overwrite).to_dict()


def apply_within(
    model: str, budget_text: str, out: str, text: str | None, overwrite: bool, tell: Tell
) -> tuple[budgets.Found, Mapping[str, Any] | None]:
    """Choose each layer's format within a budget, apply, measure and save: what was found, and the manifest if it is kept."""
    check_place(Path(out), overwrite, "config.json")
    _quiet()
    tell(f"loading {model}")
    loaded, tokenizer = directory.load(model)
    budget = budgets.Budget.parse(budget_text, verifying.resident_bytes(loaded))
    step = Step.forward(1, 128)
    graph = replace(from_module(loaded, step), eager=True)
    _require(Int8().check(graph, None, step), model)
    free = Plan.parse("bf16") if Bf16().check(graph, None, step) else Plan()
    prose = _prose(text)[1]
    seen, held_out = (_batches(loaded, tokenizer, prose, held_out=late) for late in (False, True))
    found = budgets.find(loaded, free, budget, seen, held_out, tell)
    if found.plan is None or found.model is None:
        return found, None
    tell(f"writing {out}")
    return found, directory.save(found.model, tokenizer, out, found.plan, source=model, overwrite=overwrite).to_dict()


def verify(
    before: str,
    after: str,
    machine: Machine,
    text: str | None,
    quality: str | None,
    prompt: int,
    context: int,
    gate: verifying.Gate,
    rounds: int,
    tell: Tell,
) -> tuple[verifying.Verification, list[Diagnosis]]:
    """Measure `after`, a directory with a plan in it, beside `before`, and the diagnoses of both that were predicted."""
    import torch

    torch.set_num_threads(1)
    plan = directory.read_plan(after)
    if plan is None:
        raise NarrowsError("it holds no plan.", where=after, remedy="Give a directory that `narrows apply` wrote.")
    _quiet()
    tell("loading both")
    old, tokenizer = directory.load(before)
    new, _ = directory.load(after)
    name, prose = _prose(text)
    batches = _batches(old, tokenizer, prose, held_out=True)
    causal = hasattr(old, "lm_head")
    sizes = (
        {"prefill": Step.prefill(1, prompt), "decode": Step.decode(1, context)}
        if causal
        else {"forward": Step.forward(1, prompt)}
    )
    predicted, diagnoses, weight_bytes = {}, [], 0.0
    for kind, step in sizes.items():
        tell(f"predicting {kind}")
        graph = replace(from_module(old, step, name=before), eager=True)
        changed = replace(plan.rewrite(graph), name=after)
        ours, theirs = diagnose(graph, machine, step), diagnose(changed, machine, step)
        ratios = [a / b for a, b in zip((ours.seconds, *ours.interval), (theirs.seconds, *theirs.interval), strict=True)]
        predicted[kind] = (ratios[0], min(ratios), max(ratios))
        diagnoses += [ours, theirs]
        weight_bytes = changed.weight_bytes
    if causal:
        a, b = (verifying.generation_steps(m, prompt, context) for m in (old, new))
        steps = {kind: (a[kind], b[kind]) for kind in sizes}
    else:
        batch = {key: value[:, :prompt] for key, value in batches[0].items()}
        steps = {"forward": (lambda: verifying.outputs(old, batch), lambda: verifying.outputs(new, batch))}
    measure = (quality, _function(quality)) if quality else None
    found = verifying.verify(old, new, batches, plan, predicted, weight_bytes, steps, gate, measure, before, name, rounds, tell)
    return found, diagnoses
