"""Several lines of thought from one prompt, decoded side by side, and an answer that attends to all of them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from narrows.errors import NarrowsError


@dataclass(frozen=True)
class Thought:
    """What a run gave: paths [P, n] and answer [1, m] as token ids, logits [1, m, V] of the answer's tokens.

    read_again: tokens of the prompt and the paths that were read a second time before the answer.
    """

    paths: Tensor
    answer: Tensor
    logits: Tensor
    read_again: int


@torch.no_grad()  # type: ignore[untyped-decorator]
def think(
    model: Any, ids: Tensor, starts: Tensor, thought: int, close: Tensor, answer: int, temperature: float, reuse: bool, seed: int
) -> Thought:
    """Continue a prompt ids [1, T] along P paths of `thought` sampled tokens each, then answer greedily from all of them.

    starts  [P] the token that opens each path; close [1, c] the tokens that open the answer
    reuse   the answer's first step finds the paths' keys and values in the cache; otherwise all is read again, in one pass

    Paths see the prompt and themselves, and have the same positions; the answer goes on after the longest. A temperature of
    0 is greedy. Raises NarrowsError for a prompt of several sequences.
    """
    if ids.shape[0] != 1 or starts.ndim != 1:
        problem = f"a prompt of {ids.shape[0]} sequences, and starts of {starts.ndim} dimensions."
        raise NarrowsError(problem, where="parathinker", remedy="Give one prompt [1, T], and starts [P].")
    prompt, paths = ids.shape[1], len(starts)
    generator = torch.Generator().manual_seed(seed)
    cache = DynamicCache()
    model(ids, past_key_values=cache, logits_to_keep=1)
    cache.batch_repeat_interleave(paths)
    said = [starts[:, None]]
    for place in range(prompt, prompt + thought):  # the last token is read as well: the answer sees it
        at = torch.full((paths, 1), place)
        logits = model(said[-1], past_key_values=cache, position_ids=at).logits[:, -1]
        said.append(_next(logits, temperature, generator))
    found = torch.cat(said[:-1], 1)
    if reuse:
        cache = _joined(cache, prompt)
        logits = _read(model, close, cache, prompt + thought)
    else:
        cache = DynamicCache()
        logits = _read_all(model, ids, found, close, cache)[:, -close.shape[1] :]
    out, kept = [logits[:, -1:].argmax(-1)], [logits[:, -1:]]
    for place in range(prompt + thought + close.shape[1], prompt + thought + close.shape[1] + answer - 1):
        kept.append(_read(model, out[-1], cache, place))
        out.append(kept[-1].argmax(-1))
    return Thought(found, torch.cat(out, 1), torch.cat(kept, 1), 0 if reuse else prompt + found.numel())


def _next(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A token [P, 1] for each row of logits [P, V]."""
    if not temperature:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)


def _joined(cache: DynamicCache, prompt: int) -> DynamicCache:
    """The cache of P sequences with one prompt as that of one sequence: the prompt once, then what is each path's own."""
    joined = DynamicCache()
    for layer in cache.layers:
        one = DynamicLayer()
        both = [
            torch.cat([t[:1, :, :prompt], t[:, :, prompt:].transpose(0, 1).flatten(1, 2)[None]], 2)
            for t in (layer.keys, layer.values)
        ]
        one.lazy_initialization(*both)
        one.keys, one.values = both
        joined.layers.append(one)
    return joined


def _read(model: Any, tokens: Tensor, cache: DynamicCache, start: int) -> Tensor:
    """Logits after tokens [1, T], the first at position `start`, that see all of the cache."""
    new, held = tokens.shape[1], cache.layers[0].keys.shape[-2]
    visible = torch.ones(1, 1, new, held + new, dtype=torch.bool).tril(held)
    places = torch.arange(start, start + new)[None]
    return model(tokens, attention_mask=visible, position_ids=places, past_key_values=cache).logits  # type: ignore[no-any-return]


def _read_all(model: Any, ids: Tensor, paths: Tensor, close: Tensor, cache: DynamicCache) -> Tensor:
    """Logits of prompt, paths one after another, and the answer's opening, read in one pass: no path sees another."""
    count, thought = paths.shape
    tokens = torch.cat([ids, paths.reshape(1, -1), close], 1)
    prompt, opening, total = ids.shape[1], close.shape[1], tokens.shape[1]
    after = torch.arange(thought).repeat(count) + prompt
    places = torch.cat([torch.arange(prompt), after, torch.arange(opening) + prompt + thought])
    whose = torch.cat([torch.zeros(prompt), torch.arange(1, count + 1).repeat_interleave(thought), torch.full((opening,), -1.0)])
    sees = (whose[:, None] == whose) | (whose == 0) | (whose[:, None] == -1)
    visible = (sees & torch.ones(total, total, dtype=torch.bool).tril())[None, None]
    return model(tokens, attention_mask=visible, position_ids=places[None], past_key_values=cache).logits  # type: ignore[no-any-return]
