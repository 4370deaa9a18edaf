"""Every execution of a matrix of codes gives the product with its plain reference, and its codes take the bits they say."""

import pytest

torch = pytest.importorskip("torch")

from dataclasses import replace  # noqa: E402

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from narrows.errors import NarrowsError  # noqa: E402
from narrows.modules import coded_matrix  # noqa: E402
from narrows.modules.coded_matrix import CodedMatrix, joined, kernels, packed_trits, segments, unpacked_trits  # noqa: E402

needs_compiler = pytest.mark.skipif(kernels() is None, reason="no C compiler")
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@st.composite
def matrices(draw) -> CodedMatrix:
    bits, planes = draw(st.integers(0, 8)), draw(st.integers(1, 3))
    outputs, inputs = 8 * draw(st.integers(1, 5)), 8 * draw(st.integers(1, 45))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    count = 2**bits if bits else 3
    codes = torch.randint(count, (planes, outputs, inputs), generator=generator, dtype=torch.uint8)
    table = torch.randn(draw(st.sampled_from((1, outputs // 8))), count, generator=generator).bfloat16().view(torch.int16)
    rows, group = draw(st.sampled_from((1, 8, outputs))), draw(st.sampled_from((1, 8, inputs // 8, inputs)))
    shape = (planes, outputs // rows, inputs // group)
    scales = draw(st.sampled_from(("none", "plain", "powers")))
    kept = {
        "none": None,
        "plain": (torch.rand(shape, generator=generator) + 0.1).bfloat16().view(torch.int16),
        "powers": (
            torch.randint(58, 66, shape) * torch.tensor([1, -1]).view(2, 1, 1, 1) + torch.tensor([0, 9]).view(2, 1, 1, 1)
        ).to(torch.int8),
    }[scales]
    parts = tuple(segments(codes, bits).values()) if bits else (packed_trits(codes),)
    return CodedMatrix(outputs, inputs, parts, bits, table, kept)


def product(matrix: CodedMatrix, x: "torch.Tensor") -> "torch.Tensor":
    return x.double() @ matrix.rows().to(x.dtype).double().T


@settings(max_examples=60, deadline=None)
@given(matrices(), st.integers(1, 20), st.sampled_from(list(CLOSE)))
def test_every_execution_gives_the_product_with_the_plain_reference(matrix, rows, dtype):
    x = torch.randn(rows, matrix.inputs).to(dtype)
    expected, found = product(matrix, x), matrix.multiply(x)
    assert found.dtype == dtype and (found - expected).norm() <= CLOSE[dtype] * expected.norm() + 1e-12


@needs_compiler
@settings(max_examples=30, deadline=None)
@given(matrices(), st.integers(1, 20))
def test_codes_read_one_by_one_give_the_same(matrix, rows):
    """What CPUs without AVX-512 VBMI run."""
    x, plain = torch.randn(rows, matrix.inputs), coded_matrix.kernels
    try:
        coded_matrix.kernels = lambda: plain("-DONE_BY_ONE")
        assert coded_matrix.kernels().codes_at_once() == 1
        expected, found = product(matrix, x), matrix.multiply(x)
    finally:
        coded_matrix.kernels = plain
    assert (found - expected).norm() <= 1e-6 * expected.norm() + 1e-12


@needs_compiler
@settings(max_examples=30, deadline=None)
@given(matrices(), st.data())
def test_decoded_rows_are_those_of_the_reference(matrix, data):
    first = data.draw(st.integers(0, matrix.outputs - 1))
    last = data.draw(st.integers(first + 1, matrix.outputs))
    for dtype in CLOSE:
        found = matrix.decoded(first, last, dtype)
        torch.testing.assert_close(found, matrix.rows(first, last).to(dtype), rtol=CLOSE[dtype], atol=1e-6)


@pytest.mark.parametrize("rows", [3, 40])
def test_threads_and_a_missing_compiler_change_nothing_that_can_be_seen(rows, monkeypatch):
    codes = torch.randint(0, 16, (1, 64, 128), dtype=torch.uint8)
    table, scales = torch.randn(1, 16).bfloat16().view(torch.int16), torch.rand(1, 64, 2).bfloat16().view(torch.int16)
    matrix, x = CodedMatrix(64, 128, tuple(segments(codes, 4).values()), 4, table, scales), torch.randn(rows, 128)
    alone = matrix.multiply(x)
    monkeypatch.setattr(coded_matrix, "PART", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(matrix.multiply(x), alone)
    monkeypatch.setattr(coded_matrix, "kernels", lambda: None)
    torch.testing.assert_close(matrix.multiply(x), alone)


def test_parts_that_do_not_fit_are_refused():
    table, codes = torch.zeros(1, 16, dtype=torch.int16), torch.zeros(1, 64, 64, dtype=torch.uint8)
    CodedMatrix(64, 128, (codes,), 4, table, torch.zeros(1, 64, 2, dtype=torch.int16))
    for scales, part in (
        (torch.zeros(1, 128, 2), codes),
        (torch.zeros(1, 64, 3), codes),
        (None, codes[:, ::2]),
        (None, codes.mT),
    ):
        with pytest.raises(NarrowsError, match="none of a matrix of 64 x 128"):
            CodedMatrix(64, 128, (part,), 4, table, scales)


def test_torch_compiles_what_it_can_look_into():
    codes = torch.randint(0, 3, (1, 24, 40), dtype=torch.uint8)
    matrix = CodedMatrix(24, 40, (packed_trits(codes),), 0, torch.randn(1, 3).bfloat16().view(torch.int16), None)
    x = torch.randn(3, 40)
    found = torch.compile(matrix.multiply, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(found, matrix.multiply(x))


def test_gradients_reach_the_input():
    table = torch.tensor([[-1.0, 0.0, 1.0]]).bfloat16().view(torch.int16)
    matrix = CodedMatrix(24, 40, (packed_trits(torch.randint(0, 3, (1, 24, 40))),), 0, table, None)
    x = torch.randn(5, 40, requires_grad=True)
    matrix.multiply(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * (x.detach() @ matrix.rows().T) @ matrix.rows(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", range(1, 9))
def test_segments_join_again_and_take_the_bits_they_say(bits):
    codes = torch.arange(5 * 64).view(5, 64).mul(37).remainder(2**bits).to(torch.uint8)
    parts = tuple(segments(codes, bits).values())
    assert torch.equal(joined(parts, bits), codes)
    assert sum(part.numel() for part in parts) * 8 == bits * codes.numel()


def test_six_bits_are_four_of_sign_and_exponent_and_two_of_fraction():
    parts = segments(torch.tensor([[0b101101, 0b010010, 0, 0b111111]], dtype=torch.uint8), 6)
    assert parts[4].tolist() == [[0b0100_1011, 0b1111_0000]] and parts[2].tolist() == [[0b11_00_10_01]]


@pytest.mark.parametrize("inputs", [1, 5, 64, 576])
def test_trits_come_back_and_take_a_byte_for_five(inputs):
    codes = torch.randint(0, 3, (2, 7, inputs), dtype=torch.uint8)
    packed = packed_trits(codes)
    assert torch.equal(unpacked_trits(packed, inputs), codes) and packed.shape == (2, 7, -(-inputs // 5))


def test_a_matrix_is_what_its_parts_say():
    """W[n, k] = sum over p of scale[p, n // r, k // g] x table[n // t, code[p, n, k]], written out."""
    codes = torch.randint(0, 4, (2, 8, 16), dtype=torch.uint8)
    table, scales = torch.randn(4, 4).bfloat16(), torch.rand(2, 4, 2).bfloat16()
    parts = tuple(segments(codes, 2).values())
    matrix = CodedMatrix(8, 16, parts, 2, table.view(torch.int16), scales.view(torch.int16))
    for n, k in ((0, 0), (3, 9), (7, 15)):
        expected = sum(float(scales[p, n // 2, k // 8]) * float(table[n // 2, int(codes[p, n, k])]) for p in range(2))
        assert float(matrix.rows()[n, k]) == pytest.approx(expected, rel=1e-6)
    powers = torch.tensor([-65, 0, 64, 3], dtype=torch.int8).view(2, 1, 1, 2)  # -2 + 1, and 0 + 2 ** -61
    found = replace(matrix, codes=tuple(part[:1] for part in parts), scales=powers).scale()
    assert found is not None and found.flatten().tolist() == [-1.0, 2.0**-61]
