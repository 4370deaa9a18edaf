"""How a vector is cut for an exchange in signs: who serves what, and what a message weighs.

No torch here, so that a graph counts the same bytes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """`elements` numbers over `ranks` ranks: one equal piece each, in chunks of at most `chunk` that share a scale.

    The last piece ends in padding, and a chunk fills whole bytes of signs.
    """

    elements: int
    ranks: int
    chunk: int

    @property
    def chunks(self) -> int:
        """Scales per piece."""
        return -(-self.elements // (self.ranks * self.chunk))

    @property
    def piece(self) -> int:
        """Numbers that one rank serves, padding included."""
        return self.chunks * 8 * -(-self.elements // (8 * self.ranks * self.chunks))

    @property
    def message_bytes(self) -> int:
        """Bytes of one compressed piece: its signs and its fp32 scales."""
        return self.piece // 8 + 4 * self.chunks
