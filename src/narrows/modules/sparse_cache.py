"""A KV cache whose vectors are sums of a few atoms of a dictionary: a byte for an atom's number, and one for its weight."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from narrows.graph import DType
from narrows.modules.eviction import Evicted

ATOMS = 256  # as many as a byte numbers
WEIGHT = torch.float8_e4m3fn
_SAMPLE, _LARGEST = 512, 448.0  # vectors of a training step; the largest number of the weights' format


def pursue(x: Tensor, atoms: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Vectors x [K, n, d] as weighted atoms of dictionaries [K, ATOMS, d]: numbers and weights [K, n, pairs].

    Matching pursuit: the atom most like what is left, with the weight that takes most of it away, and so on. Weights are
    rounded as they are kept, so that later atoms make up for the rounding.
    """
    left, numbers, weights = x.float(), [], []
    for _ in range(pairs):
        likeness = left @ atoms.mT
        best = likeness.abs().argmax(-1, keepdim=True)
        weight = likeness.gather(-1, best).clamp(-_LARGEST, _LARGEST).to(WEIGHT).float()
        left = left - weight * _taken(atoms, best)
        numbers.append(best)
        weights.append(weight)
    return torch.cat(numbers, -1), torch.cat(weights, -1)


def _taken(atoms: Tensor, numbers: Tensor) -> Tensor:
    """Of dictionaries [K, ATOMS, d] the atoms of numbers [K, n, 1]: [K, n, d]."""
    return atoms.gather(1, numbers.expand(*numbers.shape[:2], atoms.shape[-1]))


def summed(numbers: Tensor, weights: Tensor, atoms: Tensor) -> Tensor:
    """The vectors [K, n, d] that numbers and weights [K, n, pairs] stand for."""
    parts = [weights[..., i : i + 1] * _taken(atoms, numbers[..., i : i + 1]) for i in range(numbers.shape[-1])]
    return torch.stack(parts).sum(0)


@torch.enable_grad()  # type: ignore[untyped-decorator]
def learned(x: Tensor, pairs: int, steps: int) -> Tensor:
    """Dictionaries [K, ATOMS, d] of unit vectors for x [K, n, d]: some of its vectors to start with, then gradient descent.

    The loss is what pursuit leaves, over what there was; which atoms it takes has no gradient, what they are has.
    """
    x = x.float()
    generator = torch.Generator().manual_seed(0)
    some = normalize(x[:, torch.randperm(x.shape[1], generator=generator)[:ATOMS]], dim=-1)
    atoms = torch.cat([some, by_chance(x)[:, some.shape[1] :]], 1).requires_grad_()
    optimizer = torch.optim.Adam([atoms], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        batch = x[:, torch.randint(x.shape[1], (_SAMPLE,), generator=generator)]
        with torch.no_grad():
            atoms.copy_(normalize(atoms, dim=-1))
            numbers, weights = pursue(batch, atoms, pairs)
        optimizer.zero_grad()
        ((summed(numbers, weights, atoms) - batch).square().sum() / batch.square().sum()).backward()
        optimizer.step()
        schedule.step()
    return normalize(atoms.detach(), dim=-1)


def by_chance(x: Tensor) -> Tensor:
    """Dictionaries of random directions, for vectors of the shape of x."""
    shape = (x.shape[0], ATOMS, x.shape[-1])
    return normalize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), dim=-1)


def empty(module: Any) -> tuple[Tensor, Tensor]:
    """Dictionaries for an attention module, without their numbers: saved ones are loaded into them."""
    shape = (module.config.num_key_value_heads, ATOMS, module.head_dim)
    return torch.empty(shape), torch.empty(shape)


class Sparse(Evicted):
    """A layer of a DynamicCache that keeps what it has seen as atoms: `keys` and `values` are bytes [B, K, S, 2 pairs].

    Attention is given the vectors that these stand for, and those of the step as they are.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, module: Any, pairs: int, stored: DType) -> None:
        super().__init__()
        self.module, self.pairs, self.stored = module, pairs, stored

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        fresh = (key_states, value_states)
        dictionaries = (self.module.key_atoms, self.module.value_atoms)
        codes = [self._coded(t, atoms) for t, atoms in zip(fresh, dictionaries, strict=True)]
        self.seen += key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = codes
            return fresh
        keys, values = (torch.cat(pair, -2) for pair in zip(self.held(key_states.dtype), fresh, strict=True))
        self.keys, self.values = (torch.cat(pair, -2) for pair in zip((self.keys, self.values), codes, strict=True))
        return keys, values

    def held(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The keys and values [B, K, S, d] that its bytes stand for."""
        return self._read(self.keys, self.module.key_atoms, dtype), self._read(self.values, self.module.value_atoms, dtype)

    def _coded(self, t: Tensor, atoms: Tensor) -> Tensor:
        """Vectors [B, K, S, d] as bytes [B, K, S, 2 pairs]."""
        numbers, weights = pursue(t.transpose(0, 1).flatten(1, 2), atoms, self.pairs)
        both = torch.cat([numbers.to(torch.uint8), weights.to(WEIGHT).view(torch.uint8)], -1)
        return both.unflatten(1, (t.shape[0], -1)).transpose(0, 1)

    def _read(self, codes: Tensor, atoms: Tensor, dtype: torch.dtype) -> Tensor:
        """What bytes [B, K, S, 2 pairs] stand for: [B, K, S, d]."""
        flat = codes.transpose(0, 1).flatten(1, 2)
        numbers, weights = flat[..., : self.pairs].long(), flat[..., self.pairs :].contiguous().view(WEIGHT).float()
        out = summed(numbers, weights, atoms).unflatten(1, (codes.shape[0], -1))
        return out.transpose(0, 1).to(dtype)


def code(module: Any, keys: Tensor, values: Tensor, pairs: int, stored: DType) -> None:
    """Give an attention module its dictionaries, and let it put a `Sparse` layer into every cache that it meets."""
    module.register_buffer("key_atoms", keys)
    module.register_buffer("value_atoms", values)

    def before(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None:
            return
        if module.layer_idx >= len(cache.layers):
            cache.layers.append(Sparse(module, pairs, stored))
        elif not cache.layers[module.layer_idx].is_initialized and not isinstance(cache.layers[module.layer_idx], Sparse):
            cache.layers[module.layer_idx] = Sparse(module, pairs, stored)

    module.watch = before  # one change of the cache a layer
    module.register_forward_pre_hook(before, with_kwargs=True)


@torch.no_grad()  # type: ignore[untyped-decorator]
def seen(model: Any, data: Sequence[Mapping[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The keys and values [K, n, d] of all tokens of `data`, for each layer of a model's cache."""
    found: list[list[tuple[Tensor, Tensor]]] = []
    for batch in data:
        layers = model(**batch, use_cache=True).past_key_values.layers
        found.append([(la.keys.transpose(0, 1).flatten(1, 2), la.values.transpose(0, 1).flatten(1, 2)) for la in layers])
    return [(torch.cat([k for k, _ in layer], 1), torch.cat([v for _, v in layer], 1)) for layer in zip(*found, strict=True)]
