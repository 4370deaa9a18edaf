"""Grouped n:m layers against the matrix they stand for, for any shape, form and number of threads."""

from collections.abc import Iterator
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from narrows.errors import NarrowsError
from narrows.graph import FP32
from narrows.modules.grouped_linear import GroupedLinear, sparsify
from narrows.modules.grouping import COMPILED, Grouping


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(COMPILED), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 150), st.integers(1, 3),
       st.booleans())  # fmt: skip
def test_outputs_and_gradients_are_those_of_the_matrix(
    nm: tuple[int, int], g: int, chunks: int, blocks: int, rows: int, parts: int, bias: bool
) -> None:
    torch.manual_seed(rows)
    torch.set_num_threads(parts)
    form = Grouping(*nm, g)
    linear = nn.Linear(chunks * form.chunk, blocks * form.m, bias)
    sparse = GroupedLinear.of(linear, form)
    mask = sparse.weight != 0
    assert (mask.unflatten(0, (-1, form.m)).sum(1) == form.n).all()
    assert torch.equal(sparse.weight[mask], linear.weight[mask])
    linear.weight.data = sparse.weight
    x = torch.randn(rows, linear.in_features, requires_grad=True)
    dense, found = linear(x), sparse(x)
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(dense)
    dx, dweight, *rest = torch.autograd.grad(dense, (x, *linear.parameters()), dy)
    ours, dvalues, *others = torch.autograd.grad(found, (x, *sparse.parameters()), dy)
    torch.testing.assert_close(ours, dx, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dvalues, dweight.flatten()[sparse.places], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(others, rest)


@pytest.mark.parametrize("nm", COMPILED)
def test_every_pattern_has_as_many_inputs_and_large_weights_stay(nm: tuple[int, int]) -> None:
    torch.manual_seed(0)
    form = Grouping(*nm, 5)
    weight = torch.randn(2 * form.m, 3 * form.chunk)
    patterns = list(combinations(range(form.m), form.n))
    for place in range(form.chunk):  # inputs that stand out fit their patterns exactly, in any order
        weight[list(patterns[place * 7 % form.chunk % len(patterns)]), place] += 100
    columns, values = sparsify(weight, form)
    assert (columns.long().sort(-1).values == torch.arange(form.chunk)).all()
    assert (values[0, 0] > 50).all()
    assert values.abs().sum() >= 0.8 * weight.abs().unflatten(0, (-1, form.m)).topk(form.n, 1).values.sum()


def test_its_bytes_are_those_of_its_op() -> None:
    layer = GroupedLinear.of(nn.Linear(96, 40), Grouping(2, 4, 8))
    op = layer.graph_op("layer", 7, FP32)
    assert op.stored_bytes == sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
    assert op.parameters == sum(p.numel() for p in layer.parameters())


def test_damaged_columns_and_other_numbers_are_refused() -> None:
    layer = GroupedLinear.of(nn.Linear(96, 40), Grouping(1, 4, 8))
    with pytest.raises(NarrowsError, match="float64"):
        layer(torch.randn(3, 96).double())
    with pytest.raises(NarrowsError, match="shape"):
        layer(torch.randn(3, 95))
    layer.columns[0, 0, 0] = 32
    with pytest.raises(NarrowsError, match="outside of their chunk"):
        layer(torch.randn(3, 96))
