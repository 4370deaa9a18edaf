"""CSR: what pursuit leaves, what the cache holds, and when it is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from narrows.capture.torch import from_module
from narrows.errors import NarrowsError
from narrows.modules.sparse_cache import ATOMS, by_chance, learned, pursue, summed
from narrows.samples import tiny_llama
from narrows.step import Step
from narrows.technique import No
from narrows.techniques.kv_cache.csr_cache_sparse_representation import CSR


def left(x: torch.Tensor, atoms: torch.Tensor, pairs: int) -> torch.Tensor:
    return (summed(*pursue(x, atoms, pairs), atoms) - x).norm(dim=-1)


@given(st.integers(0, 2**31), st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_every_atom_takes_something_away(seed: int, pairs: int) -> None:
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(seed))
    atoms = by_chance(x)
    assert (left(x, atoms, pairs) <= left(x, atoms, pairs - 1) if pairs > 1 else x.norm(dim=-1)).all()


def test_multiples_of_an_atom_are_kept_to_their_weights_format() -> None:
    atoms = by_chance(torch.empty(1, 1, 16))
    x = atoms[:, [3, 200]] * torch.tensor([2.0, -0.5])[:, None]
    numbers, weights = pursue(x, atoms, 1)
    assert numbers.flatten().tolist() == [3, 200]
    torch.testing.assert_close(summed(numbers, weights, atoms), x, rtol=0.07, atol=0)  # 3 bits of mantissa


def test_a_learned_dictionary_leaves_less_than_its_start_and_chance() -> None:
    generator = torch.Generator().manual_seed(7)
    directions = normalize(torch.randn(1, 300, 16, generator=generator), dim=-1)
    x = sum(torch.randn(1, 2000, 1, generator=generator) * directions[:, torch.randint(300, (2000,), generator=generator)]
            for _ in range(2))  # fmt: skip
    found = [float(left(x, atoms, 2).square().mean()) for atoms in (learned(x, 2, 60), learned(x, 2, 0), by_chance(x))]
    assert found == sorted(found) and found[0] < 0.9 * found[1]
    assert learned(x[:, :40], 2, 1).shape == (1, ATOMS, 16)


@torch.no_grad()
def test_the_cache_holds_bytes_and_a_rich_dictionary_changes_little() -> None:
    model, data = tiny_llama(3, tokens=120)
    ids = data[0]["input_ids"]
    plain = model.eval()(ids).logits
    model = CSR(pairs=8, steps=0).apply(model, data)
    first = model(ids[:, :100], use_cache=True)
    kept = first.past_key_values
    assert {t.dtype for layer in kept.layers for t in (layer.keys, layer.values)} == {torch.uint8}
    assert kept.layers[0].keys.shape == (2, 2, 100, 16) and kept.get_seq_length() == 100
    torch.testing.assert_close(first.logits, plain[:, :100])
    after = model(ids[:, 100:], past_key_values=kept).logits
    assert kept.get_seq_length() == 120
    assert float((after - plain[:, 100:]).norm() / plain[:, 100:].norm()) < 0.05


def test_it_is_refused_where_nothing_is_saved_or_no_data_is_given() -> None:
    model, _ = tiny_llama(2, tokens=8)
    assert isinstance(CSR(pairs=16).check(from_module(model.eval(), Step.decode(2, 8)), None, Step.decode(2, 8)), No)
    with pytest.raises(NarrowsError, match="calibration data"):
        CSR().apply(model, ())
