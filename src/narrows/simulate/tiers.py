"""What lies below a device's memory for prompts that were read before: the host's memory, then a disk.

Who was used the longest ago gives way, in each.
"""

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tier:
    """Room for so many pieces of prompts (`blocks.PIECE` tokens), each of which takes `fetch` picoseconds to the device."""

    name: str
    pieces: int
    fetch: int


class Tiers:
    """The pieces in each tier: what a device forgets comes into the first, what a tier has no room for into the next."""

    def __init__(self, tiers: tuple[Tier, ...] = ()) -> None:
        self.tiers = tiers
        self._held: list[OrderedDict[int, None]] = [OrderedDict() for _ in tiers]

    def put(self, piece: int) -> None:
        """A device forgets a piece."""
        for tier, held in zip(self.tiers, self._held, strict=True):
            held[piece] = None
            held.move_to_end(piece)
            if len(held) <= tier.pieces:
                return
            piece, _ = held.popitem(last=False)

    def find(self, piece: int) -> int:
        """The first tier that has a piece; -1 where none has."""
        return next((i for i, held in enumerate(self._held) if piece in held), -1)

    def fetch(self, piece: int) -> int:
        """A piece that is here goes to the device: how long that takes; its copy stays, as the last that was used."""
        place = self.find(piece)
        self._held[place].move_to_end(piece)
        return self.tiers[place].fetch
