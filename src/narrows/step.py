"""The size of one step of a network, and the quantities of it that an op's cost is linear in.

Legend: B batch (sequences), T new tokens of a sequence, S context (tokens it has in the cache before the step).
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from narrows.errors import NarrowsError, closest

LARGEST = 1e15  # whole numbers up to here, and sums of a few of them, are exact as floats
PHASES = ("prefill", "decode", "forward", "train")
_MODIFIED = re.compile(r"(\w+)\[(full|source|window=(\d+)|past=(\d+))\]")

Amount = float | NDArray[np.float64]


def _array(name: str, values: ArrayLike, least: int) -> NDArray[np.float64]:
    try:
        out = np.atleast_1d(np.asarray(values, dtype=np.float64))
    except (OverflowError, ValueError, TypeError):  # an int beyond any float, or no numbers at all
        out = np.array([np.nan])
    if out.size == 0 or not np.all((out >= least) & (out <= LARGEST) & (out == np.floor(out))):
        raise NarrowsError(
            f"{str(values)[:60]} is not a size.", where=name, remedy=f"Give whole numbers from {least} to {LARGEST:.0e}."
        )
    return out


@dataclass(frozen=True, eq=False)
class Step:
    """One step: groups of equal sequences on the last axis, independent points on the axes before it.

    A plain B x T x S step is one group; a ragged batch is one group per distinct sequence; a search over a
    million sizes is a leading axis. All fields broadcast: batch, new, past, source, each `[..., groups]`, in
    tokens (`batch` in sequences; an image counts as one sequence). `source` is the encoder's length of an
    encoder-decoder. Raises NarrowsError for sizes that are not whole or are negative.
    """

    batch: NDArray[np.float64]
    new: NDArray[np.float64]
    past: NDArray[np.float64]
    source: NDArray[np.float64]
    phase: str = "forward"

    def __init__(
        self, batch: ArrayLike = 1, new: ArrayLike = 1, past: ArrayLike = 0, source: ArrayLike = 0, phase: str = "forward"
    ) -> None:
        if phase not in PHASES:
            raise NarrowsError(f"{phase!r} is not a phase.", where="phase", remedy=closest(phase, list(PHASES)))
        object.__setattr__(self, "batch", _array("batch", batch, 1))
        object.__setattr__(self, "new", _array("new tokens", new, 1))
        object.__setattr__(self, "past", _array("context", past, 0))
        object.__setattr__(self, "source", _array("source tokens", source, 0))
        object.__setattr__(self, "phase", phase)

    @classmethod
    def prefill(cls, batch: ArrayLike = 1, prompt: ArrayLike = 2048, past: ArrayLike = 0, source: ArrayLike = 0) -> "Step":
        """Read a prompt of `prompt` tokens into the cache and give the logits of its last token."""
        return cls(batch, prompt, past, source, "prefill")

    @classmethod
    def decode(cls, batch: ArrayLike = 1, context: ArrayLike = 2048, source: ArrayLike = 0) -> "Step":
        """One new token for each of `batch` sequences that have `context` tokens in the cache."""
        return cls(batch, 1, context, source, "decode")

    @classmethod
    def forward(cls, batch: ArrayLike = 1, tokens: ArrayLike = 1, source: ArrayLike = 0) -> "Step":
        """All outputs of `tokens` tokens per sequence, without a cache (encoders, vision, scoring)."""
        return cls(batch, tokens, 0, source, "forward")

    @classmethod
    def train(cls, batch: ArrayLike = 1, tokens: ArrayLike = 2048, source: ArrayLike = 0) -> "Step":
        """Forward, backward and optimizer over `batch` sequences of `tokens` tokens."""
        return cls(batch, tokens, 0, source, "train")

    @property
    def serves(self) -> bool:
        """Whether keys, values and states are kept for the next step: in prefill and decode."""
        return self.phase in ("prefill", "decode")

    @cached_property
    def _cache(self) -> dict[str, Amount]:
        return {}

    def __getitem__(self, field: str) -> Amount:
        """A quantity summed over the groups: a float, or an array over the leading axes.

        `one`, `sequences`, `tokens` (new ones), `source` (encoder tokens), `source_pairs` (of these with each other),
        `encoded` (sequences whose source is read: like the last two, none in decode), `outputs` (rows of the last
        layer: one per sequence when serving, every token otherwise), `context` (keys read), `held` (keys in the cache
        after the step), `pairs` (causal query-key pairs, counted as executed: about half of T x T).
        Of the last three: `[full]` without the causal mask, `[source]` across to the encoder,
        `[window=W]` under a sliding window, `[past=P]` with at most P old tokens kept in the cache.
        """
        if field not in self._cache:
            per_group = np.broadcast_arrays(self._per_sequence(field) * self.batch, self.past)[0]
            total = per_group.sum(axis=-1)
            self._cache[field] = float(total) if total.ndim == 0 else total
        return self._cache[field]

    def _per_sequence(self, field: str) -> Any:
        new, past = self.new, self.past
        encoded = 0.0 if self.phase == "decode" else 1.0  # the encoder has run before the first decode step
        simple = {"one": 1.0 / (self.batch * self.batch.shape[-1]), "sequences": 1.0, "tokens": new, "encoded": encoded,
                  "source": encoded * self.source, "source_pairs": encoded * self.source**2}  # fmt: skip
        if field in simple:
            return simple[field]
        if field == "outputs":
            return 1.0 if self.phase in ("prefill", "decode") else new
        match = _MODIFIED.fullmatch(field)
        name, how = (match[1], match[2]) if match else (field, "")
        if name not in ("pairs", "context", "held"):
            raise NarrowsError(f"{field!r} is not a quantity of a step.", where="step", remedy="See Step.__getitem__.")
        if how == "source":
            return new * self.source if name == "pairs" else self.source
        if how == "full":
            return new * (past + new) if name == "pairs" else past + new
        if match and match[4]:
            kept = np.minimum(past, float(match[4]))
            if name == "held":  # a prompt is cut down as soon as the layer has read it
                return np.minimum(past + new, float(match[4])) if self.phase == "prefill" else kept + new
            past = kept
        if match and match[3]:
            window = float(match[3])
            if name == "held":
                return np.minimum(past + new, window)
            if name == "context":
                return np.minimum(past + new, window + new - 1)
            rising = np.clip(window - past, 0, new)  # queries that see fewer keys than the window holds
            return rising * past + rising * (rising + 1) / 2 + (new - rising) * window
        return new * past + new * (new + 1) / 2 if name == "pairs" else past + new

    def __repr__(self) -> str:
        def show(values: NDArray[np.float64]) -> str:
            return str(int(values[0])) if values.size == 1 else str(values.astype(int).tolist())

        parts = [f"{n}={show(getattr(self, n))}" for n in ("batch", "new", "past", "source")]
        return f"Step({', '.join(parts)}, phase={self.phase!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))
