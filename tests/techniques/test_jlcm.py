"""Codebooks: packed exactly, never worse for learning, saved and loaded, refused where they do not fit."""

import pytest
import torch

from narrows import samples
from narrows.capture.torch import from_module
from narrows.directory import load, save
from narrows.errors import NarrowsError
from narrows.modules.codebook_linear import CodebookLinear, clustered, learned
from narrows.plan import Plan
from narrows.step import Step
from narrows.technique import No
from narrows.techniques.low_rank_codebook_sharing.jlcm import JLCM


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_layer_is_its_codebooks_and_takes_the_bytes_of_its_format(bits):
    torch.manual_seed(0)
    weight, technique = torch.randn(64, 40) * torch.rand(64, 1), JLCM(bits=bits)
    found = clustered(weight, bits, 32)
    layer = CodebookLinear.of(found, technique.form)
    kept = layer.codebooks
    assert torch.equal(kept.codes, found.codes) and torch.equal(kept.order, found.order)
    torch.testing.assert_close(kept.weight(), found.weight(), rtol=2**-8, atol=0)
    x = torch.randn(3, 40)
    torch.testing.assert_close(layer(x), x @ kept.weight().T)
    assert sum(b.nbytes for b in layer.buffers()) == technique.form.bytes(weight.numel(), 40)


def test_learning_is_never_worse_and_similar_neurons_share():
    torch.manual_seed(0)
    weight, x = (
        torch.randn(96, 48) * torch.logspace(-1, 1, 96)[torch.randperm(96), None],
        torch.randn(200, 48) @ torch.randn(48, 48),
    )
    moments = x.T @ x / len(x)

    def error(found):
        off = found.weight() - weight
        return float(((off @ moments) * off).sum())

    single, grouped = (clustered(weight, 2, rows) for rows in (0, 32))
    assert error(grouped) < 0.8 * error(single)
    better, same = learned(grouped, weight, moments, 30), learned(grouped, weight, moments, 0)
    assert error(better) < 0.9 * error(grouped)
    assert error(same) == pytest.approx(error(grouped))


def test_a_saved_plan_comes_back(tmp_path):
    model, data = samples.tiny_llama(2, 16)
    plan = Plan((JLCM(rows=16),))
    changed = plan.apply(model.eval(), data)
    save(changed, None, tmp_path / "out", plan)
    again, _ = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(changed(**data[0]).logits, again(**data[0]).logits)


def test_what_does_not_pack_is_refused():
    model, data = samples.tiny_llama(2, 16)
    step = Step.forward(2, 16)
    verdict = JLCM(rows=32).check(from_module(model, step), None, step)
    assert isinstance(verdict, No) and "rows=32" in verdict.reason
    with pytest.raises(NarrowsError, match="rows=32"):
        JLCM(rows=32).apply(model, data)
    with pytest.raises(NarrowsError, match="calibration"):
        JLCM(rows=16).apply(model, [])
    for wrong in ({"bits": 5}, {"rows": 48}, {"steps": -1}):
        with pytest.raises(NarrowsError, match="jlcm"):
            JLCM(**wrong)
