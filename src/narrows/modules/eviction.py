"""A KV cache that forgets: after the prompt, each attention layer keeps the tokens that its last queries looked at."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from narrows.errors import NarrowsError

SINKS = 4  # first tokens, which draw attention whatever they say
PIECE = 128  # queries whose scores are in memory at once


class Evicted(DynamicLayer):  # type: ignore[misc]
    """One layer of a DynamicCache after an eviction: its tensors hold fewer tokens than it has `seen`.

    To whoever asks, it is as long as the tokens seen, so that positions and masks go on as if nothing had been dropped.
    """

    seen = 0

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, seen: int) -> "Evicted":
        layer = cls()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer.seen = keys, values, seen
        return layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.seen += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]

    def get_seq_length(self) -> int:
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.seen += tokens_to_remove

    def reset(self) -> None:
        super().reset()
        self.seen = 0


def without(t: Tensor, count: int) -> Tensor:
    """Keys or values [B, K, S, d] without the `count` oldest after the sinks."""
    return torch.cat([t[..., :SINKS, :], t[..., SINKS + count :, :]], dim=-2)


def attention_mass(queries: Tensor, keys: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """The attention that each key [B, K, S, d] gets from queries [B, H, T, d], those of the last T tokens: [B, H, S], their sum.

    `mask` as attention takes it, else causal. Queries come in pieces, so that no T x S matrix is made.
    """
    new, length = queries.shape[2], keys.shape[2]
    repeated = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1).mT * scaling
    total = queries.new_zeros(*queries.shape[:2], length, dtype=torch.float32)
    for start in range(0, new, PIECE):
        piece = queries[:, :, start : start + PIECE]
        end = length - new + start
        if mask is None:
            visible = torch.ones(piece.shape[2], length, dtype=torch.bool, device=keys.device).tril(end)
        else:
            visible = mask[..., mask.shape[-2] - new + start :, :length][..., : piece.shape[2], :]
        logits = piece @ repeated
        masked = logits.masked_fill(~visible, torch.finfo(logits.dtype).min) if visible.dtype == torch.bool else logits + visible
        total += masked.softmax(-1, dtype=torch.float32).sum(2)
    return total


def attention_scores(queries: Tensor, keys: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """How much the last W queries [B, H, W, d] look at each key [B, K, S, d] before them: [B, K, S - W].

    The mean over the queries, and over the query heads that share a key head; `mask` as attention takes it, else causal.
    """
    window = queries.shape[2]
    mass = attention_mass(queries, keys, scaling, mask)[..., : keys.shape[2] - window]
    return mass.unflatten(1, (keys.shape[1], -1)).mean(2) / window


def keep(scores: Tensor, budget: int, window: int, kernel: int) -> Tensor:
    """Which tokens stay: of scores [B, K, S - W], smoothed over `kernel` neighbours, the best, and the last W; [B, K, budget]."""
    smooth = nn.functional.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2, count_include_pad=False)
    best = smooth.topk(budget - window, dim=-1).indices.sort(dim=-1).values
    last = torch.arange(window, device=scores.device) + scores.shape[-1]
    return torch.cat([best, last.expand(*best.shape[:-1], window)], dim=-1)


def turned(queries: Tensor, embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
    """Queries [B, H, W, d] rotated by their positions: cos and sin [B, T, r] of the last W tokens, on the first r numbers."""
    if embeddings is None:
        return queries
    cos, sin = (e[:, None, -queries.shape[2] :] for e in embeddings)
    part, rest = queries[..., : cos.shape[-1]], queries[..., cos.shape[-1] :]
    first, second = part.chunk(2, dim=-1)
    return torch.cat([part * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


def attention_layers(model: nn.Module, slug: str) -> list[Any]:
    """The attention modules of a decoder, lowest first. Raises NarrowsError where they are not alike, or changed already."""
    types = set(getattr(getattr(model, "config", None), "layer_types", None) or [""])
    layers: list[Any] = [m for m in model.modules() if all(hasattr(m, name) for name in ("layer_idx", "q_proj", "scaling"))]
    if not layers or len(types) > 1 or any(hasattr(m, "eviction") or hasattr(m, "watch") for m in layers):
        problem = f"{type(model).__name__} has no attention layers that it can cap, all alike and not capped yet."
        raise NarrowsError(problem, where=slug, remedy="Use a decoder of the llama, mistral or qwen kind.")
    return sorted(layers, key=lambda m: m.layer_idx)


class Eviction:
    """The hooks of one attention module: `before` fits the mask to the keys that are left, `after` evicts a prompt's keys.

    attention looks at the mean attention of the last `window` queries; recency keeps the first tokens, which draw attention
    whatever they say (StreamingLLM's sinks), and the last.
    """

    def __init__(self, budget: int, window: int, kernel: int, by: str) -> None:
        self.budget, self.window, self.kernel, self.by = budget, window, kernel, by

    def before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if cache is None or mask is None:
            return args, kwargs
        layer = cache.layers[module.layer_idx] if module.layer_idx < len(cache.layers) else None
        held = layer.keys.shape[-2] if isinstance(layer, Evicted) and layer.is_initialized else None
        if held is None:
            return args, kwargs
        # masks are made for all tokens seen; of those before this step, what is left is visible
        return args, {**kwargs, "attention_mask": mask[..., -(held + kwargs["hidden_states"].shape[1]) :]}

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def after(self, module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        cache, hidden = kwargs.get("past_key_values"), kwargs["hidden_states"]
        if cache is None:
            return
        layer, new = cache.layers[module.layer_idx], hidden.shape[1]
        if layer.keys.shape[-2] != new or new <= self.budget:  # not a prompt, or one that fits
            return
        keys, values = layer.keys, layer.values
        index = self._chosen(module, hidden, keys, kwargs)[..., None]
        keys, values = (t.gather(2, index.expand(-1, -1, -1, t.shape[-1])) for t in (keys, values))
        cache.layers[module.layer_idx] = Evicted.of(keys, values, seen=new)

    def _chosen(self, module: Any, hidden: Tensor, keys: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if self.by == "recency":
            place = torch.arange(self.budget, device=keys.device)
            place = torch.where(place < SINKS, place, place + keys.shape[2] - self.budget)
            return place.expand(*keys.shape[:2], self.budget)
        queries = module.q_proj(hidden[:, -self.window :]).unflatten(-1, (-1, keys.shape[-1])).transpose(1, 2)
        queries = module.q_norm(queries) if hasattr(module, "q_norm") else queries
        queries = turned(queries, kwargs.get("position_embeddings"))
        scores = attention_scores(queries, keys, module.scaling, kwargs.get("attention_mask"))
        return keep(scores, self.budget, self.window, self.kernel)
