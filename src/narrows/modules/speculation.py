"""Greedy decoding where a sparse cache of the target, and a small model below it, propose what the target then checks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from narrows.modules.eviction import SINKS, Evicted, attention_layers, turned, without


@dataclass(frozen=True)
class Speculated:
    """What a run gave: ids [1, T + n], and how many tokens each level proposed and the one above took; steps by level."""

    ids: Tensor
    proposed: int
    taken: int
    guessed: int
    agreed: int
    steps: dict[str, int]

    @property
    def acceptance(self) -> float:
        """Share of the sparse cache's tokens that the whole cache says too."""
        return self.taken / self.proposed

    @property
    def agreement(self) -> float:
        """Share of the small model's tokens that the sparse cache says too (0 without a small model)."""
        return self.agreed / max(self.guessed, 1)


class Reader:
    """A model with a cache of one sequence that may lack tokens: it reads on, and takes back what it has read."""

    def __init__(self, model: Any, layers: list[Evicted]) -> None:
        self.model, self.cache, self.steps = model, DynamicCache(), 0
        self.cache.layers = layers

    @property
    def seen(self) -> int:
        return int(self.cache.layers[0].seen)

    def read(self, tokens: list[int]) -> list[int]:
        """The token that the model says after each of these, none of which it has read."""
        new, held = len(tokens), self.cache.layers[0].keys.shape[-2]
        visible = torch.ones(1, 1, new, held + new, dtype=torch.bool).tril(held)
        places = torch.arange(self.seen, self.seen + new)[None]
        self.steps += 1
        out = self.model(torch.tensor([tokens]), attention_mask=visible, position_ids=places, past_key_values=self.cache)
        return out.logits[0].argmax(-1).tolist()  # type: ignore[no-any-return]

    def back(self, count: int) -> None:
        """Forget the last tokens read."""
        for layer in self.cache.layers:
            if count:
                layer.crop(-count)


@torch.no_grad()  # type: ignore[untyped-decorator]
def speculate(
    model: nn.Module, ids: Tensor, tokens: int, budget: int, chunk: int, outer: int,
    draft: nn.Module | None = None, inner: int = 1, window: int = 256, retrieve: bool = True,
) -> Speculated:  # fmt: skip
    """Continue ids [1, T] by `tokens` greedily, with the very tokens that `model` gives one by one.

    Its whole cache checks `outer` tokens at a time. They come from the same weights with `budget` tokens of the prompt
    in their cache: the chunks whose mean key the prompt's end asks for (`retrieve`), or the last. These in turn check
    `inner` guesses at a time of `draft`, which remembers `window` tokens. Raises NarrowsError for models without
    attention layers that are alike.
    """
    with _last_queries(model) as queries:
        first = model(ids, use_cache=True, logits_to_keep=1)
    whole = Reader(model, [Evicted.of(la.keys, la.values, ids.shape[1]) for la in first.past_key_values.layers])
    pairs = zip(whole.cache.layers, queries, strict=True)
    sparse = Reader(model, [_retrieved(la, q if retrieve else None, budget, chunk) for la, q in pairs])
    said = [int(first.logits[0, -1].argmax())]
    small = _Guesser(draft, ids, window) if draft is not None else None
    proposed = taken = guessed = agreed = 0
    while len(said) <= tokens:
        ahead: list[int] = []
        while len(ahead) < outer:
            guess = small.guess([*said, *ahead], inner) if small else []
            truth = sparse.read([([*said, *ahead])[-1], *guess])
            same = agreeing(guess, truth)
            sparse.back(len(guess) - same)
            ahead += truth[: same + 1]
            guessed, agreed = guessed + len(guess), agreed + same
        truth = whole.read([said[-1], *ahead])
        same = agreeing(ahead, truth)
        whole.back(len(ahead) - same)
        sparse.back(len(ahead))
        _follow(sparse.cache.layers, whole.cache.layers, same + 1)
        said += truth[: same + 1]
        proposed, taken = proposed + len(ahead), taken + same
    steps = {"target": whole.steps, "sparse": sparse.steps, "draft": small.reader.steps if small else 0}
    return Speculated(torch.cat([ids, torch.tensor([said[:tokens]])], 1), proposed, taken, guessed, agreed, steps)


def agreeing(guess: list[int], truth: list[int]) -> int:
    """How many guesses from the first on came true."""
    return next((i for i, (a, b) in enumerate(zip(guess, truth, strict=False)) if a != b), len(guess))


def _follow(layers: list[Evicted], whole: list[Evicted], count: int) -> None:
    """Take the last `count` tokens over from the whole cache, whose keys and values are the true ones."""
    for layer, full in zip(layers, whole, strict=True):
        layer.update(full.keys[..., -count:, :], full.values[..., -count:, :])


class _Guesser:
    """A small model that keeps the first tokens and the last `window`."""

    def __init__(self, model: Any, ids: Tensor, window: int) -> None:
        read = model(ids, use_cache=True, logits_to_keep=1).past_key_values.layers
        self.window, self.start = window, ids.shape[1]
        self.reader = Reader(model, [Evicted.of(la.keys, la.values, self.start) for la in read])
        self.read: list[int] = []

    def guess(self, said: list[int], count: int) -> list[int]:
        """The next tokens after those said since the prompt."""
        same = agreeing(self.read[: len(said) - 1], said)
        self.reader.back(len(self.read) - same)
        for layer in self.reader.cache.layers:
            drop = layer.keys.shape[-2] - SINKS - self.window
            if drop > 0:
                layer.keys, layer.values = without(layer.keys, drop), without(layer.values, drop)
        out = self.reader.read(said[same:])[-1:]
        while len(out) < count:
            out += self.reader.read(out[-1:])
        self.read = said + out[:-1]
        return out


def _retrieved(layer: Any, query: Tensor | None, budget: int, chunk: int) -> Evicted:
    """A prompt's keys and values [1, K, S, d], cut to the chunks that a query [1, H, 1, d] asks for, the first and the last.

    Without a query, to the first chunk and the last tokens.
    """
    keys, values = layer.keys, layer.values
    heads, length = keys.shape[1:3]
    if length <= budget:
        return Evicted.of(keys, values, length)
    count = length // chunk
    rest = torch.arange(count * chunk, length)  # what fills no chunk stays
    most = max((budget - len(rest)) // chunk, 2)
    if query is None:
        chosen = torch.arange(count - most + 1, count).expand(1, heads, -1)
    else:
        means = keys[:, :, : count * chunk].unflatten(2, (count, chunk)).mean(3)
        scores = query.unflatten(1, (heads, -1)).squeeze(3) @ means.mT * keys.shape[-1] ** -0.5  # [1, K, H / K, chunks]
        chosen = scores.softmax(-1).sum(2)[..., 1:].topk(most - 1).indices.sort(-1).values + 1
    chosen = torch.cat([torch.zeros_like(chosen[..., :1]), chosen], -1)
    index = (chosen[..., None] * chunk + torch.arange(chunk)).flatten(-2)
    index = torch.cat([index, rest.expand(1, heads, -1)], -1)[..., None].expand(-1, -1, -1, keys.shape[-1])
    return Evicted.of(keys.gather(2, index), values.gather(2, index), length)


@contextmanager
def _last_queries(model: nn.Module) -> Iterator[list[Tensor]]:
    """The queries [B, H, 1, d] of the last token of what the model reads meanwhile, layer by layer."""
    found: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        raw = module.q_proj(kwargs["hidden_states"][:, -1:]).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        raw = module.q_norm(raw) if hasattr(module, "q_norm") else raw
        found.append(turned(raw, kwargs.get("position_embeddings")))

    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in attention_layers(model, "triforce")]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
