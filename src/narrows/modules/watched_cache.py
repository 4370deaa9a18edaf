"""Layers of a KV cache that see each step's queries before attention does: they forget tokens, merge them, or hide them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from narrows.modules.eviction import SINKS, Evicted, attention_mass, turned, without


class Watched(Evicted):
    """A layer of a DynamicCache that holds at most `budget` tokens between steps, the sinks and the last (None: all).

    What a prompt brings too much is dropped at once, what a decode step does before the next one: attention reads at
    most `budget` old tokens beside the new ones.
    """

    keys: Tensor
    values: Tensor
    budget: int | None = None
    threshold: Tensor | None = None

    def __init__(self, watch: "Watch") -> None:
        super().__init__()
        self.watch = watch

    @property
    def held(self) -> int:
        return self.keys.shape[-2] if self.is_initialized else 0

    def shown(self, new: int) -> int:
        """How many keys attention is given at a step of `new` tokens."""
        return min(self.held, self.budget or self.held) + new

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.is_initialized:
            self.trim()
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        new = key_states.shape[-2]
        self.look(new)
        if new > 1:
            self.trim()
        return keys, values

    def look(self, new: int) -> None:
        """Learn from the queries of the step, whose keys are the last `new` that are held."""

    def trim(self) -> None:
        """Go back to the budget."""
        if self.budget is not None and self.held > self.budget:
            self.forget(self.held - self.budget)

    def forget(self, count: int) -> None:
        """Drop `count` tokens."""
        self.keys, self.values = (without(t, count) for t in (self.keys, self.values))

    def mass(self, new: int) -> Tensor:
        """The attention that each held key gets from the last `new` tokens, of all query heads that share it: [B, K, S]."""
        queries, scaling, mask = self.watch.seen()
        return attention_mass(queries[:, :, -new:], self.keys, scaling, mask).unflatten(1, (self.keys.shape[1], -1)).sum(2)


class Watch:
    """The hooks of an attention module: they put a layer into the cache, tell it the queries, fit the mask to what it shows."""

    def __init__(self, module: Any, layer: Callable[["Watch"], Watched]) -> None:
        self.layer = layer
        module.watch = self
        module.register_forward_pre_hook(self._before, with_kwargs=True)
        (module.q_norm if hasattr(module, "q_norm") else module.q_proj).register_forward_hook(self._keep)

    def seen(self) -> tuple[Tensor, float, Tensor | None]:
        """Queries [B, H, T, d] of this step with their positions, the scaling of their scores, and the mask."""
        width, embeddings, scaling, mask = self._step
        return turned(self._raw.reshape(*self._raw.shape[:2], -1, width).transpose(1, 2), embeddings), scaling, mask

    def _keep(self, module: Any, args: Any, out: Tensor) -> None:
        self._raw = out

    def _before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if cache is None:
            return args, kwargs
        if module.layer_idx >= len(cache.layers):
            cache.layers.append(self.layer(self))
        elif not cache.layers[module.layer_idx].is_initialized and not isinstance(cache.layers[module.layer_idx], Watched):
            cache.layers[module.layer_idx] = self.layer(self)
        layer = cache.layers[module.layer_idx]
        if mask is not None and isinstance(layer, Watched):
            # masks are made for all tokens seen; of those before this step, what is shown is visible
            mask = mask[..., -layer.shown(kwargs["hidden_states"].shape[1]) :]
        self._step = module.head_dim, kwargs.get("position_embeddings"), module.scaling, mask
        return args, {**kwargs, "attention_mask": mask}


class Rolling:
    """Of `layers` layers, lets the `lazy` laziest of each prompt roll: they keep `window` tokens, the sinks and the last.

    A layer is as lazy as its last `asking` queries attend to those tokens alone. While a prompt is read, no more layers
    than stay whole hold all of it: as soon as one is too many, the laziest of them starts to roll.
    """

    def __init__(self, layers: int, lazy: int, window: int, asking: int, by: Callable[[int, float], float]) -> None:
        self.layers, self.whole, self.window, self.asking, self.by = layers, layers - lazy, window, asking, by
        self.open: list[tuple[float, Watched]] = []

    def layer(self, index: int) -> Callable[[Watch], Watched]:
        """How to make the cache's layer of that index."""
        return lambda watch: _Lazy(watch, index, self)

    def add(self, index: int, layer: Watched, laziness: float) -> None:
        """Take in what a layer's prompt has shown."""
        self.open.append((self.by(index, laziness), layer))
        if len(self.open) > self.whole:
            laziest = max(self.open, key=lambda entry: entry[0])
            self.open.remove(laziest)
            laziest[1].budget = self.window
            laziest[1].trim()
        if index == self.layers - 1:
            self.open = []


class _Lazy(Watched):
    def __init__(self, watch: Watch, index: int, rolling: Rolling) -> None:
        super().__init__(watch)
        self.index, self.rolling = index, rolling

    def look(self, new: int) -> None:
        if self.seen > new:
            return
        asking = min(new, self.rolling.asking)
        mass = self.mass(asking)
        near = mass.narrow(-1, 0, min(SINKS, new)).sum() + mass[..., SINKS:][..., -(self.rolling.window - SINKS) :].sum()
        # while sizes are captured there are no values: any layers will do, since all are alike
        self.rolling.add(self.index, self, 0.0 if near.is_meta else float(near / mass.sum()))


class Merging:
    """Shares `budget` tokens a layer out among layers by each prompt, and says how they forget; `whole` ones keep all.

    spread   layers whose attention is spread evenly over the prompt get more than those that look at few tokens
    merge    a forgotten token is mixed into the most similar one kept, if it is more similar than usual; `memory` is the
             weight of the newest in what is usual
    recent   share of a layer's budget that is for the last tokens; 1: nothing but these and the sinks
    """

    def __init__(
        self, layers: int, whole: frozenset[int], budget: int, spread: bool, merge: bool, recent: float, memory: float
    ) -> None:
        self.layers, self.whole, self.budget = layers - len(whole), whole, budget
        self.spread, self.merge, self.recent, self.memory = spread, merge, recent, memory
        self.open: list[tuple[Tensor, Watched]] = []

    def layer(self, index: int) -> Callable[[Watch], Watched]:
        """How to make the cache's layer of that index."""
        return lambda watch: Watched(watch) if index in self.whole else _Merged(watch, self)

    def add(self, layer: Watched, scores: Tensor) -> None:
        """Take in the attention [B, K, S] that a layer's keys got from the prompt; after the last layer, share out."""
        self.open.append((scores.var(-1, correction=0).mean(), layer))
        if len(self.open) == self.layers:
            for budget, (_, one) in zip(self._shared(torch.stack([v for v, _ in self.open])), self.open, strict=True):
                one.budget = budget
                one.trim()
            self.open = []

    def _shared(self, variances: Tensor) -> list[int]:
        """Whole numbers with the total of the budget, in proportion to exp(-v), v the variances brought to [0, 1]."""
        if not self.spread or variances.is_meta:  # while sizes are captured there are no values: the total is what counts
            return [self.budget] * self.layers
        range_ = variances.max() - variances.min()
        parts = (-(variances - variances.min()) / range_.clamp(min=1e-12)).softmax(0) * self.budget * self.layers
        whole = parts.long()
        whole[(parts - whole).topk(self.budget * self.layers - int(whole.sum())).indices] += 1
        return whole.tolist()  # type: ignore[no-any-return]


class _Merged(Watched):
    scores: Tensor

    def __init__(self, watch: Watch, merging: Merging) -> None:
        super().__init__(watch)
        self.merging = merging

    def look(self, new: int) -> None:
        mass = self.mass(new)
        first = self.seen == new
        self.scores = mass if first else pad(self.scores, (0, new)) + mass
        if first:
            self.merging.add(self, mass)

    def forget(self, count: int) -> None:
        assert self.budget is not None
        if self.merging.recent == 1:
            super().forget(count)
            self.scores = without(self.scores[..., None], count)[..., 0]
            return
        recent = max(1, round(self.budget * self.merging.recent))
        old = self.scores[..., :-recent].clone()
        old[..., :SINKS] = math.inf
        order = old.argsort(-1, descending=True)
        last = torch.arange(recent, device=old.device).expand(*old.shape[:2], recent) + old.shape[-1]
        kept = torch.cat([order[..., :-count].sort(-1).values, last], -1)
        gone = order[..., -count:]
        before = self.keys, self.values
        self.scores = self.scores.gather(-1, kept)
        self.keys, self.values = (_taken(t, kept) for t in before)
        if self.merging.merge:
            self._merge(*(_taken(t, gone) for t in before))

    def _merge(self, keys: Tensor, values: Tensor) -> None:
        """Mix forgotten keys and values [B, K, n, d] into the kept ones: weights e^similarity, and e for the kept one."""
        likeness, target = (normalize(keys, dim=-1) @ normalize(self.keys, dim=-1).mT).max(-1)
        usual, memory = likeness.mean(), self.merging.memory
        self.threshold = usual if self.threshold is None else memory * usual + (1 - memory) * self.threshold
        weights = likeness.exp() * (likeness >= self.threshold)
        total = torch.full_like(self.keys[..., 0], math.e).scatter_add(-1, target, weights)[..., None]
        self.keys, self.values = (
            (math.e * kept).scatter_add(-2, target[..., None].expand_as(gone), weights[..., None] * gone) / total
            for kept, gone in ((self.keys, keys), (self.values, values))
        )


def _taken(t: Tensor, index: Tensor) -> Tensor:
    """The tokens of t [B, K, S, d] at index [B, K, n]."""
    return t.gather(2, index[..., None].expand(*index.shape, t.shape[-1]))


class Persisting:
    """Layers that keep all tokens but attend to `budget` old ones: those that a selecting layer below attended to the most.

    `whole` layers attend to all, `selecting` ones as well and choose for those above; `by` attention, recency or random.
    """

    def __init__(self, budget: int, whole: frozenset[int], selecting: frozenset[int], by: str) -> None:
        self.budget, self.whole, self.selecting, self.by = budget, whole, selecting, by
        self.chosen: Tensor | None = None

    def layer(self, index: int) -> Callable[[Watch], Watched]:
        """How to make the cache's layer of that index."""
        return lambda watch: _Persistent(watch, index, self)


class _Persistent(Watched):
    def __init__(self, watch: Watch, index: int, persisting: Persisting) -> None:
        super().__init__(watch)
        self.persisting, self.sparse = persisting, index not in persisting.whole | persisting.selecting
        self.selects = index in persisting.selecting

    def shown(self, new: int) -> int:
        return (min(self.held, self.persisting.budget) if self.sparse else self.held) + new

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        past, new, most = self.held, key_states.shape[-2], self.persisting.budget
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if past <= most:
            return keys, values
        if self.selects and self.persisting.by == "attention":
            # all heads together: the heads of one layer do not correspond to those of the next
            best = self.mass(new)[..., :past].sum(1, keepdim=True).topk(most).indices
            self.persisting.chosen = best.expand(-1, keys.shape[1], -1)
        if not self.sparse:
            return keys, values
        fresh = torch.arange(past, past + new, device=keys.device).expand(*keys.shape[:2], new)
        index = torch.cat([self._chosen(past), fresh], -1)
        return _taken(keys, index), _taken(values, index)

    def _chosen(self, past: int) -> Tensor:
        """Old tokens [B, K, budget]."""
        most, shape = self.persisting.budget, self.keys.shape[:2]
        if self.persisting.by == "attention":
            assert self.persisting.chosen is not None
            return self.persisting.chosen
        if self.persisting.by == "random":
            return torch.rand(*shape, past, device=self.keys.device).topk(most).indices
        place = torch.arange(most, device=self.keys.device)
        return torch.where(place < SINKS, place, place + past - most).expand(*shape, most)
