"""Plans: their order and its reason, and what excludes what."""

import itertools

import pytest

from narrows.plan import BEFORE, Plan
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
