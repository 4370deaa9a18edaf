"""Codes of any number format hold the bytes they say, are the nearest of their format, and compute what the reference does."""

import pytest

torch = pytest.importorskip("torch")

from dataclasses import replace  # noqa: E402

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from narrows.capture.torch import from_module  # noqa: E402
from narrows.errors import NarrowsError  # noqa: E402
from narrows.graph import FP32  # noqa: E402
from narrows.modules.coded_linear import CodedLinear, encoded, rounded, table  # noqa: E402
from narrows.modules.number_formats import Coding, NumberFormat  # noqa: E402
from narrows.step import Step  # noqa: E402

FLOATS = ["e5m2", "e4m3", "e3m4", "e3m2", "e2m3", "e2m1", "e1m2", "e3m0"]
NAMES = [*FLOATS, *(f"int{bits}" for bits in range(2, 9))]
LARGEST = {"e5m2": 57344, "e4m3": 448, "e3m4": 30, "e3m2": 28, "e2m3": 7.5, "e2m1": 6, "int4": 7, "int8": 127}
INT8, FP8, FP4 = (NumberFormat.parse(name) for name in ("int8", "e4m3", "e2m1"))
ROUNDING = [
    Coding(INT8, inputs=INT8, per="channel", folded=True, zero=True),
    Coding(NumberFormat.parse("int6"), inputs=NumberFormat.parse("int6"), per="channel", folded=True, zero=True),
    Coding(INT8, inputs=INT8, zero=True),
    Coding(INT8, inputs=INT8, per="token"),
    Coding(FP8, inputs=FP8),
    Coding(FP4, 32, inputs=FP4, per="channel"),
]


def weight(outputs=24, inputs=64):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs)) * 0.02


@pytest.mark.parametrize("name", NAMES)
def test_every_code_comes_back(name):
    form = NumberFormat.parse(name)
    values = table(form)
    values = values[values.isfinite() & (values.abs() <= form.largest)]
    assert str(form) == name and float(values.max()) == form.largest == LARGEST.get(name, form.largest)
    assert torch.equal(table(form)[encoded(values, form).long()], values)
    assert torch.equal(rounded(values, form), values)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_rounding_finds_the_nearest(name, seed, size):
    form = NumberFormat.parse(name)
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * size
    values = table(form)
    values = values[values.abs() <= form.largest]
    nearest = (x[:, None] - values).abs().amin(1)
    torch.testing.assert_close((x - rounded(x, form)).abs(), nearest)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_weights_alone_give_what_the_reference_gives(name, group, dtype, close):
    layer = CodedLinear.of(weight(), torch.arange(24.0), Coding(NumberFormat.parse(name), group)).to(dtype)
    x = torch.randn(2, 3, 64).to(dtype)
    expected = x.double() @ layer.weight().double().T + layer.bias.double()
    assert (layer(x) - expected).norm() <= close * expected.norm()
    assert layer.resident_bytes - layer.bias.nbytes == layer.coding.stored.bytes(24 * 64, 64)


@pytest.mark.parametrize("coding", ROUNDING)
def test_rounded_inputs_are_close_to_plain_ones_and_exact_to_the_reference(coding):
    plain, x = weight(), torch.randn(40, 64) + 3
    size = 64 if coding.per == "channel" else 1
    fixed = {} if coding.per == "token" else {"input_scale": torch.full((size,), 8 / coding.inputs.largest)}
    layer = CodedLinear.of(plain, None, coding, **fixed, input_zero=torch.full((size,), 3.0))
    q, scale = layer.rounded_inputs(x)
    expected = q.double() @ layer.weight().double().T * (1 if scale is None else scale)
    expected = expected if layer.bias is None else expected + layer.bias
    torch.testing.assert_close(layer(x), expected.float(), rtol=1e-5, atol=1e-6)
    assert (layer(x) - x @ plain.T).norm() < (0.3 if coding.weights.bits == 4 else 0.1) * (x @ plain.T).norm()


def test_a_change_of_dtype_leaves_codes_and_scales():
    layer = CodedLinear.of(weight(), None, ROUNDING[0], input_scale=torch.rand(64), input_zero=torch.rand(64))
    before = {name: t.clone() for name, t in layer.named_buffers()}
    after = dict(layer.to(torch.float16).to(torch.bfloat16).named_buffers())
    assert all(torch.equal(t, after[name]) for name, t in before.items()) and {"bits8", "input_scale", "input_zero"} <= set(after)


def test_rows_of_zeros_stay_zeros():
    assert not CodedLinear.of(torch.zeros(2, 32), None, Coding(FP8))(torch.ones(1, 32)).any()


def test_gradients_reach_the_input():
    layer, x = CodedLinear.of(weight(), None, Coding(FP8)), torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[0], layer.weight().sum(0), rtol=1e-4, atol=1e-6)


def test_capture_sees_one_op_without_memory():
    coding = Coding(FP8, inputs=FP8)
    layer = CodedLinear(4096, 4096, coding, device="meta")
    (op,) = from_module(layer, Step.forward(1, 5), torch.empty(1, 5, 4096)).find("linear")
    assert (op["inputs"], op["outputs"], op.weight, op.compute) == (4096, 4096, coding.stored, "fp8")
    assert replace(layer.graph_op("x", 5, FP32), act=op.act).weight_bytes == layer.resident_bytes - 2  # the inputs' scale


@pytest.mark.parametrize("name", ["int1", "int9", "e0m3", "e4m4", "fp8", "e5", ""])
def test_what_is_no_format_is_refused(name):
    with pytest.raises(NarrowsError, match="no number format of 2 to 8 bits"):
        NumberFormat.parse(name)


@pytest.mark.parametrize("name, group, inputs", [("int4", 0, 63), ("e3m2", 0, 66), ("int5", 0, 60), ("int8", 48, 64)])
def test_rows_that_do_not_pack_are_refused(name, group, inputs):
    with pytest.raises(NarrowsError, match=rf"{inputs} inputs"):
        CodedLinear(inputs, 8, Coding(NumberFormat.parse(name), group))
