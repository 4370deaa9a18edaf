"""Greedy generation for requests that come at any time: one batch whose slots are filled and freed between passes."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache

from narrows.errors import NarrowsError


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt (token ids) that comes before pass `arrives`, and how many tokens it is answered with."""

    arrives: int
    prompt: Sequence[int]
    tokens: int


@dataclass(frozen=True, slots=True)
class Generated:
    """The answers in the order of the requests; passes of one token each over all slots; most tokens that the slots held."""

    answers: list[list[int]]
    passes: int
    most_held: int


class Slots:
    """Keys and values of the sequences that run, one slot each, ending at the same column: shorter ones begin later."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, DynamicCache()
        self.owners: list[int] = []
        self.lengths: list[int] = []  # tokens of each that are held

    @property
    def width(self) -> int:
        """Columns of the buffer: as many as the longest holds."""
        return max(self.lengths, default=0)

    @property
    def held(self) -> int:
        """Tokens that the buffer has room for."""
        return len(self.owners) * self.width

    def join(self, owner: int, prompt: Sequence[int]) -> int:
        """Read a prompt by itself and give it a slot; the first token of its answer."""
        new = DynamicCache()
        first = self.model(input_ids=torch.tensor([list(prompt)]), past_key_values=new).logits[0, -1].argmax()
        if self.owners:
            width = max(self.width, len(prompt))
            for ours, theirs in zip(self.cache.layers, new.layers, strict=True):
                ours.keys = torch.cat([_widened(ours.keys, width), _widened(theirs.keys, width)])
                ours.values = torch.cat([_widened(ours.values, width), _widened(theirs.values, width)])
        else:
            self.cache = new
        self.owners.append(owner)
        self.lengths.append(len(prompt))
        return int(first)

    def advance(self, last: Sequence[int]) -> list[int]:
        """One pass: the token that follows the last one of every slot."""
        starts = self.width - torch.tensor(self.lengths)[:, None]
        visible = torch.arange(self.width + 1)[None] >= starts
        places = torch.tensor(self.lengths)[:, None]
        out = self.model(input_ids=torch.tensor(last)[:, None], attention_mask=visible.long(), position_ids=places,
                         past_key_values=self.cache)  # fmt: skip
        self.lengths = [n + 1 for n in self.lengths]
        return out.logits[:, -1].argmax(-1).tolist()  # type: ignore[no-any-return]

    def leave(self, slot: int) -> None:
        """Free a slot: the last one moves into it, and columns that nobody needs any more go."""
        for kept in (self.owners, self.lengths):
            kept[slot] = kept[-1]
            kept.pop()
        for layer in self.cache.layers:
            layer.keys, layer.values = (_freed(buffer, slot, self.width) for buffer in (layer.keys, layer.values))


def _widened(buffer: Tensor, width: int) -> Tensor:
    """[B, K, S, d] with empty columns before it, up to `width`."""
    return pad(buffer, (0, 0, width - buffer.shape[2], 0))


def _freed(buffer: Tensor, slot: int, width: int) -> Tensor:
    buffer[slot] = buffer[-1]
    return buffer[:-1, :, buffer.shape[2] - width :]


@torch.no_grad()  # type: ignore[untyped-decorator]
def generate(model: Any, asked: Sequence[Asked], fused: bool = True) -> Generated:
    """Answer all requests (any order of arrival) with the tokens that each would get alone, one pass for all that run.

    Fused, a request joins those that run as soon as it came; otherwise all that wait begin together once nobody runs. Time
    is counted in passes, and passes over when nobody is there. Raises NarrowsError for an empty prompt or answer.
    """
    for number, one in enumerate(asked):
        if not one.prompt or one.tokens < 1:
            problem = f"request {number} has {len(one.prompt)} tokens and asks for {one.tokens}."
            raise NarrowsError(problem, where="generate", remedy="Give at least one of each.")
    coming = deque(sorted(range(len(asked)), key=lambda number: asked[number].arrives))
    answers: list[list[int]] = [[] for _ in asked]
    slots, now, passes, most_held = Slots(model), 0, 0, 0
    while coming or slots.owners:
        if not slots.owners:
            now = max(now, asked[coming[0]].arrives)
        if fused or not slots.owners:
            while coming and asked[coming[0]].arrives <= now:
                owner = coming.popleft()
                answers[owner].append(slots.join(owner, asked[owner].prompt))
        _leave(slots, asked, answers)
        if slots.owners:
            most_held = max(most_held, slots.held)
            said = slots.advance([answers[owner][-1] for owner in slots.owners])
            for owner, token in zip(slots.owners, said, strict=True):
                answers[owner].append(token)
            now, passes = now + 1, passes + 1
            _leave(slots, asked, answers)
    return Generated(answers, passes, most_held)


def _leave(slots: Slots, asked: Sequence[Asked], answers: Sequence[Sequence[int]]) -> None:
    """Free the slots of all that have their tokens, from the last, which may move."""
    for slot in reversed(range(len(slots.owners))):
        owner = slots.owners[slot]
        if len(answers[owner]) == asked[owner].tokens:
            slots.leave(slot)
