"""What holds for every technique in the registry, each on its own example."""

import dataclasses
import importlib
import itertools
import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from narrows.backward import gradient_exchange, training
from narrows.capture import capture
from narrows.capture.torch import from_module
from narrows.cost import Cost, cost, total
from narrows.errors import NarrowsError
from narrows.footprint import footprint
from narrows.free import FREE
from narrows.graph import Graph
from narrows.machine import machine, machines
from narrows.own import OWN
from narrows.papers import module_name, paper
from narrows.plan import Plan
from narrows.step import Step
from narrows.technique import Measures, No, Recovers, Rewrites, Stage, Technique, Trains, techniques

ALL: dict[str, type[Technique]] = {**techniques(), **FREE, **OWN}
REWRITES = {slug: t for slug, t in ALL.items() if issubclass(t, Rewrites)}
FROM_PAPERS = techniques()
torch.set_num_threads(1)  # the models are tiny: more only wait for each other
EMPTY = Graph("empty", ())
Batches = Sequence[Mapping[str, torch.Tensor]]


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


def same_square(found: Graph, predicted: Graph, step: Step) -> None:
    """What was captured of a changed model costs what was predicted."""
    for exact in ("flop", "weight_bytes", "cache_bytes"):
        assert getattr(matrix_work(found, step), exact) == pytest.approx(
            getattr(matrix_work(predicted, step), exact), rel=1e-9
        ), exact
    whole, foreseen = total(found, step), total(predicted, step)
    assert whole.flop == pytest.approx(foreseen.flop, rel=1e-3)
    assert found.weight_bytes == pytest.approx(predicted.weight_bytes, rel=1e-3)
    assert footprint(found, step).kv_bytes == pytest.approx(footprint(predicted, step).kv_bytes, rel=1e-9)


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
    same_square(found, predicted, example.step)
    if issubclass(technique, Recovers):
        assert predicted == before, "training changes no work"
        return
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


PAIRS = [*itertools.combinations(REWRITES, 2)]
STEP = Step.decode(1, context=300)


def is_sampled(pair: tuple[str, str]) -> bool:
    """A sixteenth of all pairs, always the same ones, whatever else is in the registry."""
    return zlib.crc32("+".join(pair).encode()) % 16 == 0


def small_llama(**changes: object) -> tuple[torch.nn.Module, Batches]:
    """A Llama that some group and rank of every technique fits, with two batches."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 128, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**{**sizes, "num_key_value_heads": 2, "max_position_embeddings": 512, **changes})
    return transformers.LlamaForCausalLM(config).eval(), [{"input_ids": torch.randint(128, (2, 16))} for _ in range(2)]


def graph_of(model: torch.nn.Module, step: Step = STEP) -> Graph:
    return dataclasses.replace(from_module(model, step), eager=True)


def quick(technique: type[Rewrites], graph: Graph) -> Rewrites:
    """The instance of its example where it applies to a graph, else the first that does; the defaults where none does."""
    tried = (technique.example_instance(), *technique.space())
    return next((one for one in tried if one.check(graph, None, STEP)), tried[0])


@pytest.mark.parametrize("pair", [p if is_sampled(p) else pytest.param(p, marks=pytest.mark.pairs) for p in PAIRS], ids="+".join)
def test_pairs_keep_the_square_or_say_why_not(pair: tuple[str, str]) -> None:
    """Either a conflict with its reason, or a model that answers and costs what the plan predicts."""
    model, data = small_llama()
    graph = graph_of(model)
    plan = Plan(tuple(quick(REWRITES[slug], graph) for slug in pair))
    verdict = plan.check(graph, None, STEP)
    if not verdict:
        assert isinstance(verdict, No) and verdict.reason
        return
    predicted = plan.rewrite(graph)
    assert predicted == plan.steps[1].rewrite(plan.steps[0].rewrite(graph))
    if "compile" in pair:  # the compiler's own graphs are not captured
        return
    changed = plan.apply(model, data).eval()
    found = dataclasses.replace(from_module(changed, STEP), eager=predicted.eager)
    same_square(found, predicted, STEP)
    with torch.no_grad():
        assert torch.isfinite(changed(**data[0]).logits).all()


WEIGHTS = {slug: t for slug, t in REWRITES.items() if t.card.stage in (Stage.FACTOR, Stage.QUANTIZE)}


def refusal(plan: Plan, model: torch.nn.Module, data: Batches) -> str:
    """Why a plan refuses a model, by its check or by its apply, or '' where it is applied and the square holds."""
    graph = graph_of(model)
    verdict = plan.check(graph, None, STEP)
    if isinstance(verdict, No):
        return verdict.reason
    try:
        changed = plan.apply(model, data)
    except NarrowsError as error:
        return str(error)
    same_square(graph_of(changed), plan.rewrite(graph), STEP)
    assert torch.isfinite(changed(input_ids=torch.ones(1, 4, dtype=torch.long)).logits).all()
    return ""


@by(WEIGHTS)
@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 72, "intermediate_size": 100}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}],
    ids=["odd sizes", "tied", "biases"],
)
def test_odd_models_are_handled_or_refused_with_a_reason(technique: type[Rewrites], changes: dict[str, int]) -> None:
    model, data = small_llama(**changes, num_hidden_layers=1)
    refusal(Plan((quick(technique, graph_of(model)),)), model, data)


@by(REWRITES)
def test_weights_that_are_no_numbers_are_refused_by_name(technique: type[Rewrites]) -> None:
    model, data = small_llama(num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = math.nan
    with pytest.raises(NarrowsError, match=r"layers\.0\.mlp\.up_proj"):
        Plan((technique.example_instance(),)).apply(model, data)


@by({slug: t for slug, t in REWRITES.items() if "calibration" in t.card.needs})
def test_calibration_without_data_is_refused(technique: type[Rewrites]) -> None:
    model, _ = small_llama(num_hidden_layers=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NarrowsError, match="calibration data"):
        Plan((technique.example_instance(),)).apply(model, ())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@by(WEIGHTS)
def test_packed_weights_are_not_packed_again(technique: type[Rewrites]) -> None:
    """Whatever packed them first, a technique refuses what it cannot read, and tells why."""
    model, data = small_llama(num_hidden_layers=1)
    packed = OWN["int8"]().apply(model)
    assert "linear layer" in refusal(Plan((technique.example_instance(),)), packed, data) or technique is FROM_PAPERS["flashsvd"]


@by(REWRITES)
def test_every_machine_gets_an_answer(technique: type[Rewrites]) -> None:
    """A device without the kernel is refused with the reason; none makes a check fail."""
    graph = capture("llama-3.2-1b")
    for name in machines():
        verdict = technique().check(graph, machine(name), Step.decode(1, 2048))
        assert verdict is True or (isinstance(verdict, No) and len(verdict.reason) > 10), name
