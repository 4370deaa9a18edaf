"""What goes into a serving engine and what comes out: a request, what the engine knows of it while it is inside, its answer."""

from dataclasses import dataclass
from typing import NamedTuple

from narrows.simulate.blocks import Stretch


@dataclass(frozen=True, slots=True)
class Request:
    """What a client sends at `arrival` (picoseconds): a prompt of so many tokens, and how many it will be answered with.

    hashes name the pieces of its prompt (`blocks.PIECE` tokens each): equal hashes, equal text up to there.
    `read`: its prompt was read elsewhere, its first token given, and its keys and values come with it.
    """

    arrival: int
    prompt: int
    output: int
    hashes: tuple[int, ...] = ()
    name: str = ""
    read: bool = False


PARTS = ("queue", "cold_start", "prompt", "interference", "decode", "communication", "host", "power_cap", "preemption",
         "transfer")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """A request that was served: picoseconds at which it was let in, gave its first and its last token, and where they went.

    The parts add up to last - arrival: `queue` before it was let in, but for `cold_start`, before its replica served; `prompt`
    reading its own; `interference` of other prompts; `decode`, `communication` and `host` of the steps that gave its tokens;
    `power_cap` what a cap adds to these, to the prompts in them and to its own; `preemption` from losing its room until it had
    caught up again; `transfer` of its keys and values from where its prompt was read, or what was
    remembered of it lay.
    """

    request: Request
    admitted: int
    first: int
    last: int
    cached: int
    preemptions: int
    queue: int
    prompt: int
    interference: int
    decode: int
    communication: int
    host: int
    preemption: int
    transfer: int = 0
    cold_start: int = 0
    power_cap: int = 0

    def then(self, request: Request, later: "Answer") -> "Answer":
        """The whole answer to a request whose prompt was read here and whose other tokens came `later`, from elsewhere."""
        parts = {part: getattr(self, part) + getattr(later, part) for part in PARTS}
        parts["transfer"] += later.request.arrival - self.last
        again = self.preemptions + later.preemptions
        return Answer(request, self.admitted, self.first, later.last, self.cached, again, **parts)


class Sequence:
    """A request inside the engine: `todo` tokens to read of which `read` are read, `left` tokens still to give."""

    __slots__ = ("admitted", "base", "blocks", "cached", "capped", "decode", "end", "fetch", "first", "host", "interference",
                 "left", "lost", "moved", "out", "own", "pieces", "preempted", "read", "request", "seen", "sent", "swapped",
                 "times", "todo", "turn")  # fmt: skip

    def __init__(self, request: Request) -> None:
        self.request, self.todo, self.read, self.left = request, request.prompt, 0, request.output
        self.admitted = self.first = self.preempted = -1
        self.end = self.turn = self.base = self.blocks = self.cached = self.times = 0
        self.capped = self.fetch = self.moved = self.swapped = self.own = self.host = self.decode = self.sent = (
            self.interference
        ) = self.out = 0
        self.seen = (0, 0, 0, 0, 0)
        self.pieces: list[int] = []  # of its prompt, that it shares through the prefix cache
        self.lost: tuple[int, Stretch] | None = None  # pieces it shared when it was evicted, and where its other blocks went


class Piece(NamedTuple):
    """A piece of a prompt that a step reads, and picoseconds: its own, what a power cap adds, to fetch what was remembered."""

    sequence: Sequence
    tokens: int
    own: int
    capped: int
    moved: int
