"""What holds for every technique in the registry, each on its own example."""

import dataclasses
import importlib
import itertools
import math

import numpy as np
import pytest
import torch

from narrows.backward import gradient_exchange, training
from narrows.capture import capture
from narrows.capture.torch import from_module
from narrows.cost import Cost, cost, total
from narrows.footprint import footprint
from narrows.free import FREE
from narrows.graph import Graph
from narrows.machine import machine
from narrows.own import OWN
from narrows.papers import module_name, paper
from narrows.plan import Plan
from narrows.step import Step
from narrows.technique import Measures, No, Rewrites, Technique, Trains, techniques

ALL: dict[str, type[Technique]] = {**techniques(), **FREE, **OWN}
REWRITES = {slug: t for slug, t in ALL.items() if issubclass(t, Rewrites)}
FROM_PAPERS = techniques()
EMPTY = Graph("empty", ())


def by(names: dict[str, type[Technique]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("technique", names.values(), ids=names.keys())


@by(FROM_PAPERS)
def test_a_card_names_its_paper_and_what_would_refute_it(technique: type[Technique]) -> None:
    card = technique.card
    assert paper(card.slug)
    assert card.claims, "a technique without a claim cannot be shown to work"
    experiments = importlib.import_module(f"narrows.experiments.{module_name(card.slug)}")
    for claim in card.claims:
        assert claim.tolerance, claim.name
        assert claim.why, claim.name
        assert claim.how in ("run", "simulated", "checked")
        assert callable(getattr(experiments, claim.name))
        assert not claim.holds(math.nan)
    assert len({c.name for c in card.claims}) == len(card.claims)
    assert technique().baseline() is not None


@by(ALL)
def test_instances_are_values_that_their_text_rebuilds(technique: type[Technique]) -> None:
    for instance in technique.space():
        assert dataclasses.is_dataclass(instance)
        assert instance == dataclasses.replace(instance)  # type: ignore[type-var]
        assert hash(instance) == hash(dataclasses.replace(instance))  # type: ignore[type-var]
        with pytest.raises(dataclasses.FrozenInstanceError):
            instance.anything = 1  # type: ignore[attr-defined]
        if isinstance(instance, Rewrites | Trains):
            plan = Plan((instance,))
            assert Plan.parse(str(plan)) == plan


@by({slug: t for slug, t in ALL.items() if issubclass(t, Rewrites | Trains)})
def test_a_refusal_has_its_reason(technique: type[Technique]) -> None:
    verdict = technique().check(EMPTY, None, Step.forward(1, 8))  # type: ignore[attr-defined]
    assert isinstance(verdict, No)
    assert len(verdict.reason) > 10


def matrix_work(graph: Graph, step: Step) -> Cost:
    return sum((cost(op, step) for op in graph if op.spec.matmul), Cost())


@by(REWRITES)
def test_the_square_commutes(technique: type[Rewrites]) -> None:
    """What the plan predicts on the graph is what it does to the model."""
    example, chosen = technique.example(), technique.example_instance()
    before = from_module(example.model, example.step)
    before = dataclasses.replace(before, eager=True)
    assert chosen.check(before, None, example.step) is True
    predicted = chosen.rewrite(before)
    changed = chosen.apply(example.model, example.data)
    found = dataclasses.replace(from_module(changed, example.step), eager=predicted.eager)
    if example.step.phase == "train":
        predicted = training(predicted)
    for exact in ("flop", "weight_bytes", "cache_bytes"):
        assert getattr(matrix_work(found, example.step), exact) == pytest.approx(
            getattr(matrix_work(predicted, example.step), exact), rel=1e-9
        ), exact
    whole, foreseen = total(found, example.step), total(predicted, example.step)
    assert whole.flop == pytest.approx(foreseen.flop, rel=1e-3)
    assert found.weight_bytes == pytest.approx(predicted.weight_bytes, rel=1e-3)
    assert footprint(found, example.step).kv_bytes == pytest.approx(footprint(predicted, example.step).kv_bytes, rel=1e-9)
    before_cost, after_cost = total(before, example.step), total(predicted, example.step)
    kept = [footprint(g, example.step) for g in (before, predicted)]
    assert before_cost != after_cost or kept[0] != kept[1] or before.eager != predicted.eager, "it changed nothing"


@by(REWRITES)
def test_the_changed_model_still_answers(technique: type[Rewrites]) -> None:
    example, chosen = technique.example(), technique.example_instance()
    example.model.eval()
    with torch.no_grad():
        reference = [_main(example.model(**batch)) for batch in example.data]
        changed = chosen.apply(example.model, example.data).eval()
        answers = [_main(changed(**_cast(changed, batch))) for batch in example.data]
    for a, b in zip(reference, answers, strict=True):
        assert a.shape == b.shape
        assert torch.isfinite(b).all()
        if technique.card.exact:
            torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-3, atol=1e-4)


def _cast(model: torch.nn.Module, batch: dict) -> dict:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def _main(output: object) -> torch.Tensor:
    for name in ("logits", "last_hidden_state"):
        output = getattr(output, name, output)
    return output if isinstance(output, torch.Tensor) else output[0]  # type: ignore[index]


@by(REWRITES)
def test_a_symbolic_graph_is_rewritten_as_well(technique: type[Rewrites]) -> None:
    """On config graphs, at every step the technique says it helps: refused with a reason, or cheaper somewhere."""
    for name in ("llama-3.2-1b", "bert-base"):
        graph = capture(name)
        for step in (Step.prefill(1, 512), Step.decode(2, 2048), Step.train(1, 512)):
            if step.phase not in technique.card.phases or (name == "bert-base" and step.phase == "decode"):
                continue
            verdicts = [instance.check(graph, None, step) for instance in technique.space()]
            for instance, verdict in zip(technique.space(), verdicts, strict=True):
                if verdict:
                    changed = instance.rewrite(graph)
                    assert np.isfinite(total(changed, step).flop)
                    assert changed.weight_bytes <= graph.weight_bytes * 1.001
                else:
                    assert isinstance(verdict, No) and verdict.reason


@by({slug: t for slug, t in ALL.items() if issubclass(t, Trains)})
def test_training_techniques_change_the_training_graph(technique: type[Trains]) -> None:
    graph, step = gradient_exchange(training(capture("bert-base")), 8), Step.train(4, 128)
    assert technique().check(graph, machine("v100-sxm2-32gb"), step) is True
    assert total(technique().rewrite(graph), step) != total(graph, step)


@by({slug: t for slug, t in ALL.items() if issubclass(t, Measures)})
def test_analyses_read_real_graphs(technique: type[Measures]) -> None:
    reading = technique().measure(capture("resnet-50"), machine("a100-80gb"), Step.forward(8, 1))
    assert reading.values
    assert all(math.isfinite(v) for v in reading.values.values())
    assert set(reading.units) <= set(reading.values)


PAIRS = list(itertools.combinations(REWRITES, 2))


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pairs_compose_or_say_why_not(pair: tuple[str, str]) -> None:
    """On a config graph: either a conflict with its reason, or a plan whose rewrite is each one's in turn."""
    graph, step = dataclasses.replace(capture("llama-3.2-1b"), eager=True), Step.decode(1, 2048)
    plan = Plan(tuple(REWRITES[slug]() for slug in pair))
    verdict = plan.check(graph, None, step)
    if verdict:
        one_by_one = plan.steps[1].rewrite(plan.steps[0].rewrite(graph))
        assert plan.rewrite(graph) == one_by_one
        assert np.isfinite(total(plan.rewrite(graph), step).flop)
    else:
        assert isinstance(verdict, No) and verdict.reason
