"""A small Llama or Mixtral: whole, or a pipeline's stages; its attention, and what a residual waits for, can be exchanged."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint

from narrows.modules.experts import Experts

Mixer = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries [B, T, H, d], keys and values [B, T, K, d] to [B, T, H, d]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of each token over those up to it."""
    out = scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=q.shape[2] != k.shape[2]
    )
    return out.transpose(1, 2)


def again(mix: Mixer) -> Mixer:
    """Attention whose core is computed again in the backward pass, and nothing of it kept."""

    def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = checkpoint(mix, q, k, v, use_reentrant=False)
        return out

    return mixed


class Attention(nn.Module):  # type: ignore[misc]
    """Attention with rotary positions; the heads that a rank has follow from its share of the projections."""

    def __init__(self, config: dict[str, Any], mix: Mixer) -> None:
        super().__init__()
        wide, heads, few = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
        self.size, self.mix = wide // heads, mix
        self.q_proj = nn.Linear(wide, heads * self.size, bias=False)
        self.k_proj = nn.Linear(wide, few * self.size, bias=False)
        self.v_proj = nn.Linear(wide, few * self.size, bias=False)
        self.o_proj = nn.Linear(heads * self.size, wide, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, self.size)) for part in (self.q_proj, self.k_proj, self.v_proj))
        out: Tensor = self.o_proj(self.mix(_turned(q, turn), _turned(k, turn), v).flatten(-2))
        return out


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary positions: `turn` [2, T, 1, d] holds cosines and sines."""
    low, high = x.chunk(2, -1)
    return x * turn[0] + torch.cat((-high, low), -1) * turn[1]


class FeedForward(nn.Module):  # type: ignore[misc]
    """The gated feed-forward network of Llama."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        wide, hidden = config["hidden_size"], config["intermediate_size"]
        self.gate_proj, self.up_proj = nn.Linear(wide, hidden, bias=False), nn.Linear(wide, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, wide, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):  # type: ignore[misc]
    """One layer: attention and feed-forward, each behind its norm."""

    def __init__(self, config: dict[str, Any], mix: Mixer) -> None:
        super().__init__()
        wide, small = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(wide, small), nn.RMSNorm(wide, small)
        self.self_attn = Attention(config, mix)
        self.mlp = Experts(config) if config.get("num_local_experts") else FeedForward(config)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn)
        return x + self.mlp(self.post_attention_layernorm(x))

    def ladder(self, x: Tensor, pending: Tensor | None, turn: Tensor) -> tuple[Tensor, Tensor]:
        """The layer as a step of Ladder Residual: each half reads a residual that lacks the output of the half before.

        That output, `pending`, is first used once this half has been computed: it may be on its way until then.
        """
        attended = self.self_attn(self.input_layernorm(x), turn)
        x = x if pending is None else x + pending
        fed = self.mlp(self.post_attention_layernorm(x))
        return x + attended, fed


class Stage(nn.Module):  # type: ignore[misc]
    """Some layers of the model with, at its ends, embedding and output layer; parameters have the names of the whole model.

    Takes tokens [B, T] (first stage) or the residual stream [B, T, D]; gives that, or logits [B, T, V] (last stage).
    `positions` are those of the T tokens, where they are not the first of their sequence; `recompute` says how many of its
    layers, from the first, are computed again in the backward pass. `ladder` is for whole models.
    """

    def __init__(
        self, config: dict[str, Any], layers: Iterable[int], first: bool = True, last: bool = True, mix: Mixer = causal,
        ladder: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        wide, words = config["hidden_size"], config["vocab_size"]
        self.size, self.base = wide // config["num_attention_heads"], config.get("rope_theta", 10000.0)
        self.positions: Tensor | None = None
        self.recompute = 0
        self.climbs = ladder
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict({str(i): Block(config, mix) for i in layers})
        self.model.embed_tokens = nn.Embedding(words, wide) if first else None
        self.model.norm = nn.RMSNorm(wide, config["rms_norm_eps"]) if last else None
        self.lm_head = nn.Linear(wide, words, bias=False) if last else None

    @property
    def blocks(self) -> "list[Block]":
        """Its layers in order."""
        return list(self.model.layers.values())  # type: ignore[union-attr,operator,return-value]

    def forward(self, x: Tensor) -> Tensor:
        model: Any = self.model
        if model.embed_tokens is not None:
            x = model.embed_tokens(x)
        turn, pending = self._turn(x), None
        for i, block in enumerate(self.blocks):
            if self.climbs:
                x, pending = block.ladder(x, pending, turn)
            elif i < self.recompute:
                x = checkpoint(block, x, turn, use_reentrant=False)
            else:
                x = block(x, turn)
        x = x if pending is None else x + pending
        return x if self.lm_head is None else self.lm_head(model.norm(x))

    def _turn(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1]) if self.positions is None else self.positions
        speed = self.base ** -(torch.arange(0, self.size, 2, dtype=torch.float64) / self.size)
        angle = (at[:, None].double() * speed).repeat(1, 2)[:, None]
        return torch.stack((angle.cos(), angle.sin())).to(x.dtype)


def seeded(stage: Stage, seed: int = 0) -> Stage:
    """The stage with the weights of the whole model of that seed, whichever its layers are."""
    names = dict(stage.named_parameters())
    for name in sorted(names):
        draw = torch.Generator().manual_seed(seed + sum((i + 1) * byte for i, byte in enumerate(name.encode())))
        weight = names[name].data
        spread = 0.1 if weight.dim() > 1 else 0.05
        weight.copy_(torch.randn(weight.shape, generator=draw, dtype=torch.float64) * spread + (weight.dim() == 1))
    return stage
