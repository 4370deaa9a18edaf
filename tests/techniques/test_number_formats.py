"""What the techniques that store weights in a number format refuse, keep, and write to files."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from narrows import directory, samples  # noqa: E402
from narrows.capture import capture  # noqa: E402
from narrows.capture.torch import from_module  # noqa: E402
from narrows.errors import NarrowsError  # noqa: E402
from narrows.machine import machine  # noqa: E402
from narrows.modules.coded_linear import CodedLinear  # noqa: E402
from narrows.plan import Plan  # noqa: E402
from narrows.step import Step  # noqa: E402
from narrows.technique import No, technique  # noqa: E402

SLUGS = ["outliertune", "llm-fp4", "zeroquant-4-2-fp6", "fp8-ptq-e5m2-e4m3-e3m4"]
STEP = Step.decode(1, context=16)


@pytest.mark.parametrize("slug", SLUGS)
def test_a_saved_model_gives_the_same_answers_and_takes_the_bytes_of_its_codes(slug, tmp_path):
    model, data = samples.tiny_llama(2, 16)
    plan = Plan.parse(slug)
    changed = plan.apply(model, data)
    directory.save(changed, None, tmp_path / "out", plan)
    loaded, _ = directory.load(tmp_path / "out")
    coded = [m for m in changed.modules() if isinstance(m, CodedLinear)]
    assert len(coded) == 14
    with torch.no_grad():
        assert torch.equal(loaded(**data[0]).logits, changed(**data[0]).logits)
    parts = sum(t.nbytes for m in coded for name, t in m.named_buffers() if name.startswith("bits"))
    assert parts * 8 == coded[0].coding.weights.bits * sum(m.in_features * m.out_features for m in coded)
    file = (tmp_path / "out" / "model.safetensors").stat().st_size
    held = {id(t): t.nbytes for t in (*changed.parameters(), *changed.buffers())}
    assert file < sum(held.values()) + 20_000


@pytest.mark.parametrize("slug", SLUGS)
def test_a_model_that_is_coded_already_is_refused(slug):
    model, data = samples.tiny_llama(1, 16)
    chosen = technique(slug)()
    changed = chosen.apply(model, data)
    verdict = chosen.check(from_module(changed, STEP), None, STEP)
    assert isinstance(verdict, No) and "quantized" in verdict.reason
    with pytest.raises(NarrowsError, match="no plain linear layer"):
        chosen.apply(changed, data)


@pytest.mark.parametrize("slug", SLUGS)
def test_weights_that_are_no_numbers_are_refused_by_name_and_nothing_is_changed(slug):
    model, data = samples.tiny_llama(2, 16)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NarrowsError, match=r"layers\.1\.mlp\.up_proj: weights are NaN"):
        technique(slug)().apply(model, data)
    assert not any(isinstance(m, CodedLinear) for m in model.modules())


@pytest.mark.parametrize("slug", ["outliertune", "llm-fp4", "fp8-ptq-e5m2-e4m3-e3m4"])
def test_without_data_nothing_is_rounded(slug):
    with pytest.raises(NarrowsError, match="calibration data never reached it"):
        technique(slug)().apply(samples.tiny_llama(1, 16)[0], [])


@pytest.mark.parametrize("slug", SLUGS)
def test_machines_where_it_does_not_pay_are_refused_with_the_figure(slug):
    graph, step = capture("llama-3.2-1b"), Step.prefill(1, 512)
    verdict = technique(slug)().check(graph, machine("xeon-amx"), step)
    assert isinstance(verdict, No) and any(c.isdigit() for c in verdict.reason)
    assert technique(slug)().check(graph, machine("h100-sxm"), step) is True


def test_integers_pay_on_a_cpu_for_large_layers_and_few_rows():
    chosen = technique("outliertune")()
    large, small = capture("llama-2-7b"), capture("smollm2-135m")
    assert chosen.check(large, machine("xeon-amx"), Step.decode(8, 128)) is True
    assert "too small" in chosen.check(small, machine("xeon-amx"), Step.decode(8, 128)).reason
    assert "65 rows" in chosen.check(large, machine("xeon-amx"), Step.decode(65, 128)).reason


def test_a_group_that_does_not_divide_is_refused():
    verdict = technique("llm-fp4")(group=48).check(capture("llama-3.2-1b"), None, STEP)
    assert isinstance(verdict, No) and "no multiple of group=48" in verdict.reason
