"""The serving engine against plain simulations of its rules in simpy: step by step, a process for each replica or stream.

They are written from what `Rules`, `Sharing`, `Scaling`, `Speculation` and `Tiers` say, share no code with the engine, and
give the same picoseconds for every request. At one moment steps end first, then requests arrive, then prompts' steps begin,
then other steps.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from math import ceil
from random import Random
from typing import Any

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.capture import capture
from narrows.machine import Link, machine
from narrows.simulate.fleet import Group, serve
from narrows.simulate.outcome import Outcome
from narrows.simulate.pace import Tell
from narrows.simulate.requests import Answer, Request
from narrows.simulate.rules import Rules
from narrows.simulate.scaling import Scaling
from narrows.simulate.serving import Engine
from narrows.simulate.sharing import Beside
from narrows.simulate.speculation import Speculation, Speculative
from narrows.simulate.step_times import PS, Segment, StepTimes
from narrows.simulate.tiers import PIECE, Tier, Tiers
from narrows.simulate.workload import Lengths, generate

Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class Costs:
    """Picoseconds of a step, for each of what it holds."""

    step: int = 3_000_000_007
    sequence: int = 20_000_003
    row: int = 9_000_011
    output: int = 5_000_017
    cached: int = 30_011  # token that decoding reads
    pair: int = 2_003  # of tokens of a prompt

    def of(self, contexts: list[int], prompts: list[tuple[int, int]], ended: int, each: int = 1) -> int:
        """A step in which sequences decode, `each` rows of them over their contexts, beside pieces of prompts.

        A piece is (tokens, those before them); so many of them end their prompt.
        """
        rows = each * len(contexts) + sum(new for new, _ in prompts)
        took = self.step + self.sequence * (len(contexts) + len(prompts)) + self.row * rows
        took += self.output * (each * len(contexts) + ended) + self.cached * sum(contexts)
        return took + sum(self.pair * new * (2 * past + new) for new, past in prompts)


class Clock(StepTimes):
    """The same costs, as the engine asks for them."""

    layers, capped = 1, False

    def __init__(self, costs: Costs = Costs()) -> None:
        self.costs = costs
        self._fixed = {}

    def rows(self, rows: int) -> int:
        return self.costs.row * rows

    def outputs(self, outputs: int) -> int:
        return self.costs.output * outputs

    def communication(self, rows: int) -> int:
        return 0

    def host(self, decoding: int, pieces: int = 0) -> int:
        return self.costs.step + self.costs.sequence * (decoding + pieces)

    def prompt(self, new: int, past: int) -> int:
        return self.costs.pair * new * (2 * past + new)

    def decoding(self, sequences: int, context: int, rows: int) -> Segment:
        return Segment(0, 0, 0, self.costs.cached)


CLOCK = Clock()


@dataclass(eq=False)
class Inside:
    """A request that is there: tokens to read, of which some are read, tokens to give, and its blocks."""

    request: Request
    todo: int
    left: int
    read: int = 0
    blocks: int = 0
    swapped: int = 0  # tokens in the host
    moving: int = 0  # picoseconds for what comes up to the device
    moved: int = 0
    found: int = 0  # tokens
    first: int = -1
    last: int = -1
    pieces: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, request: Request) -> "Inside":
        return cls(request, request.prompt, request.output)

    @property
    def decodes(self) -> bool:
        return self.read == self.todo

    def give(self, now: int, tokens: int = 1) -> None:
        self.first = now if self.first < 0 else self.first
        self.left, self.last = max(self.left - tokens, 0), now


def settle(env: simpy.Environment, phases: int) -> Process:
    """Let others go first who act at this moment."""
    for _ in range(phases):
        yield env.timeout(0)


def arrive(env: simpy.Environment, request: Request, put: Callable[[Request], None]) -> Process:
    yield env.timeout(request.arrival)
    yield from settle(env, 1)
    put(request)


def played(requests: list[Request], put: Callable[[Request], None], env: simpy.Environment) -> None:
    for request in requests:
        env.process(arrive(env, request, put))
    env.run()


NO_HOST = Tier("host", 0, 0)


class Replica:
    """One step after another: who decodes gives a token, prompts are read on, and the next are let in."""

    def __init__(self, env: simpy.Environment, rules: Rules, blocks: int, done: Callable[[Inside], None], costs: Costs = Costs(),
                 host: Tier = NO_HOST, ready: int = 0) -> None:  # fmt: skip
        self.env, self.rules, self.free, self.done, self.costs, self.ready = env, rules, blocks, done, costs, ready
        self.room, self.fetch = host.pieces * PIECE, host.fetch // PIECE  # tokens of the host, and picoseconds of one
        self.waiting: list[Inside] = []
        self.running: list[Inside] = []
        self.evictions = self.until = 0  # when the last answer ended
        self.evicted = False  # in the step that is put together: nobody is let in
        self.asked = env.event()
        env.process(self.work())

    @property
    def inside(self) -> int:
        return len(self.waiting) + len(self.running)

    def put(self, request: Request) -> None:
        self.waiting.append(Inside.of(request))
        if not self.asked.triggered:
            self.asked.succeed()

    def work(self) -> Process:
        yield self.env.timeout(self.ready - self.env.now)
        while True:
            yield from settle(self.env, 2)
            while self.inside:
                yield from self.step()
            self.asked = self.env.event()
            yield self.asked

    def step(self) -> Process:
        self.evicted = False
        decoding = self.decoding() if self.rules.mixed else []
        pieces, joining = self.prompts(decoding)
        if not pieces:
            self.joined(joining)
            joining, decoding = [], self.decoding()
        if decoding or pieces:
            for s in decoding:
                self.take(s, 1)
            took = self.took(decoding, pieces)
            yield self.env.timeout(took)
            for s, new in pieces:
                s.read, s.moving = s.read + new, 0
            self.answer(decoding)
            self.joined([s for s, _ in pieces if s.decodes])
            self.joined(joining)
            yield from settle(self.env, 2)

    def took(self, decoding: list[Inside], pieces: list[tuple[Inside, int]]) -> int:
        sizes, ended = [(new, s.read) for s, new in pieces], sum(s.read + new == s.todo for s, new in pieces)
        return self.costs.of([s.read for s in decoding], sizes, ended) + sum(s.moving for s, _ in pieces)

    def answer(self, decoding: list[Inside]) -> None:
        for s in decoding:
            s.read += 1
            s.todo += 1
            s.give(self.env.now)
            self.leave(s)

    def joined(self, ready: list[Inside]) -> None:
        """Prompts are read: they give a token (one that was read elsewhere has given it there)."""
        for s in ready:
            self.keep(s)
            s.give(self.env.now)
            self.leave(s)

    def leave(self, s: Inside) -> None:
        if not s.left:
            self.running.remove(s)
            self.release(s)
            self.done(s)
            self.until = self.env.now

    # ---- what the next step holds ----

    def decoding(self) -> list[Inside]:
        """Who decodes, after as many as came last have made room for a token of each."""
        while sum(self.lacks(s, 1) for s in self.running if s.decodes) > self.free:
            self.evict()
        return [s for s in self.running if s.decodes]

    def prompts(self, decoding: list[Inside]) -> tuple[list[tuple[Inside, int]], list[Inside]]:
        """Pieces of prompts of those inside and of those let in, and who comes with its prompt read."""
        budget, pieces, joining = self.rules.max_tokens - len(decoding), [], []
        for s in [s for s in self.running if not s.decodes]:
            new = min(s.todo - s.read, budget)
            if new < 1 or s not in self.running:
                break
            while s in self.running and self.lacks(s, new) > self.left(decoding):
                gone = self.evict()
                if gone in decoding:
                    decoding.remove(gone)
            if s in self.running:
                self.take(s, new)
                pieces.append((s, new))
                budget -= new
        while self.waiting and not self.evicted and len(self.running) < self.rules.max_sequences:
            s = self.waiting[0]
            comes_read = s.request.read and s.first < 0
            s.read, needed = self.known(s)
            new = s.todo if comes_read else min(s.todo - s.read, budget)
            fits = needed + self.lacks(s, new) <= self.left(decoding) or not self.running
            if new < 1 or not fits:
                s.read = s.blocks = 0
                break
            self.running.append(self.waiting.pop(0))
            self.bring(s)
            self.take(s, new)
            if comes_read:
                s.read = s.todo
                joining.append(s)
            else:
                pieces.append((s, new))
                budget -= new
        return pieces, joining

    def left(self, decoding: list[Inside]) -> int:
        return self.free - sum(self.lacks(s, 1) for s in decoding)

    def lacks(self, s: Inside, new: int) -> int:
        return ceil((s.read + new) / self.rules.block) - s.blocks

    def take(self, s: Inside, new: int) -> None:
        more = self.lacks(s, new)
        s.blocks, self.free = s.blocks + more, self.free - more

    def release(self, s: Inside) -> None:
        s.blocks, self.free = 0, self.free + s.blocks

    def evict(self) -> Inside:
        """Who came last goes back to the head of the queue; the host keeps what it has said, if there is room."""
        s = self.running.pop()
        if s.decodes:
            s.todo = s.read + 1  # the token that it gave last is not read yet
            if self.rules.swap and s.read <= self.room:
                s.swapped, self.room = s.read, self.room - s.read
        self.release(s)
        s.read = 0
        self.waiting.insert(0, s)
        self.evicted = True
        self.evictions += 1
        return s

    # ---- what is not read again ----

    def known(self, s: Inside) -> tuple[int, int]:
        """Tokens of a prompt that are there, and free blocks that holding them takes."""
        return s.swapped, 0

    def bring(self, s: Inside) -> None:
        """Let in, with what is there of it: from the host, with the way to it."""
        s.moving = 2 * s.swapped * self.fetch
        s.swapped, self.room = 0, self.room + s.swapped

    def keep(self, s: Inside) -> None:
        """A prompt is read; nobody else will find it."""


Times = dict[str, tuple[int, int]]  # first and last token, by request


def noted(times: Times) -> Callable[[Inside], None]:
    def done(s: Inside) -> None:
        times[s.request.name] = s.first, s.last

    return done


def simulated(requests: list[Request], rules: Rules, blocks: int, times: StepTimes = CLOCK, tiers: Tiers | None = None,
              streams: Any = None, tell: Tell | None = None) -> tuple[list[Answer], Engine]:  # fmt: skip
    answers: list[Answer] = []

    def reject(request: Request, why: str) -> None:
        raise AssertionError(why)

    engine = Engine(times, rules, blocks, answers.append, reject, tell, streams, tiers=tiers)
    for request in requests:
        engine.advance(request.arrival)
        engine.push(request)
    engine.advance()
    assert engine.room == blocks and not engine.load
    return answers, engine


def seen(answers: list[Answer]) -> Times:
    return {a.request.name: (a.first, a.last) for a in answers}


@st.composite
def loads(draw: st.DrawFn, prompt: int = 300, output: int = 60, gap: int = 60) -> list[Request]:
    sizes = st.tuples(st.integers(0, gap), st.integers(1, prompt), st.integers(1, output))
    now, requests = 0, []
    for i, (wait, new, more) in enumerate(draw(st.lists(sizes, min_size=1, max_size=20))):
        now += wait * PS // 1000
        requests.append(Request(now, new, more, name=str(i)))
    return requests


RULES = st.builds(
    Rules,
    max_sequences=st.integers(1, 12),
    max_tokens=st.sampled_from([64, 512]),
    mixed=st.booleans(),
    prefix_cache=st.just(False),
)


# ---- sequences that are swapped ----


@settings(max_examples=120, deadline=None)
@given(loads(120, 120, 10), RULES, st.integers(15, 40), st.integers(0, 2), st.booleans())
def test_sequences_that_lose_their_room_are_swapped_while_the_host_has_room(
    requests: list[Request], rules: Rules, blocks: int, pieces: int, swap: bool
) -> None:
    rules, host, expected = replace(rules, swap=swap), Tier("host", pieces, PIECE * 1_000_003), {}
    env = simpy.Environment()
    replica = Replica(env, rules, blocks, noted(expected), host=host)
    played(requests, replica.put, env)
    tiers = Tiers((host,))
    answers, engine = simulated(requests, rules, blocks, tiers=tiers)
    assert seen(answers) == expected and engine.preemptions == replica.evictions
    assert tiers.swapped == 0 and replica.room == pieces * PIECE and replica.free == blocks


# ---- prompts that are remembered, on the device and in tiers below ----


class Remembering(Replica):
    """Every block of the device, with the piece of a prompt that is in it, and lists of pieces in the tiers below."""

    def __init__(self, env: simpy.Environment, rules: Rules, blocks: int, done: Callable[[Inside], None],
                 tiers: tuple[Tier, ...]) -> None:  # fmt: skip
        super().__init__(env, rules, blocks, done)
        self.queue = list(range(blocks))  # free blocks, the next to be handed out first
        self.home: dict[int, list[int]] = {}  # blocks of each piece that is on the device
        self.users: dict[int, int] = {}
        self.own: dict[Inside, list[int]] = {}
        self.tiers = [(tier, list[int]()) for tier in tiers]  # pieces, the one used last at the end
        self.per = PIECE // rules.block

    def place(self, piece: int) -> int:
        """The tier of a piece, counted from the device; -1: nowhere."""
        if piece in self.home:
            return 0
        return next((i for i, (_, held) in enumerate(self.tiers, 1) if piece in held), -1)

    def known(self, s: Inside) -> tuple[int, int]:
        s.pieces = []
        for piece in s.request.hashes[: (s.todo - 1) // PIECE]:  # a token at least is read
            if self.place(piece) < 0:
                break
            s.pieces.append(piece)
        s.blocks = self.per * len(s.pieces)
        return PIECE * len(s.pieces), self.per * sum(not self.users.get(piece) for piece in s.pieces)

    def bring(self, s: Inside) -> None:
        s.found, self.own[s] = PIECE * len(s.pieces), []
        below = [(piece, self.tiers[self.place(piece) - 1]) for piece in s.pieces if self.place(piece)]
        for piece in s.pieces:
            if piece in self.home and not self.users.get(piece):
                self.queue = [block for block in self.queue if block not in self.home[piece]]
            self.users[piece] = self.users.get(piece, 0) + 1
        for piece, (tier, held) in below:
            held.remove(piece)
            held.append(piece)
            s.moving += tier.fetch
        for piece, _ in below:
            self.home[piece] = self.hand_out(self.per)
        s.moved = s.moving
        self.free = len(self.queue)

    def hand_out(self, count: int) -> list[int]:
        """The first of the free blocks; what was in them goes down."""
        taken, self.queue = self.queue[:count], self.queue[count:]
        for block in taken:
            for piece in [piece for piece, blocks in self.home.items() if block in blocks and not self.users.get(piece)]:
                del self.home[piece]
                self.forget(piece)
        return taken

    def forget(self, piece: int) -> None:
        for tier, held in self.tiers:
            if piece in held:
                held.remove(piece)
            held.append(piece)
            if len(held) <= tier.pieces:
                return
            piece = held.pop(0)

    def take(self, s: Inside, new: int) -> None:
        more = self.lacks(s, new)
        self.own[s] += self.hand_out(more)
        s.blocks, self.free = s.blocks + more, len(self.queue)

    def keep(self, s: Inside) -> None:
        for i, piece in enumerate(s.request.hashes[: s.request.prompt // PIECE]):
            if piece not in self.home:
                own = self.per * (i - s.found // PIECE)  # where it lies among the blocks that were handed out for this request
                self.home[piece] = self.own[s][own : own + self.per]
                self.users[piece] = 1
                s.pieces.append(piece)

    def release(self, s: Inside) -> None:
        kept = {block for piece in s.pieces for block in self.home[piece]}
        self.queue += [block for block in self.own.pop(s) if block not in kept]
        for piece in reversed(s.pieces):
            self.users[piece] -= 1
            if not self.users[piece]:
                self.queue += self.home[piece]
        self.free = len(self.queue)


@st.composite
def talks(draw: st.DrawFn) -> list[Request]:
    """Prompts that begin alike."""
    sizes = st.tuples(st.integers(0, 300), st.lists(st.integers(0, 2), max_size=3), st.integers(1, 200), st.integers(1, 40))
    now, requests = 0, []
    for i, (wait, words, new, more) in enumerate(draw(st.lists(sizes, min_size=1, max_size=16))):
        now += wait * PS // 1000
        names = tuple(hash(tuple(words[: k + 1])) for k in range(len(words)))
        requests.append(Request(now, PIECE * len(words) + new, more, names, str(i)))
    return requests


@settings(max_examples=120, deadline=None)
@given(talks(), RULES, st.integers(0, 60), st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_prompts_are_found_on_the_device_and_below_it(
    requests: list[Request], rules: Rules, more: int, rooms: tuple[int, int]
) -> None:
    rules = replace(rules, prefix_cache=True, max_sequences=1 + rules.max_sequences % 3)
    below = Tier("host", rooms[0], 90_000_000_001), Tier("disk", rooms[1], 400_000_000_007)
    blocks, found, env = 112 * rules.max_sequences + more, {}, simpy.Environment()

    def done(s: Inside) -> None:
        found[s.request.name] = s.first, s.last, s.found, s.moved

    replica = Remembering(env, rules, blocks, done, below)
    played(requests, replica.put, env)
    answers, _ = simulated(requests, rules, blocks, tiers=Tiers(below))
    assert {a.request.name: (a.first, a.last, a.cached, a.transfer) for a in answers} == found


# ---- two streams on one device ----


class TwoStreams:
    """Prompts are read in one stream and others decode in the other; a step keeps the costs with which it began."""

    def __init__(self, env: simpy.Environment, rules: Rules, whole: Costs, shares: tuple[Costs, Costs],
                 done: Callable[[Inside], None]) -> None:  # fmt: skip
        self.env, self.rules, self.whole, self.shares, self.done = env, rules, whole, shares, done
        self.waiting: list[Inside] = []
        self.reading: list[Inside] = []
        self.decoding: list[Inside] = []
        self.reads = False
        self.room, self.spoke = env.event(), env.event()  # something to read, something to decode
        env.process(self.read())
        env.process(self.decode())

    def put(self, request: Request) -> None:
        self.waiting.append(Inside.of(request))
        self.stir("room")

    def stir(self, name: str) -> None:
        getattr(self, name).succeed()
        setattr(self, name, self.env.event())

    def read(self) -> Process:
        while True:
            budget, pieces = self.rules.max_tokens, []
            while budget and len(pieces) < len(self.reading) + len(self.waiting):
                if len(pieces) == len(self.reading):
                    if len(self.reading) + len(self.decoding) == self.rules.max_sequences:
                        break
                    self.reading.append(self.waiting.pop(0))
                s = self.reading[len(pieces)]
                pieces.append((s, min(s.todo - s.read, budget)))
                budget -= pieces[-1][1]
            if not pieces:
                yield self.room
                continue
            self.reads = True
            costs = self.shares[0] if self.decoding else self.whole
            yield self.env.timeout(
                costs.of([], [(new, s.read) for s, new in pieces], sum(s.read + n == s.todo for s, n in pieces))
            )
            self.reads = False
            for s, new in pieces:
                s.read += new
                if s.decodes:
                    self.reading.remove(s)
                    self.decoding.append(s)
                    self.speak(s)
            if self.decoding:
                self.stir("spoke")
            yield from settle(self.env, 2)

    def decode(self) -> Process:
        while True:
            if not self.decoding:
                yield self.spoke
            yield from settle(self.env, 3)
            one = list(self.decoding)
            costs = self.shares[1] if self.reads else self.whole
            yield self.env.timeout(costs.of([s.read for s in one], [], 0))
            for s in one:
                s.read, s.todo = s.read + 1, s.todo + 1
                self.speak(s)

    def speak(self, s: Inside) -> None:
        s.give(self.env.now)
        if not s.left:
            self.decoding.remove(s)
            self.done(s)
            self.stir("room")


@dataclass
class Shared:
    """A device that is cut the same way whenever both streams run."""

    beside: Beside

    def choose(self, *_: Any) -> Beside:
        return self.beside


@settings(max_examples=120, deadline=None)
@given(loads(), st.integers(1, 12), st.sampled_from([64, 512]), st.sampled_from([1, 3]), st.sampled_from([1, 2]))
def test_two_streams_take_steps_of_their_own(
    requests: list[Request], sequences: int, tokens: int, slow_prompts: int, slow_decoding: int
) -> None:
    rules = Rules(max_sequences=sequences, max_tokens=tokens, mixed=False, prefix_cache=False)
    whole, expected, env = Costs(), {}, simpy.Environment()
    shares = replace(whole, row=slow_prompts * whole.row), replace(whole, cached=slow_decoding * whole.cached, row=2 * whole.row)
    played(requests, TwoStreams(env, rules, whole, shares, noted(expected)).put, env)
    cut = Shared(Beside(Clock(shares[0]), Clock(shares[1])))
    answers, _ = simulated(requests, rules, 1000, Clock(whole), streams=cut)
    assert seen(answers) == expected


# ---- tokens that are proposed and checked ----

DRAFT = Costs(0, 0, 700_001, 900_007, 5_003, 101)


class Guessing(Speculative, Clock):
    """What `Speculative` makes of the costs of a model and of its draft."""

    def __init__(self, speculation: Speculation, drafted: bool) -> None:
        Clock.__init__(self)
        self.speculation, self._brings, self.taken = speculation, speculation.ahead + 1, speculation.taken
        self.draft = Clock(DRAFT) if drafted else None


class Guesses(Replica):
    """Tokens really come several at once: the model's own, and as many proposed ones before it as are kept, by lot."""

    def __init__(self, env: simpy.Environment, rules: Rules, blocks: int, done: Callable[[Inside], None],
                 speculation: Speculation, drafted: bool) -> None:  # fmt: skip
        super().__init__(env, rules, blocks, done)
        self.speculation, self.drafted, self.lot = speculation, drafted, Random(1)
        self.gaps: list[int] = []

    def took(self, decoding: list[Inside], pieces: list[tuple[Inside, int]]) -> int:
        contexts, prompts = [s.read for s in decoding], [(new, s.read) for s, new in pieces]
        ended = sum(s.read + new == s.todo for s, new in pieces)
        check = self.costs.of(contexts, prompts, ended, self.speculation.ahead + 1)
        proposals = self.speculation.ahead * DRAFT.of(contexts, [], 0) + DRAFT.of([], prompts, 0)
        return check + proposals * self.drafted

    def answer(self, decoding: list[Inside]) -> None:
        for s in decoding:
            kept = 0
            while kept < self.speculation.ahead and self.lot.random() < self.speculation.acceptance:
                kept += 1
            given = min(kept + 1, s.left)
            s.read, s.todo = s.read + given, s.todo + given
            self.take(s, 0)
            self.gaps += [self.env.now - s.last] + [0] * (given - 1)
            s.give(self.env.now, given)
            self.leave(s)


@settings(max_examples=100, deadline=None)
@given(loads(), RULES, st.integers(1, 5), st.booleans(), st.integers(25, 90))
def test_guesses_that_are_never_kept_cost_their_rows_and_the_draft(
    requests: list[Request], rules: Rules, ahead: int, drafted: bool, blocks: int
) -> None:
    never, expected, env = Speculation(ahead, 0.0), {}, simpy.Environment()
    replica = Guesses(env, rules, blocks, noted(expected), never, drafted)
    played(requests, replica.put, env)
    answers, engine = simulated(requests, rules, blocks, Guessing(never, drafted))
    assert seen(answers) == expected and engine.preemptions == replica.evictions


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("ahead, acceptance, drafted", [(2, 0.6, True), (4, 0.8, True), (3, 0.5, False)])
def test_guesses_that_are_kept_by_lot_take_the_mean_time(mixed: bool, ahead: int, acceptance: float, drafted: bool) -> None:
    rules, guess = Rules(max_sequences=12, max_tokens=256, mixed=mixed, prefix_cache=False), Speculation(ahead, acceptance)
    expected: Times = {}
    requests = [replace(r, name=str(i)) for i, r in enumerate(generate(30.0, 300, Lengths(200, 120, 0.6, 0.4), seed=2))]
    env, outcome = simpy.Environment(), Outcome()
    replica = Guesses(env, rules, 2000, noted(expected), guess, drafted)
    played(requests, replica.put, env)
    found = seen(simulated(requests, rules, 2000, Guessing(guess, drafted), tell=outcome.pace)[0])
    long = [r for r in requests if r.output >= 20]
    tpot = [sum((times[r.name][1] - times[r.name][0]) / (r.output - 1) for r in long) for times in (found, expected)]
    e2e = [sum(times[r.name][1] - r.arrival for r in requests) for times in (found, expected)]
    assert 0.97 < tpot[0] / tpot[1] < 1 and 0.93 < e2e[0] / e2e[1] < 1  # what a last step gives beyond its answer is lost
    gaps, waits = sorted(replica.gaps), outcome.tbt
    assert waits.count == pytest.approx(len(gaps)) and waits.mean == pytest.approx(sum(gaps) / len(gaps) / PS, rel=0.03)
    for share in (0.95, 0.99):
        assert waits.quantile(share) == pytest.approx(gaps[int(share * len(gaps))] / PS, rel=0.05)


# ---- replicas: a router before them, prompts read apart, replicas that come and go ----

BYTES = 50_000  # of keys and values of a token
WIRE = Link("nvlink", 2e9, 0.004)


@dataclass(frozen=True)
class Stub(Group):
    """Replicas with the costs of the oracle."""

    def times(self) -> StepTimes:
        return CLOCK

    def cuts(self) -> None:
        return None

    def token_bytes(self) -> float:
        return BYTES


GRAPH, L4 = capture("smollm2-135m"), replace(machine("l4"), links=(WIRE,), sources={})


def served(requests: list[Request], group: Group, prefill: Group | None = None) -> Times:
    answers: list[Answer] = []
    serve(requests, group, prefill, each=answers.append)
    return seen(answers)


class Router:
    """Sends a request to the replica with the fewest inside."""

    def __init__(self, replicas: list[Replica]) -> None:
        self.replicas = replicas

    def put(self, request: Request) -> None:
        min(self.replicas, key=lambda replica: replica.inside).put(request)


@settings(max_examples=100, deadline=None)
@given(loads(gap=20), RULES, st.integers(1, 3), st.integers(25, 90))
def test_a_router_counts_who_is_inside_when_a_request_arrives(
    requests: list[Request], rules: Rules, replicas: int, blocks: int
) -> None:
    expected, env = {}, simpy.Environment()
    router = Router([Replica(env, rules, blocks, noted(expected)) for _ in range(replicas)])
    played(requests, router.put, env)
    assert served(requests, Stub(GRAPH, L4, rules, replicas=replicas, blocks=blocks)) == expected


@settings(max_examples=100, deadline=None)
@given(loads(gap=20), RULES, RULES, st.integers(1, 3), st.integers(1, 3), st.integers(25, 60))
def test_prompts_are_read_apart_and_travel(
    requests: list[Request], reading: Rules, answering: Rules, readers: int, writers: int, blocks: int
) -> None:
    expected: Times = {}
    env, asked = simpy.Environment(), {request.name: request for request in requests}

    def read(s: Inside) -> None:
        whole = asked[s.request.name]
        if whole.output == 1:
            expected[whole.name] = s.first, s.last
        else:
            env.process(travel(whole, s.first))

    def travel(whole: Request, first: int) -> Process:
        expected[whole.name] = first, -1
        yield env.timeout(round(WIRE.latency_seconds * PS) + round(whole.prompt * BYTES / WIRE.bandwidth_bytes_per_s * PS))
        yield from settle(env, 1)
        writer.put(replace(whole, arrival=env.now, read=True))

    def answered(s: Inside) -> None:
        expected[s.request.name] = expected[s.request.name][0], s.last

    reader = Router([Replica(env, reading, 1000, read) for _ in range(readers)])
    writer = Router([Replica(env, answering, blocks, answered) for _ in range(writers)])
    played(requests, lambda request: reader.put(replace(request, output=1)), env)
    answering_, reading_ = (Stub(GRAPH, L4, rules, replicas=many, blocks=room, wire=WIRE)
                            for rules, many, room in ((answering, writers, blocks), (reading, readers, 1000)))  # fmt: skip
    assert served(requests, answering_, reading_) == expected


class Fleet(Router):
    """Replicas that come and go: looked at whenever a request arrives."""

    def __init__(self, env: simpy.Environment, scaling: Scaling, most: int, start: Callable[[int], Replica]) -> None:
        self.env, self.scaling, self.most, self.start = env, scaling, most, start
        self.taking = [start(0) for _ in range(scaling.least)]
        self.since = dict.fromkeys(self.taking, 0)
        self.leaving: dict[Replica, int] = {}  # since when
        self.paid = 0
        self.wanted: list[tuple[int, int]] = []
        self.starts = 0

    def put(self, request: Request) -> None:
        now, s = self.env.now, self.scaling
        for one in [one for one in self.leaving if not one.inside]:
            self.end(one, self.leaving.pop(one))
        wanted = ceil((sum(one.inside for one in self.taking) + 1) / s.load)
        wanted = min(max(wanted, s.least), self.most)
        self.wanted.append((now, wanted))
        while len(self.taking) < wanted:  # who was to leave last comes back, else a new one starts
            if not self.leaving:
                self.starts += 1
                self.since[one := self.start(round(s.start_seconds * PS))] = now
            self.taking.append(self.leaving.popitem()[0] if self.leaving else one)
        lately = max(many for moment, many in self.wanted if moment >= now - round(s.idle_seconds * PS))
        while len(self.taking) > lately:
            leaves = min(self.taking, key=lambda one: one.inside)
            self.taking.remove(leaves)
            self.leaving[leaves] = now
        serving = [one for one in self.taking if one.ready <= now]
        Router(serving or [min(self.taking, key=lambda one: one.ready)]).put(request)

    def end(self, one: Replica, left: int) -> None:
        """A replica that takes no more requests goes when it has started and its last answer has ended."""
        self.paid += max(one.until, one.ready, left) - self.since.pop(one)

    def close(self) -> None:
        last = max(one.until for one in self.since)
        for one in self.taking:
            self.end(one, last)
        for one, left in self.leaving.items():
            self.end(one, left)


@settings(max_examples=100, deadline=None)
@given(
    loads(gap=200),
    RULES,
    st.integers(0, 2),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.05, 0.3]),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_replicas_come_and_go_and_who_waits_for_one_waits_for_its_start(
    requests: list[Request], rules: Rules, least: int, load: int, start: float, idle: float
) -> None:
    scaling, expected, env = Scaling(least, load, start, idle), {}, simpy.Environment()

    def started(after: int) -> Replica:
        return Replica(env, rules, 60, noted(expected), ready=env.now + after)

    fleet = Fleet(env, scaling, 4, started)
    played(requests, fleet.put, env)
    fleet.close()
    answers: list[Answer] = []
    outcome = serve(requests, Stub(GRAPH, L4, rules, replicas=4, blocks=60, scaling=scaling), each=answers.append)
    assert seen(answers) == expected and outcome.starts == fleet.starts
    assert outcome.replica_seconds == pytest.approx(fleet.paid / PS)
