"""Compensated rounding: errors cancel where inputs go together, and nothing is changed where they do not."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from narrows.errors import NarrowsError  # noqa: E402
from narrows.modules import compensated as module  # noqa: E402
from narrows.modules.compensated import compensated, least_harm_shrinks, moments  # noqa: E402
from narrows.modules.packed_linear import int4, quantized  # noqa: E402

GROUP = int4(32)


def test_errors_cancel_where_inputs_go_together():
    torch.manual_seed(0)
    x, weight = torch.randn(256, 8) @ torch.randn(8, 128) + 0.3 * torch.randn(256, 128), torch.randn(40, 128)
    off = [(x @ (codes.weight() - weight).T).norm() for codes in (quantized(weight, GROUP), compensated(weight, GROUP, x.T @ x))]
    assert off[1] < 0.5 * off[0]


def test_inputs_that_never_go_together_are_rounded_to_nearest():
    torch.manual_seed(0)
    weight, gram = torch.randn(40, 128), torch.diag(torch.rand(128) + 0.1)
    blocks = torch.stack([gram[i : i + 32, i : i + 32] for i in range(0, 128, 32)])
    nearest, found = quantized(weight, GROUP, least_harm_shrinks(weight, GROUP, blocks)), compensated(weight, GROUP, gram)
    assert all(torch.equal(getattr(nearest, part), getattr(found, part)) for part in ("codes", "scale", "zero"))


def test_outputs_are_rounded_on_their_own(monkeypatch):
    torch.manual_seed(0)
    x, weight = torch.randn(64, 64) @ torch.randn(64, 64), torch.randn(24, 64)
    whole = compensated(weight, GROUP, x.T @ x)
    monkeypatch.setattr(module, "ROWS", 5)
    assert (whole.codes.int() - compensated(weight, GROUP, x.T @ x).codes.int()).abs().sum() <= 1  # a sum in another order


def test_an_input_that_is_always_zero_is_no_trouble():
    weight, x = torch.randn(8, 64), torch.randn(32, 64)
    x[:, 3] = 0
    assert compensated(weight, GROUP, x.T @ x).weight().isfinite().all()


def test_moments_are_those_of_what_each_layer_reads_however_few_are_held(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    data = [{"input": torch.randn(2, 5, 6)} for _ in range(3)]
    layers = {"0": model[0], "2": model[2]}
    rows = torch.cat([batch["input"].flatten(0, 1) for batch in data])
    expected = {"0": rows, "2": model[1](model[0](rows)).detach()}
    for held in (2**27, 1):
        monkeypatch.setattr(module, "MOMENT_BYTES", held)
        found = dict(moments(model, layers, data))
        assert list(found) == ["0", "2"]
        assert all(torch.allclose(found[name], x.T @ x, rtol=1e-4) for name, x in expected.items())
    with pytest.raises(NarrowsError, match=r"2: no calibration data"):
        dict(moments(nn.Sequential(model[0]), {"2": model[2]}, data))
