"""Eight-bit moments and activations: what is kept, shared, saved and refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from narrows.backward import training
from narrows.capture.torch import from_module
from narrows.errors import NarrowsError
from narrows.experiments.coat import WIDTH, Block, Made
from narrows.footprint import footprint
from narrows.modules.fp8_training import E4M3, Fp8Linear, packed
from narrows.step import Step
from narrows.techniques.quantization.coat import COAT


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


@given(st.integers(0, 2**16), st.floats(-30, 10), st.floats(0.1, 3), st.booleans())
def test_packed_numbers_are_near(seed: int, size: float, spread: float, expand: bool) -> None:
    """Large numbers within half of a step; below the format's range some are lost, but none where the range is stretched."""
    x = torch.randn(300, generator=torch.Generator().manual_seed(seed))
    x = x.sign() * x.abs() ** spread * 2.0**size
    back = packed(x, 64, expand).numbers()
    assert back.shape == x.shape
    largest = nn.functional.pad(x, (0, 20)).view(-1, 64).abs().amax(1).repeat_interleave(64)[:300]
    large = x.abs() > largest / 16
    assert ((back - x).abs() <= 0.15 * x.abs())[large].all()
    assert (back * x >= 0).all()
    if expand:
        assert (back != 0).all()


def test_zeros_and_equal_numbers_come_back() -> None:
    x = torch.cat([torch.zeros(64), torch.full((64,), -0.25)])
    assert torch.equal(packed(x, 64, expand=True).numbers(), x)


def test_layers_that_read_one_tensor_share_what_is_kept() -> None:
    first, second = (Fp8Linear(nn.Linear(32, 8)) for _ in range(2))
    x = torch.randn(4, 32)
    kept = [layer(x).grad_fn.next_functions[0][0].saved_tensors[0] for layer in (first, second)]
    assert kept[0].data_ptr() == kept[1].data_ptr()
    assert kept[0].dtype == E4M3
    x += 1  # what was kept is of no use any more
    assert first(x).grad_fn.next_functions[0][0].saved_tensors[0].data_ptr() != kept[0].data_ptr()


def test_gradients_are_near_those_in_fp32() -> None:
    plain, ours = network(), network()
    COAT().attach(ours)
    x = torch.randn(64, 32)
    for model in (plain, ours):
        model(x).square().mean().backward()
    for ours_, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert float((ours_.grad - theirs.grad).norm() / theirs.grad.norm()) < 0.1


def test_a_run_goes_on_from_its_saved_state_bit_by_bit() -> None:
    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            model(torch.randn(16, 32, generator=torch.Generator().manual_seed(seed)).bfloat16()).square().mean().backward()
            optimizer.step()

    whole, half, resumed = (network().bfloat16() for _ in range(3))
    first, second, third = (COAT().attach(model, lr=1e-2) for model in (whole, half, resumed))
    steps(whole, first, range(6))
    steps(half, second, range(3))
    resumed.load_state_dict(half.state_dict())
    third.load_state_dict(second.state_dict())
    steps(resumed, third, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert {t.dtype for t in third.state[resumed[1].weight].values() if isinstance(t, torch.Tensor)} >= {E4M3, torch.float32}


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(NarrowsError, match="no plain linear layer"):
        COAT().attach(nn.Sequential(nn.Conv2d(1, 2, 3)))


def test_what_is_forecast_to_be_kept_is_kept() -> None:
    """Saved activations and optimizer states, in bytes, against those of a network of two blocks."""
    rows = 256
    network, x = nn.Sequential(Block(), Block(), nn.LayerNorm(WIDTH)).bfloat16(), torch.randn(rows, WIDTH).bfloat16()
    graph, step = training(from_module(network, Step.train(rows, 1))), Step.train(rows, 1)
    forecast = footprint(COAT().rewrite(graph), step)
    assert forecast.activation_bytes < 0.6 * footprint(graph, step).activation_bytes
    optimizer = COAT().attach(network)
    with Made((*network.parameters(), x)) as made:
        y = network(x)
    assert made.alive - y.nbytes == pytest.approx(forecast.activation_bytes, rel=0.02)
    y.sum().backward()
    optimizer.step()
    states = sum(t.nbytes for one in optimizer.state.values() for t in one.values() if isinstance(t, torch.Tensor))
    assert states == pytest.approx(forecast.optimizer_bytes, rel=0.01)
