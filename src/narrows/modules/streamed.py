"""Low-rank attention and feed-forward blocks that work tile by tile: no activation of full width is ever made."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = 64  # normalised at a time


def cut_outputs(linear: nn.Linear, tiles: int) -> nn.ModuleList:
    """A linear layer as `tiles` layers that give its outputs piece by piece."""
    biases = linear.bias.detach().chunk(tiles) if linear.bias is not None else [None] * tiles
    return nn.ModuleList(_linear(w, b) for w, b in zip(linear.weight.detach().chunk(tiles), biases, strict=True))


def cut_inputs(linear: nn.Linear, tiles: int) -> nn.ModuleList:
    """A linear layer without a bias as `tiles` layers, each of a piece of the inputs, whose results are added."""
    return nn.ModuleList(_linear(w, None) for w in linear.weight.detach().chunk(tiles, dim=1))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


class StreamedFeedForward(nn.Module):  # type: ignore[misc]
    """[..., D] to [..., D] through two factored linear layers, the hidden width never held as a whole.

    up, down: the two factors of the layer that widens and of the one that narrows, in the order in which they run.
    """

    def __init__(self, up: nn.Sequential, act: nn.Module, down: nn.Sequential, tiles: int) -> None:
        super().__init__()
        self.first, self.act, self.last = up[0], act, down[1]
        self.widen, self.narrow = cut_outputs(up[1], tiles), cut_inputs(down[0], tiles)

    def forward(self, x: Tensor) -> Tensor:
        inner, total = self.first(x), None
        for widen, narrow in zip(self.widen, self.narrow, strict=True):
            part = narrow(self.act(widen(inner)))
            total = part if total is None else total.add_(part)
            del part
        del inner
        return self.last(total)  # type: ignore[no-any-return]


class StreamedAttention(nn.Module):  # type: ignore[misc]
    """Multi-head attention [B, T, D] to [B, T, D] through factored projections, one head at a time, its output projected."""

    def __init__(self, query: nn.Sequential, key: nn.Sequential, value: nn.Sequential, out: nn.Sequential, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (
            nn.ModuleDict({"first": pair[0], "heads": cut_outputs(pair[1], heads)}) for pair in (query, key, value)
        )
        self.out, self.last = cut_inputs(out[0], heads), out[1]

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """As transformers calls its own attention; the weights are not given back."""
        ways: tuple[Any, ...] = (self.query, self.key, self.value)
        inner, total = [way["first"](x) for way in ways], None
        for head, out in enumerate(self.out):
            q, k, v = (way["heads"][head](p)[:, None] for way, p in zip(ways, inner, strict=True))
            part = out(F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)[:, 0])
            del q, k, v
            total = part if total is None else total.add_(part)
            del part
        del inner
        return self.last(total), None


class ResidualNorm(nn.Module):  # type: ignore[misc]
    """norm(x + residual), both [..., D]; without gradients x is overwritten with it, a few rows at a time."""

    def __init__(self, norm: nn.LayerNorm, dropout: nn.Module) -> None:
        super().__init__()
        self.LayerNorm, self.dropout = norm, dropout

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.is_meta or self.training:
            return self.LayerNorm(self.dropout(x) + residual)  # type: ignore[no-any-return]
        for here, other in zip(x.view(-1, x.shape[-1]).split(ROWS), residual.flatten(0, -2).split(ROWS), strict=True):
            here.copy_(self.LayerNorm(here + other))
        return x
