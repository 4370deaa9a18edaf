"""The blocks of a serving engine that hold keys and values: who has them, and what the free ones still remember.

Free blocks lie in a queue: handed out from the front, given back at the end. Until a block is handed out again, what
is in it can be found: the rest of a sequence that was evicted, or a piece of a prompt that others begin with too.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from narrows.simulate.tiers import PIECE, Tiers


class Stretch:
    """Free blocks side by side in the queue, given back together: with a piece of a prompt (its hash), or the rest of a talk."""

    __slots__ = ("count", "piece", "talk")

    def __init__(self, count: int) -> None:
        self.count = count
        self.piece: int | None = None
        self.talk = 0


class Left(NamedTuple):
    """What is left of a sequence: pieces of its prompt, blocks after them that others have too, and the rest in free blocks."""

    pieces: int
    common: int
    rest: Stretch


class Growth:
    """New blocks that sequences want which all grow by a token a step: counted by the step of a block in which they do."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._phases = [0] * block  # sequences by (tokens in the cache - steps) mod block

    def add(self, base: int) -> None:
        """One more grows, which has `base` tokens more than there were steps."""
        self._phases[base % self._block] += 1

    def drop(self, base: int) -> None:
        """One less grows."""
        self._phases[base % self._block] -= 1

    def next(self, steps: int) -> int:
        """New blocks of the next step, after so many."""
        return self._phases[-steps % self._block]

    def wanted(self, steps: int, n: int, sequences: int) -> int:
        """New blocks of the next n steps, after so many, of all sequences."""
        phases, block = self._phases, self._block
        whole, rest = divmod(n, block)
        last = -steps % block + 1  # the phases of the steps that are left end here, and go on at the end of the list
        left = sum(phases[last - rest : last]) if rest <= last else sum(phases[:last]) + sum(phases[last - rest :])
        return whole * sequences + left

    def fitting(self, steps: int, n: int, sequences: int, free: int) -> int:
        """At most n steps, as many as there are free blocks for."""
        if self.wanted(steps, n, sequences) <= free:
            return n
        whole, left = divmod(free, sequences)
        fits = whole * self._block
        while True:
            left -= self._phases[-(steps + fits) % self._block]
            if left < 0:
                return fits
            fits += 1


class Pool:
    """`blocks` blocks of `block` tokens each; pieces that they forget go to `tiers` below."""

    def __init__(self, blocks: int, block: int, tiers: Tiers | None = None) -> None:
        self.free, self.tiers = blocks, tiers or Tiers()
        self._block, self._per = block, max(PIECE // block, 1)  # tokens of a block, blocks of a piece
        self._queue = deque([Stretch(blocks)])
        self._held: dict[int, int] = {}  # pieces in use, and by how many
        self._idle: dict[int, Stretch] = {}  # pieces in free blocks
        self._talks: dict[int, Left] = {}  # whose next turn may come, with something in free blocks

    def take(self, count: int) -> None:
        """Hand out free blocks; what was in them is forgotten."""
        self.free -= count
        queue = self._queue
        while count:
            first = queue[0]
            taken = min(count, first.count)
            first.count -= taken
            count -= taken
            if taken and first.piece is not None:
                self._idle.pop(first.piece, None)
                self.tiers.put(first.piece)
                first.piece = None
            if not first.count:
                queue.popleft()
                if first.talk:
                    del self._talks[first.talk]

    def give(self, count: int) -> Stretch:
        """Take blocks back; the stretch tells later how many of them, its first ones, have not been handed out again."""
        found = Stretch(count)
        self.free += count
        self._queue.append(found)
        return found

    def reclaim(self, stretch: Stretch, count: int) -> None:
        """Hand out blocks of a stretch again, with what is in them."""
        self.free -= count
        stretch.count -= count

    def leave(self, talk: int, left: Left) -> None:
        """A turn of a talk is over; the next one may come here."""
        self.resume(talk)
        if left.rest.count:
            left.rest.talk = talk
            self._talks[talk] = left

    def resume(self, talk: int) -> Left | None:
        """What is left here of a talk, for its next turn alone."""
        found = self._talks.pop(talk, None)
        if found:
            found.rest.talk = 0
        return found

    def found(self, hashes: tuple[int, ...], tokens: int, talk: int) -> int:
        """Tokens of a prompt, the next turn of a talk, that are there."""
        pieces, left = len(self.match(hashes, tokens)), self._talks.get(talk)
        return pieces * PIECE + (left.rest.count * self._block if left and left.pieces == pieces else 0)

    def match(self, hashes: tuple[int, ...], tokens: int) -> tuple[int, ...]:
        """The leading pieces that are there, of a prompt of which at least one token must be read."""
        count = 0
        for name in hashes[: (tokens - 1) // PIECE]:
            if not self._here(name) and self.tiers.find(name) < 0:
                break
            count += 1
        return hashes[:count]

    def _here(self, name: int) -> bool:
        return name in self._held or name in self._idle

    def idle(self, pieces: Sequence[int]) -> int:
        """Free blocks that holding these pieces takes."""
        return self._per * sum(name not in self._held for name in pieces)

    def blocks(self, pieces: Sequence[int]) -> int:
        """Blocks of pieces, whoever holds them."""
        return self._per * len(pieces)

    def below(self, pieces: Sequence[int]) -> list[tuple[int, int]]:
        """(piece, its tier) of those that are not here but further down."""
        return [(name, self.tiers.find(name)) for name in pieces if not self._here(name)]

    def hold(self, pieces: Sequence[int]) -> int:
        """One more sequence holds these pieces; picoseconds in which those that lie further down come up."""
        away = [name for name, _ in self.below(pieces)]
        for name in pieces:
            stretch = self._idle.pop(name, None)
            if stretch is not None:
                self.reclaim(stretch, self._per)
            self._held[name] = self._held.get(name, 0) + 1
        took = sum(self.tiers.fetch(name) for name in away)
        self.take(self._per * len(away))
        return took

    def share(self, pieces: Sequence[int]) -> None:
        """One more sequence holds these pieces, which another one holds."""
        for name in pieces:
            self._held[name] += 1

    def keep(self, hashes: Sequence[int], tokens: int) -> list[int]:
        """A prompt was read: its whole pieces that nobody else has can be found from now on; its sequence holds them."""
        new = [name for name in hashes[: tokens // PIECE] if not self._here(name)]
        for name in new:
            self._held[name] = 1
        return new

    def release(self, pieces: Sequence[int]) -> None:
        """One sequence less holds these pieces; of those that nobody holds, the end of a prompt is handed out first."""
        for name in reversed(pieces):
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]
                stretch = self.give(self._per)
                stretch.piece = name
                self._idle[name] = stretch
