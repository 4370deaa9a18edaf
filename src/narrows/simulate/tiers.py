"""What lies below a device's memory: the host's memory, then a disk.

Both hold prompts that were read before; who was used the longest ago gives way, in each. The first also holds the keys and
values of sequences that lost their room on the device while they decoded: prompts give way to them, they to nobody.
"""

from collections import OrderedDict
from dataclasses import dataclass

PIECE = 512  # tokens that one hash of a prompt names, as in Mooncake's traces


@dataclass(frozen=True, slots=True)
class Tier:
    """Room for so many pieces of prompts (PIECE tokens), each of which takes `fetch` picoseconds to the device."""

    name: str
    pieces: int
    fetch: int


class Tiers:
    """The pieces in each tier: what a device forgets comes into the first, what a tier has no room for into the next."""

    def __init__(self, tiers: tuple[Tier, ...] = ()) -> None:
        self.tiers = tiers
        self.swapped = 0  # tokens of sequences that are in the first
        self._held: list[OrderedDict[int, None]] = [OrderedDict() for _ in tiers]

    def put(self, piece: int) -> None:
        """A device forgets a piece."""
        self._put(piece, 0)

    def _put(self, piece: int, first: int) -> None:
        for place in range(first, len(self.tiers)):
            held = self._held[place]
            held[piece] = None
            held.move_to_end(piece)
            if len(held) <= self._room(place):
                return
            piece, _ = held.popitem(last=False)

    def _room(self, place: int) -> int:
        """Pieces of prompts that a tier has room for."""
        return self.tiers[place].pieces - (0 if place else -(-self.swapped // PIECE))

    def swap(self, tokens: int) -> bool:
        """A sequence of so many tokens leaves the device for the first tier; False where sequences leave it no room there."""
        if not self.tiers or self.swapped + tokens > self.tiers[0].pieces * PIECE:
            return False
        self.swapped += tokens
        while len(self._held[0]) > self._room(0):
            self._put(self._held[0].popitem(last=False)[0], 1)
        return True

    def back(self, tokens: int) -> None:
        """A sequence that was swapped goes back to the device."""
        self.swapped -= tokens

    def find(self, piece: int) -> int:
        """The first tier that has a piece; -1 where none has."""
        return next((i for i, held in enumerate(self._held) if piece in held), -1)

    def fetch(self, piece: int) -> int:
        """A piece that is here goes to the device: how long that takes; its copy stays, as the last that was used."""
        place = self.find(piece)
        self._held[place].move_to_end(piece)
        return self.tiers[place].fetch
