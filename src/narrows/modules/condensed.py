"""Decoder layers that attend to the keys and values of the topmost of them, and make none of their own."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from narrows.modules.eviction import turned


class Reading(nn.Module):  # type: ignore[misc]
    """Attention with queries alone: [B, T, D] to [B, T, D]; keys and values are put into `keys` and `values` before."""

    keys: Tensor
    values: Tensor
    is_causal = True
    is_decoder = True

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = attention.config, attention.layer_idx, attention.head_dim
        self.scaling, self.num_key_value_groups = attention.scaling, attention.num_key_value_groups
        self.q_proj, self.o_proj = attention.q_proj, attention.o_proj
        self.q_norm = getattr(attention, "q_norm", nn.Identity())

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Tensor | None = None, **rest: Any
    ) -> tuple[Tensor, None]:
        rest.pop("past_key_values", None)
        queries = self.q_norm(self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        given = (turned(queries, position_embeddings), self.keys, self.values, attention_mask)
        out, _ = attend(self, *given, scaling=self.scaling, **rest)
        return self.o_proj(out.flatten(2)), None


class Condensed(nn.Module):  # type: ignore[misc]
    """Layers that run as one: the last makes keys and values, to which all others attend, each token to those before it.

    hidden_states [B, T, D] -> [B, T, D]. A token at a time needs one pass, since what it attends to has been made. Of several
    new tokens, each pass uses the keys and values of the one before: `passes` of them, of which the last `learning` have
    gradients. What stands for a token before the first is a key and a value of zeros.
    """

    def __init__(self, layers: list[Any], passes: int, learning: int) -> None:
        super().__init__()
        self.layers, self.passes, self.learning = nn.ModuleList(layers), passes, learning
        self.attention_type = getattr(layers[0], "attention_type", "full_attention")
        for layer in layers[:-1]:
            layer.self_attn = Reading(layer.self_attn)

    def forward(self, hidden_states: Tensor, past_key_values: Cache | None = None, **rest: Any) -> Tensor:
        cache = DynamicCache() if past_key_values is None else past_key_values
        top, new = self.layers[-1].self_attn, hidden_states.shape[1]
        while len(cache.layers) <= top.layer_idx:
            cache.layers.append(DynamicLayer())
        held = cache.layers[top.layer_idx]
        shape = (hidden_states.shape[0], top.k_proj.out_features // top.head_dim, new, top.head_dim)
        keys = values = hidden_states.new_zeros(shape)
        for layer in self.layers[:-1]:
            empty = cache.layers[layer.self_attn.layer_idx]
            if not empty.is_initialized:
                empty.lazy_initialization(keys, values)
                empty.keys, empty.values = keys[:, :, :0], values[:, :, :0]
        passes = self.passes if new > 1 else 1
        for left in reversed(range(passes)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and left < self.learning):
                out = self._once(hidden_states, keys, values, held, {**rest, "past_key_values": cache})
            keys, values = (t[:, :, -new:] for t in (held.keys, held.values))
            if left:
                held.crop(-new)
        return out

    def _once(self, stream: Tensor, keys: Tensor, values: Tensor, held: Any, rest: dict[str, Any]) -> Tensor:
        """One pass of all layers, with keys and values [B, K, T, d] of the new tokens as the pass before has left them."""
        before = (held.keys, held.values) if held.is_initialized and held.get_seq_length() else (keys[:, :, :0], values[:, :, :0])
        nothing = torch.zeros_like(keys[:, :, :1])
        shown = [torch.cat([nothing, old, fresh[:, :, :-1]], 2) for old, fresh in zip(before, (keys, values), strict=True)]
        for layer in self.layers[:-1]:
            layer.self_attn.keys, layer.self_attn.values = shown
            stream = layer(stream, **rest)
            del layer.self_attn.keys, layer.self_attn.values
        return self.layers[-1](stream, **rest)  # type: ignore[no-any-return]


def condense(model: Any, below: int, above: int, passes: int, learning: int) -> Any:
    """The model whose layers but for the first `below` and the last `above` are one `Condensed`; changed in place."""
    layers = list(model.model.layers)
    end = len(layers) - above
    middle = Condensed(layers[below:end], passes, learning)
    model.model.layers = nn.ModuleList([*layers[:below], middle, *layers[end:]])
    return model
