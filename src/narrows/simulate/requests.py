"""What goes into a serving engine and what comes out: a request, what the engine knows of it while it is inside, its answer."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from narrows.simulate.blocks import Left
from narrows.simulate.rules import Rules
from narrows.simulate.tiers import PIECE


@dataclass(frozen=True, slots=True)
class Request:
    """What a client sends at `arrival` (picoseconds): a prompt of so many tokens, and how many it will be answered with.

    hashes   name the pieces of its prompt (`blocks.PIECE` tokens each): equal hashes, equal text up to there
    read     its prompt was read elsewhere, its first token given, and its keys and values come with it
    also     tokens of further answers to the same prompt, which decode beside the first one
    session  the talk that it is a turn of (0: none): the prompt of the next turn begins with its prompt and its answer
    then     requests that follow its answer; their arrivals count from its last token
    """

    arrival: int
    prompt: int
    output: int
    hashes: tuple[int, ...] = ()
    name: str = ""
    read: bool = False
    also: tuple[int, ...] = ()
    session: int = 0
    then: tuple["Request", ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of its longest answer."""
        return max(self.output, *self.also) if self.also else self.output

    @property
    def tokens(self) -> int:
        """Tokens of all its answers."""
        return self.output + sum(self.also) if self.also else self.output

    @property
    def next_turn(self) -> "Request | None":
        """What goes on with its session."""
        return next((one for one in self.then if one.session == self.session), None) if self.session else None

    def followers(self) -> Iterator["Request"]:
        """All requests that would follow its answer, their answers and so on."""
        left = list(reversed(self.then))
        while left:
            one = left.pop()
            yield one
            left.extend(reversed(one.then))

    def refusal(self, rules: Rules, blocks: int) -> str:
        """Why an engine of these rules with so many blocks can never serve it; empty where it can."""
        prompt, block, copies = self.prompt, rules.block, len(self.also)
        most = -(-(prompt + self.longest - 1) // block)
        if copies and prompt % block:
            most = max(most, -(-prompt // block) + copies)
        if prompt < 1 or self.output < 1 or (copies and min(self.also) < 1):
            return "a prompt and an answer have at least one token"
        if most > blocks:
            return f"it needs {most} blocks and there are {blocks}"
        if copies >= rules.max_sequences:
            return f"it has {1 + copies} answers and {rules.max_sequences} run at a time"
        if not rules.chunked and prompt > rules.max_tokens:
            return f"its prompt is longer than a step of {rules.max_tokens} tokens"
        return ""


def chained(session: int, turns: list[Request]) -> Request:
    """Turns, each with its whole prompt and (but for the first) its think time as arrival, as a request that the others follow.

    Pieces of their prompts that have no names get some that are this session's own.
    """
    if len(turns) == 1:
        return turns[0]
    following: tuple[Request, ...] = ()
    for number, turn in reversed(list(enumerate(turns, 1))):
        named = len(turn.hashes)
        hashes = (*turn.hashes, *(-(session << 32 | piece) - 1 for piece in range(named, turn.prompt // PIECE)))
        name = turn.name or f"{session}.{number}"
        following = (replace(turn, hashes=hashes, name=name, session=session, then=following),)
    return following[0]


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

    @property
    def phases(self) -> dict[str, tuple[int, int]]:
        """From when to when it was in each state."""
        arrival = self.request.arrival
        return {"waiting": (arrival, self.admitted), "being read": (self.admitted, self.first),
                "being answered": (self.first, self.last)}  # fmt: skip

    def then(self, request: Request, later: "Answer") -> "Answer":
        """The whole answer to a request whose prompt was read here and whose other tokens came `later`, from elsewhere."""
        parts = {part: getattr(self, part) + getattr(later, part) for part in PARTS}
        parts["transfer"] += later.request.arrival - self.last
        again = self.preemptions + later.preemptions
        return Answer(request, self.admitted, self.first, later.last, self.cached, again, **parts)


Spent = tuple[int, int, int, int, int]  # picoseconds of decoding, communication, host, prompts and a power cap


class Family:
    """The answers to one prompt: so many are to come, and `holders` of them have `blocks` of the prompt in common."""

    __slots__ = ("blocks", "holders", "preemptions", "to_come")

    def __init__(self, answers: int, blocks: int) -> None:
        self.to_come = self.holders = answers
        self.blocks, self.preemptions = blocks, 0


class Sequence:
    """One answer to a request inside the engine: `todo` tokens to read of which `read` are, `left` tokens still to give.

    Until its prompt is read, it stands for `forks` further answers too.
    """

    __slots__ = ("admitted", "base", "blocks", "cached", "capped", "decode", "end", "family", "fetch", "first", "forks", "host",
                 "interference", "left", "lost", "moved", "out", "own", "pieces", "preempted", "read", "request", "seen", "sent",
                 "shares", "swapped", "times", "todo", "turn")  # fmt: skip

    def __init__(self, request: Request) -> None:
        self.request, self.todo, self.read, self.left = request, request.prompt, 0, request.output
        self.admitted = self.first = self.preempted = -1
        self.end = self.turn = self.base = self.blocks = self.cached = self.times = 0
        self.capped = self.fetch = self.moved = self.swapped = self.own = self.host = self.decode = self.sent = (
            self.interference
        ) = self.out = 0
        self.seen: Spent = (0, 0, 0, 0, 0)
        self.pieces: list[int] = []  # of its prompt, that it shares through the prefix cache
        self.lost: Left | None = None  # when it was evicted, or when the turn before it ended
        self.forks = len(request.also)
        self.family: Family | None = None
        self.shares = False  # the blocks of its family

    @property
    def coming(self) -> int:
        """Tokens still to give, of all the answers that it stands for."""
        return self.left + (sum(self.request.also) if self.forks else 0)

    def account(self, now: Spent) -> None:
        """Add what the engine spent since it began to decode to its own account."""
        then = self.seen
        self.decode += now[0] - then[0]
        self.sent += now[1] - then[1]
        self.host += now[2] - then[2]
        self.interference += now[3] - then[3]
        self.capped += now[4] - then[4]

    def fork(self, blocks: int) -> "list[Sequence]":
        """The further answers, as old as this one, whose prompt was just read; all share so many blocks of it."""
        self.family, self.shares, self.forks, found = Family(1 + self.forks, blocks), True, 0, []
        for output in self.request.also:
            one = Sequence(self.request)
            for name in _COMMON:
                setattr(one, name, getattr(self, name))
            one.left, one.pieces = output, list(self.pieces)
            found.append(one)
        return found

    def answer(self, last: int, ready: int) -> Answer:
        """What became of it, in an engine that served from `ready` on."""
        arrival, again = self.request.arrival, self.family.preemptions if self.family else self.times
        waited, cold = self.admitted - arrival, max(0, min(self.admitted, ready) - arrival)
        return Answer(self.request, self.admitted, self.first, last, self.cached, again, waited - cold, self.own,
                      self.interference, self.decode, self.sent, self.host, self.out, self.moved, cold, self.capped)  # fmt: skip


_COMMON = ("admitted", "cached", "capped", "family", "first", "forks", "host", "interference", "moved", "out", "own", "read",
           "shares")  # fmt: skip


class Piece(NamedTuple):
    """A piece of a prompt that a step reads, and picoseconds: its own, what a power cap adds, to fetch what was remembered."""

    sequence: Sequence
    tokens: int
    own: int
    capped: int
    moved: int
