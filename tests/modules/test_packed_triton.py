"""The kernels for CUDA against the plain arithmetic, under Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

from narrows.graph import DType
from narrows.modules.packed_linear import PackedLinear, int4, int8, quantized

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is loaded
pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter multiplies the bits of bf16 numbers as integers
DTYPES = {torch.float32: 1e-6, torch.float16: 1e-3, **({torch.bfloat16: 8e-3} if DEVICE == "cuda" else {})}
FORMS = [(64, 128, int4(32)), (96, 192, int4(64)), (128, 256, int4(128)), (576, 192, int8()), (50, 72, int8())]


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
