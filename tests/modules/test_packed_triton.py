"""The kernels for CUDA against the plain arithmetic, under Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

from narrows.graph import DType
from narrows.modules.coded_matrix import CodedMatrix, packed_trits, segments
from narrows.modules.packed_linear import PackedLinear, int4, int8, quantized

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is loaded
pytest.importorskip("triton", reason="Triton is not installed")
from narrows.modules.packed_triton import multiply_coded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter multiplies the bits of bf16 numbers as integers
DTYPES = {torch.float32: 1e-6, torch.float16: 1e-3, **({torch.bfloat16: 8e-3} if DEVICE == "cuda" else {})}
FORMS = [(64, 128, int4(32)), (96, 192, int4(64)), (128, 256, int4(128)), (576, 192, int8()), (50, 72, int8())]
# bits (0: trits), planes, tables, and outputs and inputs that share a scale of how many powers (0: bf16)
MATRICES = [(8, 1, 1, (1, 104, 0)), (6, 1, 1, (1, 8, 0)), (5, 1, 9, (0, 0, 0)), (4, 2, 1, (1, 104, 0)), (3, 1, 1, (8, 1, 0)),
            (2, 1, 9, (0, 0, 0)), (1, 3, 1, (8, 1, 2)), (0, 2, 1, (1, 8, 0)), (7, 1, 1, (1, 104, 0))]  # fmt: skip


@pytest.mark.parametrize("rows", [1, 17, 70])
@pytest.mark.parametrize("outputs, inputs, form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernel_gives_the_product_with_the_unpacked_weight(
    rows: int, outputs: int, inputs: int, form: DType, dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(0)
    layer = PackedLinear.of(quantized(torch.randn(outputs, inputs, generator=draw) / 8, form)).to(DEVICE)
    x = torch.randn(rows, inputs, generator=draw).to(DEVICE, dtype)
    assert layer.on_cuda(dtype)
    wanted = x.double() @ layer.codes.weight(dtype).double().T
    assert (layer._cuda(x).double() - wanted).abs().max() <= DTYPES[dtype] * wanted.abs().max()


def test_layouts_of_too_few_rows_are_left_to_the_plain_product() -> None:
    assert not PackedLinear(64, 6, int4(32)).on_cuda(torch.float16)
    assert not PackedLinear(72, 64, int4(72)).on_cuda(torch.float16)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("bits, planes, tables, scaled", MATRICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_kernel_reads_codes_of_any_width(
    rows: int, bits: int, planes: int, tables: int, scaled: tuple[int, int, int], dtype: torch.dtype
) -> None:
    outputs, inputs, draw = 72, 104, torch.Generator().manual_seed(bits)
    count = 2**bits if bits else 3
    codes = torch.randint(count, (planes, outputs, inputs), generator=draw, dtype=torch.uint8)
    table = torch.randn(tables, count, generator=draw).bfloat16().view(torch.int16)
    by, group, powers = scaled
    shape = (planes, outputs // by, inputs // group) if group else ()
    scales = (torch.rand(shape, generator=draw) + 0.1).bfloat16().view(torch.int16) if group else None
    if powers:
        scales = torch.randint(-66, -58, (powers, *shape), generator=draw).to(torch.int8)
    parts = tuple(t.to(DEVICE) for t in (segments(codes, bits).values() if bits else [packed_trits(codes)]))
    matrix = CodedMatrix(outputs, inputs, parts, bits, table.to(DEVICE), None if scales is None else scales.to(DEVICE))
    x = torch.randn(rows, inputs, generator=draw).to(DEVICE, dtype)
    wanted = x.double() @ matrix.rows().to(dtype).double().T
    assert (multiply_coded(x, matrix).double() - wanted).abs().max() <= DTYPES[dtype] * wanted.abs().max()
