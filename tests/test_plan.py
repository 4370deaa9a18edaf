"""Plans: their order and its reason, and what excludes what."""

import itertools

import pytest
import torch

from narrows.plan import BEFORE, Plan
from narrows.samples import tiny_llama
from narrows.technique import No, Stage


def test_every_stage_but_the_last_says_why_it_comes_first():
    assert list(BEFORE) == sorted(Stage)[:-1]


STEPS = ("llm-drop:attention=2", "greenformer", "bf16", "awq:group=64", "pyramidkv", "compile")


@pytest.mark.parametrize("given", [*itertools.permutations(STEPS[:3]), tuple(reversed(STEPS))], ids="+".join)
def test_the_order_is_that_of_the_stages_however_it_was_given(given):
    plan = Plan.parse(" + ".join(given))
    ordered = sorted(given, key=STEPS.index)
    assert str(plan) == " + ".join(ordered)
    assert bool(plan.moved) == (list(given) != ordered)
    assert plan == Plan.parse(str(plan)) and not Plan.parse(str(plan)).moved


def test_what_was_moved_is_named_with_its_reason():
    assert Plan.parse("awq + llm-drop").moved.startswith("llm-drop is applied before awq: what is removed needs no further work")


def test_two_of_a_stage_that_touch_the_same_exclude_each_other():
    verdict = Plan.parse("awq + int8").conflict()
    assert isinstance(verdict, No) and verdict.reason == "awq and int8 both change linear weights"
    assert Plan.parse("greenformer + awq").conflict() is True


@pytest.mark.parametrize(
    ("given", "ordered"),
    [
        ("llm-drop + recover + greenformer + int8", ""),
        ("llm-drop + greenformer + recover + int8", ""),
        ("llm-drop + recover + greenformer + recover:steps=16 + int8", ""),
        ("recover + llm-drop", "llm-drop + recover"),
        ("recover + int8 + greenformer", "greenformer + recover + int8"),
        ("int8 + recover + llm-drop", "llm-drop + recover + int8"),
    ],
)
def test_what_recovers_stays_behind_what_it_was_written_after_while_weights_can_be_trained(given, ordered):
    plan = Plan.parse(given)
    assert str(plan) == (ordered or given) and bool(plan.moved) == bool(ordered)
    assert plan == Plan.parse(str(plan)) and not Plan.parse(str(plan)).moved
    assert plan.conflict() is True


def test_what_is_packed_can_no_longer_be_trained():
    assert Plan.parse("int8 + recover").moved == (
        "recover is applied before int8: weights that are rounded or packed can no longer be trained"
    )


def test_the_teacher_is_the_model_that_the_plan_was_given():
    """Not what is left of it when its turn comes; and what it says of the training data, where there is some."""
    model, (seen, lesson) = tiny_llama(4, tokens=16)
    with torch.no_grad():
        before = model.eval()(**lesson).logits.log_softmax(-1)
    plan, told = Plan.parse("llm-drop:attention=1 + recover:steps=60,rate=0.01"), []

    def far(changed: torch.nn.Module) -> float:
        with torch.no_grad():
            after = changed(**lesson).logits.log_softmax(-1)
        return float((before.exp() * (before - after)).sum(-1).mean())

    cut, recovered = [far(changed) for changed in plan.applied(model, [seen], [lesson], lambda *what: told.append(what))]
    assert recovered < cut / 4
    assert told[0] == ("asking the teacher", 0, 1) and ("recovering", 59, 60) in told
