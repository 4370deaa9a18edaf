"""Which sequence has which blocks: its own, pieces of its prompt, and what the answers to one prompt have in common."""

from narrows.simulate.blocks import Left, Pool
from narrows.simulate.requests import Request, Sequence
from narrows.simulate.rules import Rules
from narrows.simulate.tiers import Tiers


class Room:
    """The blocks of an engine (`pool`) and what its sequences have of them."""

    def __init__(self, blocks: int, rules: Rules, tiers: Tiers | None = None) -> None:
        self.pool = Pool(blocks, rules.block, tiers)
        self._block, self._remembers = rules.block, rules.prefix_cache

    def blocks(self, sequence: Sequence, tokens: int) -> int:
        """Blocks of so many tokens of its prompt; at the end, each further answer has a copy of a block that is not full."""
        whole = -(-tokens // self._block)
        return whole + sequence.forks if sequence.forks and tokens == sequence.todo and tokens % self._block else whole

    def lacks(self, sequence: Sequence, piece: int) -> int:
        """Blocks that the next piece of its prompt needs and that it has not."""
        return self.blocks(sequence, sequence.read + piece) - sequence.blocks

    def take(self, sequence: Sequence, piece: int) -> None:
        """It gets the blocks of the next piece of its prompt."""
        tokens = sequence.read + piece
        whole = self.blocks(sequence, tokens) if sequence.forks else -(-tokens // self._block)
        self.pool.take(whole - sequence.blocks)
        sequence.blocks = whole

    def keep(self, sequence: Sequence) -> None:
        """Its prompt is read: whole pieces that nobody else has can be found by others from now on."""
        if self._remembers and sequence.request.hashes:
            sequence.pieces += self.pool.keep(sequence.request.hashes, sequence.request.prompt)

    def fork(self, sequence: Sequence) -> list[Sequence]:
        """The further answers to its prompt: the full blocks are shared, each has a copy of the last one that is not."""
        pool, forks, full = self.pool, sequence.forks, sequence.todo // self._block
        sequence.blocks -= forks * (sequence.blocks > full)
        further = sequence.fork(full - pool.blocks(sequence.pieces))
        for one in further:
            pool.share(one.pieces)
            one.blocks = sequence.blocks
        return further

    def release(self, sequence: Sequence) -> Left:
        """Its blocks are free, but for what others hold; what is in them can be found until they are handed out."""
        pool, family = self.pool, sequence.family if sequence.shares else None
        pieces, common = len(sequence.pieces), family.blocks if family else 0
        rest = pool.give(sequence.blocks - pool.blocks(sequence.pieces) - common)
        if family:
            sequence.shares = False
            family.holders -= 1
            if not family.holders:
                pool.give(common)
        pool.release(sequence.pieces)
        sequence.pieces, sequence.blocks = [], 0
        return Left(pieces, common, rest)

    def finish(self, sequence: Sequence) -> None:
        """Release it for good. The next turn of its session finds what it has: whole pieces by name, the rest as it lies."""
        request = sequence.request
        following = request.next_turn if request.then and self._remembers and not sequence.family else None
        if following is None:
            self.release(sequence)
            return
        tokens = request.prompt + request.output - 1
        if tokens % self._block:  # a block that is not full is of no use
            self.pool.give(1)
            sequence.blocks -= 1
        sequence.pieces += self.pool.keep(following.hashes, tokens)
        self.pool.leave(request.session, self.release(sequence))

    def found(self, request: Request) -> int:
        """Tokens of a prompt that are there."""
        return self.pool.found(request.hashes, request.prompt, request.session) if self._remembers else 0

    def remembered(self, sequence: Sequence) -> tuple[tuple[int, ...], int, int]:
        """Pieces of its prompt that are there, and blocks left of it or of the turn before: its own, its family's."""
        if not self._remembers:
            return (), 0, 0
        hashes, lost = sequence.request.hashes, sequence.lost
        found = self.pool.match(hashes, sequence.todo) if hashes else ()
        if lost is None or len(found) != lost.pieces or (lost.common and sequence.family and not sequence.family.holders):
            return found, 0, 0
        whole = (sequence.todo - 1) // self._block - self.pool.blocks(found) - lost.common
        return found, min(lost.rest.count, whole), lost.common
