"""Decoders that stop after a few of their layers: trained so that this works, and used to draft what the other layers check."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.cache_utils import DynamicCache

from narrows.errors import NarrowsError
from narrows.modules.speculation import Speculated, agreeing


def stack(model: Any, where: str) -> Any:
    """The module that holds a causal model's layers, norm and embedding. Raises NarrowsError where it has none of the kind."""
    inner = getattr(model, "model", None)
    layers = getattr(inner, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(hasattr(inner, n) for n in ("norm", "embed_tokens")):
        problem = f"{type(model).__name__} has no stack of layers under a norm."
        raise NarrowsError(problem, where=where, remedy="Use a decoder of the llama, mistral or qwen kind.")
    return inner


class Parts:
    """A model of one sequence in two parts, layers before `exit` and after it, that share one cache."""

    def __init__(self, model: Any, exit: int) -> None:
        self.model, self.inner, self.cache = model, stack(model, "layerskip"), DynamicCache()
        if not 0 < exit < len(self.inner.layers):
            problem = f"it cannot exit after {exit} of {len(self.inner.layers)} layers."
            raise NarrowsError(problem, where="layerskip", remedy="Exit after one layer at least, and before the last.")
        self.first, self.second = nn.ModuleList(self.inner.layers[:exit]), nn.ModuleList(self.inner.layers[exit:])
        self.exit = exit

    def early(self, tokens: list[int], start: int) -> tuple[int, Tensor]:
        """The token that the first part says after these, the first of which stands at `start`; and its stream [1, T, D]."""
        found: list[Tensor] = []
        hook = self.inner.norm.register_forward_pre_hook(lambda _, given: found.append(given[0]))
        try:
            logits = self._run(self.first, start, input_ids=torch.tensor([tokens]))
        finally:
            hook.remove()
        return int(logits[0, -1].argmax()), found[0]

    def late(self, stream: Tensor, start: int) -> list[int]:
        """The tokens that the whole model says, after each token whose stream the first part left."""
        return self._run(self.second, start, inputs_embeds=stream)[0].argmax(-1).tolist()  # type: ignore[no-any-return]

    def back(self, count: int) -> None:
        """Forget the last tokens read."""
        if count:
            self.cache.crop(-count)

    def _run(self, layers: nn.ModuleList, start: int, **given: Tensor) -> Tensor:
        new = next(iter(given.values())).shape[1]
        visible = torch.ones(1, 1, new, start + new, dtype=torch.bool).tril(start)
        places = torch.arange(start, start + new)[None]
        whole = self.inner.layers
        self.inner.layers = layers
        try:
            out = self.model(attention_mask=visible, position_ids=places, past_key_values=self.cache, **given)
        finally:
            self.inner.layers = whole
        return out.logits  # type: ignore[no-any-return]


@torch.no_grad()  # type: ignore[untyped-decorator]
def self_speculate(model: Any, ids: Tensor, tokens: int, exit: int, ahead: int) -> Speculated:
    """Continue ids [1, T] by `tokens` greedily, with the very tokens that the model gives one by one.

    The first `exit` layers draft `ahead` tokens; the others start from the streams that these left, with the same keys and
    values below, and keep the drafts that they say too.
    """
    parts, read = Parts(model, exit), ids[0].tolist()
    _, stream = parts.early(read, 0)
    said, length, rounds, proposed, taken = parts.late(stream, 0)[-1:], len(read), 1, 0, 0
    while len(said) < tokens:
        streams, drafts = [], said[-1:]
        for place in range(ahead + 1):  # the last draft is read too: what follows it costs no other step
            token, stream = parts.early(drafts[-1:], length + place)
            streams.append(stream)
            drafts.append(token)
        drafts = drafts[1:-1]
        truth = parts.late(torch.cat(streams, 1), length)
        same = agreeing(drafts, truth)
        said += truth[: same + 1]
        length += same + 1
        parts.back(ahead - same)
        proposed, taken, rounds = proposed + ahead, taken + same, rounds + 1
    steps = {"target": rounds, "draft": (rounds - 1) * (ahead + 1)}
    return Speculated(torch.cat([ids, torch.tensor([said[:tokens]])], 1), proposed, taken, 0, 0, steps)


def dropout_rates(layers: int, last: float) -> list[float]:
    """How often each layer is left out: 0 for the lowest, growing exponentially to `last` for the highest."""
    return [last * (2 ** (i / (layers - 1)) - 1) for i in range(layers)]


@contextmanager
def dropping(model: Any, last: float) -> Iterator[None]:
    """Leave layers out of the model's passes, sample by sample, the higher the more often."""
    layers = stack(model, "layerskip").layers

    def after(rate: float) -> Any:
        def hook(_: Any, given: Any, out: Tensor) -> Tensor:
            kept = torch.rand(out.shape[0], 1, 1, device=out.device) >= rate
            return torch.where(kept, out, given[0])

        return hook

    rates = dropout_rates(len(layers), last)
    hooks = [layer.register_forward_hook(after(rate)) for layer, rate in zip(layers, rates, strict=True) if rate]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def exit_loss(model: Any, ids: Tensor, exits: list[int], scale: float) -> Tensor:
    """Nats of the next tokens of ids [B, T] at the last layer and, through the same norm and head, after each of `exits`.

    A mean whose weights grow with depth: those of the exits by their layers' numbers, times `scale`.
    """
    inner = stack(model, "layerskip")
    out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    layers, total, weight = len(inner.layers), out.logits.new_zeros(()), 0.0

    def nats(logits: Tensor) -> Tensor:
        return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    for after in exits:
        own = scale * math.comb(after, 2)  # the sum of the numbers of the layers up to it, from 0
        total, weight = total + own * nats(model.lm_head(inner.norm(out.hidden_states[after]))), weight + own
    own = layers - 1 + scale * math.comb(layers - 1, 2)
    return (total + own * nats(out.logits)) / (weight + own)
