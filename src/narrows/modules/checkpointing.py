"""Containers whose blocks run in segments that are computed again in the backward pass instead of being kept."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Segment:
    """Some blocks in a row, as one block of which only the input is kept.

    Callable like a block: the first argument is the stream, the others go to every block. A cache is left out: the second
    run would write into it again.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args = tuple(None if _is_cache(a) else a for a in args)
        kwargs = {name: None if _is_cache(a) else a for name, a in kwargs.items()}
        # the whole segment runs again: stopping at the last tensor that is needed would save one product per segment,
        # which no graph could know of
        return checkpoint(self._run, *args, use_reentrant=False, early_stop=False, **kwargs)

    def _run(self, stream: Any, *args: Any, **kwargs: Any) -> Any:
        out = stream
        for block in self.blocks:
            out = block(out[0] if isinstance(out, tuple) else out, *args, **kwargs)
        return out


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length")


class _Segmented:
    """A container that is iterated by segment while gradients are wanted, and by block otherwise.

    Its blocks keep their names and places, so a state dict is what it was. The whole as a slice is the container itself.
    """

    ends: tuple[int, ...]
    _modules: dict[str, nn.Module]

    def __iter__(self) -> Iterator[Any]:
        blocks = list(self._modules.values())
        if not (torch.is_grad_enabled() and self.training):  # type: ignore[attr-defined]
            return iter(blocks)
        return iter([Segment(blocks[start:end]) for start, end in zip((0, *self.ends), self.ends, strict=False)])

    def __getitem__(self, index: Any) -> Any:
        blocks = list(self._modules.values())
        if isinstance(index, slice):
            return self if blocks[index] == blocks else nn.ModuleList(blocks[index])
        return blocks[index]


class SegmentedList(_Segmented, nn.ModuleList):  # type: ignore[misc]
    """A ModuleList that runs in segments."""


class SegmentedSequential(_Segmented, nn.Sequential):  # type: ignore[misc]
    """A Sequential that runs in segments."""


def split(container: nn.ModuleList | nn.Sequential, ends: tuple[int, ...]) -> None:
    """Let a container run in segments that end before the blocks `ends` (the last: their number); in place."""
    container.__class__ = SegmentedList if isinstance(container, nn.ModuleList) else SegmentedSequential
    container.ends = ends  # type: ignore[assignment]
