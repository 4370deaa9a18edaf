"""Transformer layers that have lost some of their residual sublayers, without a trace in time, weights or cache."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

Chains = tuple[tuple[str, ...], ...]


class Thinned(nn.Module):  # type: ignore[misc]
    """What is left of a layer: each chain of children (norm, attention or MLP, norm) reads the stream and is added to it.

    hidden_states [B, T, D] -> [B, T, D]. Attention takes the layer's other arguments, under their names.
    """

    chains: Chains

    def forward(self, hidden_states: Tensor, **rest: Any) -> Tensor:
        for chain in self.chains:
            out: Any = hidden_states
            for name in chain:
                child = getattr(self, name)
                out = child(hidden_states=out, **rest) if name == "self_attn" else child(out)
                out = out[0] if isinstance(out, tuple) else out
            hidden_states = hidden_states + out
        return hidden_states


@cache
def _thinned(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the layer's own class, so that what looks for that class (hooks, checkpointing) still finds it."""
    return type(f"Thinned{kind.__name__}", (Thinned, kind), {})


def thin(layer: nn.Module, lost: Chains, left: Chains) -> None:
    """Take the chains `lost` out of a layer in place; the others keep their names, weights and order."""
    for name in (n for chain in lost for n in chain):
        delattr(layer, name)
    layer.__class__ = _thinned(type(layer))  # type: ignore[arg-type]
    layer.chains = left  # type: ignore[assignment]


def similarity(stream: Tensor, added: Tensor) -> Tensor:
    """Cosine between a residual stream [..., D] before and after a sublayer is added to it, as a mean over the tokens."""
    before, after = stream.float(), (stream + added).float()
    return torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
