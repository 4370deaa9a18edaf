"""Low-rank branches beside layers in few bits: rounding by token, what a branch leaves, training that starts where it was."""

from pathlib import Path

import pytest
import torch
from torch import nn

from narrows import samples
from narrows.capture.torch import from_module
from narrows.directory import load, save
from narrows.errors import NarrowsError
from narrows.graph import FP32
from narrows.machine import machine
from narrows.modules.branch import RoundedLinear, rounded_by_group
from narrows.plan import Plan
from narrows.step import Step
from narrows.technique import No, Rewrites
from narrows.techniques.quantization.int2_1_emef_lrec import INT2
from narrows.techniques.quantization.ptqtp import PTQTP
from narrows.techniques.quantization.shiftaddllm import ShiftAddLLM
from narrows.techniques.quantization.svdquant_nunchaku import SVDQuant


def test_inputs_become_fifteen_levels_a_group() -> None:
    x = torch.randn(7, 64)
    rounded = rounded_by_group(x, 32).view(7, 2, 32)
    scale = x.view(7, 2, 32).abs().amax(-1, keepdim=True) / 7
    levels = rounded / scale
    torch.testing.assert_close(levels, levels.round())
    assert float((levels.abs()).max()) == pytest.approx(7)
    assert float(((rounded - x.view(7, 2, 32)).abs() / scale).max()) <= 0.5 + 1e-5
    assert not rounded_by_group(torch.zeros(1, 32), 32).any()


def test_a_rounded_layer_multiplies_rounded_inputs() -> None:
    torch.manual_seed(0)
    weight, bias, smooth = torch.randn(6, 64), torch.randn(6), torch.full((64,), 0.5)
    layer = RoundedLinear.of(weight, bias, smooth, 32)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), rounded_by_group(x / 2, 32) @ layer.coded.weight().T + bias)
    assert layer.graph_op("a", 3, FP32).compute == "int4"


def test_a_branch_takes_up_what_outliers_cost() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(128, 96).requires_grad_(False)
    x = torch.randn(64, 128) * torch.cat((torch.full((4,), 30.0), torch.ones(124)))
    with torch.no_grad():
        errors = [float((SVDQuant(rank=r, group=32).replaced(plain, x)(x) - plain(x)).square().sum()) for r in (0, 8, 32)]
    assert errors[2] < errors[1] < errors[0]


def test_training_lowers_the_distance_to_the_plain_model() -> None:
    model, data = samples.tiny_llama(2, 32)

    def distance(steps: int) -> float:
        changed = INT2(rank=8, group=32, steps=steps, rate=5e-3).apply(samples.tiny_llama(2, 32)[0].eval(), data)
        with torch.no_grad():
            return float(sum((changed(**b).logits - model.eval()(**b).logits).square().sum() for b in data))

    assert distance(20) < 0.9 * distance(0)


@pytest.mark.parametrize("technique", [SVDQuant(rank=4, group=32), INT2(rank=4, group=32)], ids=["svdquant", "int2"])
def test_they_refuse_without_data_and_where_plain_weights_fit(technique: SVDQuant | INT2) -> None:
    model, _ = samples.tiny_llama(1, 8)
    with pytest.raises(NarrowsError, match="calibration data"):
        technique.apply(model, [])
    graph = from_module(model, Step.prefill(1, 8))
    verdict = technique.check(graph, machine("rtx-4090"), Step.prefill(1, 8))
    assert isinstance(verdict, No) and "fit the memory" in verdict.reason
    assert technique.check(graph, None, Step.prefill(1, 8)) is True


@pytest.mark.parametrize(
    "technique",
    [SVDQuant(rank=4, group=32), INT2(rank=4, group=32, steps=2), PTQTP(group=32), ShiftAddLLM(group=16)],
    ids=lambda t: t.card.slug,
)
def test_a_saved_model_comes_back_the_same(technique: Rewrites, tmp_path: Path) -> None:
    model, data = samples.tiny_llama(1, 16)
    plan = Plan((technique,))
    changed = plan.apply(model.eval(), data)
    save(changed, None, tmp_path / "saved", plan)
    again, _ = load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(**data[0]).logits, changed(**data[0]).logits)
