"""The sparse layer against the matrix it stands for, for any shape and number of threads."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from narrows.errors import NarrowsError
from narrows.graph import FP32
from narrows.modules.sparse_linear import SparseLinear


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 150), st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.integers(0, 99), st.booleans())
def test_outputs_and_gradients_are_those_of_the_matrix(
    rows: int, inputs: int, outputs: int, parts: int, percent: int, bias: bool
) -> None:
    torch.manual_seed(rows)
    torch.set_num_threads(parts)
    linear = nn.Linear(inputs, outputs, bias)
    many = max(1, inputs * outputs * percent // 100)
    sparse = SparseLinear.of(linear, many)
    mask = sparse.weight != 0
    assert mask.sum() == many
    assert torch.equal(sparse.weight[mask], linear.weight[mask])
    assert linear.weight[~mask].abs().max() <= linear.weight[mask].abs().min() if many < mask.numel() else True
    linear.weight.data = sparse.weight
    x = torch.randn(rows, inputs, requires_grad=True)
    dense, found = linear(x), sparse(x)
    torch.testing.assert_close(found, dense)
    dy = torch.randn_like(dense)
    dx, dweight, *rest = torch.autograd.grad(dense, (x, *linear.parameters()), dy)
    ours, dvalues, *others = torch.autograd.grad(found, (x, *sparse.parameters()), dy)
    torch.testing.assert_close(ours, dx, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dvalues, dweight[mask], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(others, rest)


def test_its_bytes_are_those_of_its_op() -> None:
    layer = SparseLinear.of(nn.Linear(96, 50), 480)
    op = layer.graph_op("layer", 7, FP32)
    assert op.stored_bytes == sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
    assert op.parameters == sum(p.numel() for p in layer.parameters())


def test_saved_weights_load_into_the_structure() -> None:
    layer, x = SparseLinear.of(nn.Linear(20, 30), 60), torch.randn(2, 3, 20)
    other = SparseLinear(20, 30, 60, bias=True)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert layer.to("meta")(x.to("meta")).shape == (2, 3, 30)


@pytest.mark.parametrize(("x", "problem"), [(torch.zeros(2, 20).half(), "float16"), (torch.zeros(2, 19), "shape")])
def test_other_numbers_and_shapes_are_refused(x: torch.Tensor, problem: str) -> None:
    with pytest.raises(NarrowsError, match=problem):
        SparseLinear.of(nn.Linear(20, 30), 60)(x)


@pytest.mark.parametrize(
    ("part", "place", "value"), [("columns", 3, 20), ("columns", 0, -1), ("starts", 4, 61), ("starts", 30, 10)]
)
def test_a_damaged_pattern_is_not_followed(part: str, place: int, value: int) -> None:
    layer = SparseLinear.of(nn.Linear(20, 30), 60)
    layer(torch.zeros(1, 20))
    getattr(layer, part)[place] = value
    with pytest.raises(NarrowsError, match="pattern"):
        layer(torch.zeros(1, 20))
