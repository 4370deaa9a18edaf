"""A packed layer holds the bytes it says, and computes what its plain reference computes."""

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from narrows.capture.torch import from_module  # noqa: E402
from narrows.errors import NarrowsError  # noqa: E402
from narrows.graph import FP32  # noqa: E402
from narrows.modules.packed_linear import PackedLinear, int4, int8, native_block, quantized, requantized  # noqa: E402
from narrows.step import Step  # noqa: E402

SIZES = [(192, 576, int4(64)), (64, 128, int4(128)), (50, 96, int4(32)), (6, 32, int4(32)), (64, 64, int8()), (77, 50, int8())]
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 3e-3}


def layer(outputs, inputs, form, bias=True):
    torch.manual_seed(outputs)
    weight = torch.randn(outputs, inputs) * 0.02
    return weight, PackedLinear.of(quantized(weight, form), torch.randn(outputs) if bias else None)


@pytest.mark.parametrize("outputs, inputs, form", SIZES)
def test_resident_bytes_are_those_of_the_format(outputs, inputs, form):
    assert layer(outputs, inputs, form, bias=False)[1].resident_bytes == form.bytes(outputs * inputs, inputs)


@pytest.mark.parametrize("outputs, inputs, form", SIZES)
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("rows", [1, 3, 64, 65, 130])
def test_every_kernel_gives_what_the_plain_reference_gives(outputs, inputs, form, dtype, rows):
    packed = layer(outputs, inputs, form)[1].to(dtype)
    x = torch.randn(2, rows, inputs)[:1].to(dtype)
    expected = F.linear(x.double(), packed.codes.weight(torch.float64), packed.bias.double())
    with torch.no_grad():
        found = packed(x)
    assert found.dtype == dtype and found.shape == expected.shape
    assert (found - expected).norm() <= CLOSE[dtype] * expected.norm()


@pytest.mark.parametrize("outputs, inputs, form", SIZES)
def test_integers_come_back_exactly_and_survive_a_change_of_dtype(outputs, inputs, form):
    weight, packed = layer(outputs, inputs, form)
    codes, back = quantized(weight, form), packed.to(torch.float16).to(torch.bfloat16).codes
    assert all(torch.equal(getattr(codes, f), getattr(back, f)) for f in ("codes", "scale", "zero"))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(codes.scale.to(dtype).float(), codes.scale)
    assert torch.equal(requantized(weight, form), codes.weight())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-6, 1e3), st.floats(-2, 2))
def test_rounding_errs_by_less_than_a_step(seed, size, offset):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(4, 64, generator=generator) + offset) * size
    codes = quantized(weight, int4(32))
    off = (codes.weight() - weight).abs().view(4, 2, 32) / codes.scale[..., None]
    assert off.max() <= 1.3  # half a step, and the range's end where the scale was rounded down or the zero moved


def test_two_rows_of_zeros_stay_zeros():
    assert not quantized(torch.zeros(2, 32), int4(32)).weight().any()


def test_gradients_reach_the_input():
    _, packed = layer(64, 64, int4(64))
    x = torch.randn(3, 64, requires_grad=True)
    packed(x).sum().backward()
    assert torch.allclose(x.grad[0], packed.codes.weight().sum(0), atol=1e-5)


def test_capture_sees_one_op_without_memory():
    packed = PackedLinear(4096, 4096, int4(128), device="meta")
    (op,) = from_module(packed, Step.forward(1, 5), torch.empty(1, 5, 4096)).find("linear")
    assert (op["inputs"], op["outputs"], op.weight) == (4096, 4096, int4(128))
    assert packed.graph_op("x", 5, FP32).weight_bytes == packed.resident_bytes


@pytest.mark.parametrize("inputs, outputs, form", [(96, 64, int4(64)), (64, 7, int4(64))])
def test_sizes_that_do_not_pack_are_refused(inputs, outputs, form):
    with pytest.raises(NarrowsError, match="do not pack"):
        PackedLinear(inputs, outputs, form)


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(NarrowsError, match="96 inputs are no multiple of the group 64"):
        quantized(torch.zeros(2, 96), int4(64))


def test_layout_is_recognised_or_not_used():
    assert native_block() in (0, 32, 64)
