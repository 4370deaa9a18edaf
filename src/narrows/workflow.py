"""The two jobs that load real models: apply a plan to one, and verify the result beside the original."""

import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from narrows import ablation, directory, samples
from narrows import verify as verifying
from narrows.ablation import Ablation
from narrows.capture.torch import from_module
from narrows.diagnose import Diagnosis
from narrows.errors import NarrowsError
from narrows.free import Bf16
from narrows.gguf_file import save_gguf
from narrows.machine import Machine
from narrows.own import Int8
from narrows.plan import Plan
from narrows.progress import Tell
from narrows.search import budget as budgets
from narrows.staging import check_place
from narrows.step import Step
from narrows.technique import No, Recovers, Stage, Verdict

GGUF_READERS = ["narrows", "transformers", "llama.cpp"]
CALIBRATION, HELD_OUT, LENGTH = 8, 8, 256  # batches, batches, tokens: a minute for a 135M model, figures stable to a percent
TRAINING = 64  # batches of the half of the text that nothing is held out of, where a plan trains


def _prose(text: str | None) -> tuple[str, str]:
    return (Path(text).name, Path(text).read_text("utf-8", "replace")) if text else samples.text()


def _longest(config: Any) -> int:
    """Tokens in a batch: as many as are usual here, unless the model takes fewer."""
    return min(LENGTH, int(getattr(config, "max_position_embeddings", LENGTH)))


def _batches(tokenizer: Any, length: int, prose: str, held_out: bool) -> verifying.Batches:
    if tokenizer is None:
        raise NarrowsError("it has no tokenizer.", where="model", remedy="Use narrows.verify from Python with your own batches.")
    places = samples.token_batches(tokenizer, CALIBRATION + HELD_OUT, length, prose=prose)
    return places[CALIBRATION:] if held_out else places[:CALIBRATION]


def _lessons(plan: Plan, tokenizer: Any, length: int, prose: str) -> verifying.Batches:
    """What a plan that recovers trains on: tokens from all over the half of the text that calibration is from."""
    if not any(isinstance(step, Recovers) for step in plan):
        return ()
    return samples.token_batches(tokenizer, TRAINING, length, prose=prose[: len(prose) // 2])


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


def apply(
    model: str,
    plan_text: str,
    out: str,
    text: str | None,
    overwrite: bool,
    tell: Tell,
    gate: verifying.Gate | None = None,
    keep: bool = False,
    streamed: bool = False,
) -> tuple[verifying.Quality | None, Mapping[str, Any] | None]:
    """Load, check, apply, judge where there is a gate, save: the quality, and the manifest of the directory that `out` then is
    (of the file, where its name ends in .gguf).

    Nothing is written on a refusal, nor, unless `keep`, where the gate objects: then there is no manifest. A model whose
    weights fill more than half of the free memory is streamed, block by block, if its plan can be; so is any if `streamed`.
    """
    plan = Plan.parse(plan_text)
    if not plan.steps:
        raise NarrowsError("no technique is named.", where="plan", remedy="Write it like 'awq:group=64'.")
    _require(plan.conflict(), model)
    single = Path(out).suffix == ".gguf"
    check_place(Path(out), overwrite, "" if single else "config.json")  # before minutes are spent
    if Path(model).is_dir():
        directory.require_original(model, plan)
    _quiet()
    if streamed or (not single and _is_too_large(model, plan)):
        if single:
            raise NarrowsError("a gguf file is written from the whole model.", where=out, remedy="Leave --stream out.")
        if gate is not None:
            raise NarrowsError("a streamed model is not measured.", where=model, remedy="Use `narrows verify` afterwards.")
        return None, _stream(model, plan, out, text, overwrite, tell)
    tell(f"loading {model}")
    loaded, tokenizer = directory.load(model)
    tell("checking the plan")
    _require(_check(plan, loaded), model)
    prose = _prose(text)[1]
    data, held_out = (_batches(tokenizer, _longest(loaded.config), prose, held_out=late) for late in (False, True))
    judge = verifying.Judge(loaded, held_out, None) if gate else None
    training = _lessons(plan, tokenizer, _longest(loaded.config), prose)
    changed = plan.apply(loaded, data, training, tell)
    quality = judge.judge(changed, gate) if judge and gate else None
    if quality and quality.failure and not keep:
        return quality, None
    tell(f"writing {out}")
    if single:
        size = save_gguf(changed, tokenizer, out, plan, source=model, overwrite=overwrite)
        files = {Path(out).name: {"bytes": size}}
        told = {"readers": GGUF_READERS, "beside_weights": _beside_weights(plan), "moved": plan.moved}
        return quality, {"plan": str(plan), "source": model, "files": files, **told}
    return quality, _written(directory.save(changed, tokenizer, out, plan, source=model, overwrite=overwrite), out, plan)


def _check(plan: Plan, model: Any) -> Verdict:
    """Whether a plan applies to a model in some kind of step; what a cache keeps matters where tokens are decoded."""
    steps = [Step.forward(1, 128)]
    if hasattr(model, "lm_head"):
        steps.append(Step.decode(1, int(getattr(model.config, "max_position_embeddings", 2048))))
    verdict: Verdict = True
    for step in steps:
        verdict = plan.check(replace(from_module(model, step), eager=True), None, step)
        if verdict:
            break
    return verdict


def _written(manifest: directory.Manifest, out: str, plan: Plan) -> dict[str, Any]:
    """The manifest of what was written, who reads it, which steps are not in the weights, and what was moved in the plan."""
    readers = ["narrows", "transformers"] if directory.read_by_others(out) else ["narrows"]
    return {**manifest.to_dict(), "readers": readers, "beside_weights": _beside_weights(plan), "moved": plan.moved}


def _beside_weights(plan: Plan) -> list[str]:
    """The steps that change how a model runs and not what it holds: programs that read the weights alone lose them."""
    return [step.card.slug for step in plan if step.card.stage >= Stage.CACHE]


def _is_too_large(model: str, plan: Plan) -> bool:
    """Whether a directory's weights take more than half of the free memory, and the plan can be streamed."""
    if not Path(model).is_dir() or not all(one.card.blockwise for one in plan):
        return False
    stored = sum(t.end - t.begin for t in directory.headers(model).values())
    return stored > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2


def _stream(model: str, plan: Plan, out: str, text: str | None, overwrite: bool, tell: Tell) -> dict[str, Any]:
    from narrows.streaming import stream

    if not Path(model).is_dir():
        raise NarrowsError("only a model directory is streamed.", where=model, remedy="Leave --stream out.")
    config, tokenizer = directory.load_config(model)
    data: verifying.Batches = ()
    if any("calibration" in one.card.needs for one in plan):
        data = _batches(tokenizer, _longest(config), _prose(text)[1], held_out=False)
    return _written(stream(model, out, plan, data, overwrite=overwrite, tell=tell), out, plan)


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
    seen, held_out = (_batches(tokenizer, _longest(loaded.config), prose, held_out=late) for late in (False, True))
    found = budgets.find(loaded, free, budget, seen, held_out, tell)
    if found.plan is None or found.model is None:
        return found, None
    tell(f"writing {out}")
    return found, _written(
        directory.save(found.model, tokenizer, out, found.plan, source=model, overwrite=overwrite), out, found.plan
    )


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
    batches = _batches(tokenizer, _longest(old.config), prose, held_out=True)
    sizes, ours = verifying.steps_of(old, prompt, context, batches[0])
    _, theirs = verifying.steps_of(new, prompt, context, batches[0])
    predicted, diagnoses, weight_bytes = {}, [], 0.0
    for kind, step in sizes.items():
        tell(f"predicting {kind}")
        graph = replace(from_module(old, step, name=before), eager=True)
        *both, predicted[kind] = verifying.foreseen(graph, plan, machine, step, after)
        diagnoses += both
        weight_bytes = plan.rewrite(graph).weight_bytes
    steps = {kind: (ours[kind], theirs[kind]) for kind in sizes}
    measure = (quality, _function(quality)) if quality else None
    found = verifying.verify(old, new, batches, plan, predicted, weight_bytes, steps, gate, measure, before, name, rounds, tell)
    return found, diagnoses


def ablate(
    before: str, after: str, machine: Machine, text: str | None, prompt: int, context: int, rounds: int, tell: Tell
) -> Ablation:
    """What each step of the plan in `after` does to `before` alone, and what the steps do together."""
    plan = directory.read_plan(after)
    if plan is None:
        raise NarrowsError("it holds no plan.", where=after, remedy="Give a directory that `narrows apply` wrote.")
    model, tokenizer = directory.load(before)
    prose, length = _prose(text)[1], _longest(model.config)
    seen, held_out = (_batches(tokenizer, length, prose, held_out=late) for late in (False, True))
    training = _lessons(plan, tokenizer, length, prose)
    return ablation.ablate(model, plan, machine, prompt, context, seen, held_out, rounds, tell, training)
