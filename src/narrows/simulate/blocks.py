"""The blocks of a serving engine that hold keys and values: who has them, and what the free ones still remember.

Free blocks lie in a queue: handed out from the front, given back at the end. Until a block is handed out again, what
is in it can be found: the rest of a sequence that was evicted, or a piece of a prompt that others begin with too.
"""

from collections import deque
from collections.abc import Sequence

from narrows.simulate.tiers import Tiers

PIECE = 512  # tokens that one hash of a prompt names, as in Mooncake's traces


class Stretch:
    """Free blocks side by side in the queue, given back together; `piece` is the hash of the prompt's piece in them."""

    __slots__ = ("count", "piece")

    def __init__(self, count: int, piece: int | None = None) -> None:
        self.count, self.piece = count, piece


class Pool:
    """`blocks` blocks of `block` tokens each; pieces that they forget go to `tiers` below."""

    def __init__(self, blocks: int, block: int, tiers: Tiers | None = None) -> None:
        self.free, self._tiers = blocks, tiers or Tiers()
        self._per = max(PIECE // block, 1)  # blocks of a piece
        self._queue = deque([Stretch(blocks)])
        self._held: dict[int, int] = {}  # pieces in use, and by how many
        self._idle: dict[int, Stretch] = {}  # pieces in free blocks

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
                self._tiers.put(first.piece)
                first.piece = None
            if not first.count:
                queue.popleft()

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

    def match(self, hashes: tuple[int, ...], tokens: int) -> tuple[int, ...]:
        """The leading pieces that are there, of a prompt of which at least one token must be read."""
        count = 0
        for name in hashes[: (tokens - 1) // PIECE]:
            if not self._here(name) and self._tiers.find(name) < 0:
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
        return [(name, self._tiers.find(name)) for name in pieces if not self._here(name)]

    def hold(self, pieces: Sequence[int]) -> int:
        """One more sequence holds these pieces; picoseconds in which those that lie further down come up."""
        away = [name for name, _ in self.below(pieces)]
        for name in pieces:
            stretch = self._idle.pop(name, None)
            if stretch is not None:
                self.reclaim(stretch, self._per)
            self._held[name] = self._held.get(name, 0) + 1
        took = sum(self._tiers.fetch(name) for name in away)
        self.take(self._per * len(away))
        return took

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
