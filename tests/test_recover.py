"""Recovery as a step of a plan: what it refuses, and what it gives back on real models."""

from copy import deepcopy

import pytest
import torch

from narrows import ablation, samples, verify
from narrows.capture.torch import from_module
from narrows.errors import NarrowsError
from narrows.experiments.digit_network import correct, dense
from narrows.experiments.steady import one_thread, time_ratio
from narrows.machine import machine
from narrows.own import Int8
from narrows.plan import Plan, parse
from narrows.progress import silent
from narrows.recover import Recover
from narrows.step import Step
from narrows.technique import No, Recovers

SLUG = "patient-consistent-kd-funmatch"


@pytest.mark.parametrize("text", ["recover:steps=-1", "recover:rate=0", "recover:classes=0", f"{SLUG}:views=none"])
def test_options_that_are_not_possible_are_refused(text: str) -> None:
    with pytest.raises(NarrowsError, match="is not possible"):
        parse(text)


def test_packed_weights_are_refused_by_name() -> None:
    model, _ = samples.tiny_llama(1, tokens=16)
    packed = from_module(Int8().apply(model.eval()), Step.forward(1, 16))
    verdict = Recover().check(packed, None, Step.forward(1, 16))
    assert isinstance(verdict, No) and "proj keeps its weights as int8, which cannot be trained" in verdict.reason


def test_tokens_cannot_be_mixed() -> None:
    model, data = samples.tiny_llama(1, tokens=16)
    mixing = parse(SLUG)
    assert isinstance(mixing, Recovers)
    verdict = mixing.check(from_module(model, Step.forward(1, 16)), None, Step.forward(1, 16))
    assert isinstance(verdict, No) and "use recover" in verdict.reason
    with pytest.raises(NarrowsError, match="input_ids: it holds no images"):
        mixing.remember(model, data, silent)


@pytest.mark.claims
@one_thread()
def test_half_the_channels_go_and_what_they_cost_comes_back() -> None:
    images = samples.digits()[0]
    plan = Plan.parse("otov3 + recover:rate=0.01")
    cut, narrow = (deepcopy(m) for m in plan.applied(deepcopy(dense()), [{"input": b} for b in images[:800].split(100)]))
    assert correct(cut) < correct(dense()) - 15
    assert correct(narrow) > correct(dense()) - 3
    some, whole = images[:256], dense()
    with torch.no_grad():
        assert time_ratio(lambda: whole(some), lambda: narrow(some)) >= 2


@pytest.mark.claims
@one_thread()
def test_the_product_of_the_gains_is_near_the_whole_of_a_convolutional_plan() -> None:
    images = samples.digits()[0]
    lessons, held_out = ([{"input": b} for b in images[part].split(100)] for part in (slice(800), slice(8000, 8400)))
    plan = Plan.parse("otov3 + recover:rate=0.01 + int8")
    found = ablation.ablate(dense(), plan, machine("a100-80gb"), 1, 1, lessons, held_out, 5)
    gone, recovered, packed = (one.quality for one in found.alone)
    assert gone < 0.95 and recovered > 1.03 and packed > 0.98
    assert found.products["quality"].interaction == pytest.approx(1, abs=0.02)
    assert found.up_to[-1].speed["forward"] > 1.5


@pytest.mark.claims
@one_thread()
def test_a_trained_network_of_images_comes_nearer_to_what_it_was() -> None:
    """EfficientNet-Lite0 without a tenth of its channels; digits are not what it was made for, but it must answer alike."""
    grey = samples.digits()[0][:40, :, 2:26, 2:26]
    images = torch.nn.functional.interpolate(grey, size=96, mode="bilinear").repeat(1, 3, 1, 1)
    data = [{"inputs": batch} for batch in images.split(8)]
    model = samples.efficientnet()
    before = verify.outputs(model, data[-1])
    plan = Plan.parse("otov3:share=0.1 + recover:rate=0.003,steps=12")
    cut, recovered = (verify.compare([before], [verify.outputs(m, data[-1])])[0] for m in plan.applied(model, data[:-1]))
    assert recovered > cut + 0.1


@pytest.mark.claims
@one_thread()
def test_a_language_model_without_eight_attentions_gets_a_third_of_its_loss_back_from_two_thousand_tokens() -> None:
    model, tokenizer = samples.smollm2()
    prose = samples.text()[1]
    lessons, held_out = (
        samples.token_batches(tokenizer, count, 128, prose=half)
        for count, half in ((16, prose[: len(prose) // 2]), (4, prose[len(prose) // 2 :]))
    )
    whole = verify.perplexity(model, held_out)
    plan = Plan.parse("llm-drop:attention=8 + recover:steps=16")
    cut, recovered = (verify.perplexity(m, held_out) for m in plan.applied(model, lessons[:4], lessons))
    assert cut > 1.3 * whole
    assert cut - recovered > (cut - whole) / 3
