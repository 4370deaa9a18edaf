"""A serving engine, iteration by iteration: what vLLM, SGLang and their like do with a stream of requests.

While no request ends, arrives, is cut or evicted, every step holds the same sequences and their caches grow by one
token each: the sum of such a run of steps is closed, and the engine takes it at once. Times are whole picoseconds, so
this gives the same bits as one step after another.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from narrows.errors import NarrowsError
from narrows.simulate.blocks import PIECE, Pool, Stretch
from narrows.simulate.pace import Pace, Tell
from narrows.simulate.step_times import StepTimes


@dataclass(frozen=True, slots=True)
class Rules:
    """How an engine schedules; presets lie in data/engines.toml.

    max_sequences, max_tokens   sequences that run at a time; rows of a step
    mixed       prompts and decoding share steps; otherwise steps of prompts go first and decoding waits
    chunked     a prompt may be read in pieces
    block       tokens of a block of keys and values
    reserve     share of the output still to come for which room must be free when a request is let in
    watermark   share of the blocks that stays free when a request is let in
    prefix_cache   keys and values of prompts are kept for others while there is room
    batched     nobody is let in before all who run have their answer (no continuous batching)
    layered     prompts are read whole, by so many groups of layers, one a step, that a step reads about this many
                tokens' worth of them (0: by tokens, through all layers)
    """

    name: str = "vllm-v1"
    max_sequences: int = 256
    max_tokens: int = 8192
    mixed: bool = True
    chunked: bool = True
    block: int = 16
    reserve: float = 0.0
    watermark: float = 0.0
    prefix_cache: bool = True
    batched: bool = False
    layered: int = 0


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


PARTS = ("queue", "prompt", "interference", "decode", "communication", "host", "preemption", "transfer")


@dataclass(frozen=True, slots=True)
class Answer:
    """A request that was served: picoseconds at which it was let in, gave its first and its last token, and where they went.

    The parts add up to last - arrival: `queue` before it was let in; `prompt` reading its own; `interference` of other
    prompts; `decode`, `communication` and `host` of the steps that gave its tokens; `preemption` from losing its room
    until it had caught up again; `transfer` of its keys and values from where its prompt was read.
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

    def then(self, request: Request, later: "Answer") -> "Answer":
        """The whole answer to a request whose prompt was read here and whose other tokens came `later`, from elsewhere."""
        parts = {part: getattr(self, part) + getattr(later, part) for part in PARTS}
        parts["transfer"] += later.request.arrival - self.last
        again = self.preemptions + later.preemptions
        return Answer(request, self.admitted, self.first, later.last, self.cached, again, **parts)


class _Sequence:
    """A request inside the engine: `todo` tokens to read of which `read` are read, `left` tokens still to give."""

    __slots__ = ("admitted", "base", "blocks", "cached", "decode", "end", "first", "host", "interference", "left", "lost",
                 "out", "own", "pieces", "preempted", "read", "request", "seen", "sent", "times", "todo", "turn")  # fmt: skip

    def __init__(self, request: Request) -> None:
        self.request, self.todo, self.read, self.left = request, request.prompt, 0, request.output
        self.admitted = self.first = self.preempted = -1
        self.end = self.turn = self.base = self.blocks = self.cached = self.times = 0
        self.own = self.host = self.decode = self.sent = self.interference = self.out = 0
        self.seen = (0, 0, 0, 0)
        self.pieces: list[int] = []  # of its prompt, that it shares through the prefix cache
        self.lost: tuple[int, Stretch] | None = None  # pieces it shared when it was evicted, and where its other blocks went


class Engine:
    """One replica: `push` requests in the order of their arrival, `advance` it, and it hands answers to `emit`.

    `blocks` is the room for keys and values. A request that could never fit is handed to `reject` with the reason.
    `tell` hears of the time between tokens, as `Pace` says.
    """

    def __init__(self, times: StepTimes, rules: Rules, blocks: int, emit: Callable[[Answer], None],
                 reject: Callable[[Request, str], None], tell: Tell | None = None) -> None:  # fmt: skip
        if blocks < 1:
            raise NarrowsError("there is no room for keys and values.", where="serving", remedy="Use more or larger devices.")
        if rules.layered and rules.chunked:
            raise NarrowsError("prompts are read by layers or in pieces, not both.", where=rules.name, remedy="Set one.")
        self.times, self.rules, self.blocks, self.emit, self.reject = times, rules, blocks, emit, reject
        self.now = 0
        self.steps = 0  # taken so far
        self.runs = 0  # of equal steps, taken at once
        self.preemptions = 0
        self.pushed = 0  # requests so far
        self.waiting: deque[_Sequence] = deque()
        self.running: dict[_Sequence, None] = {}  # in the order in which they were let in
        self._reading: list[_Sequence] = []  # of these, the ones whose prompt is not read
        self._ends: list[tuple[int, int, _Sequence]] = []
        self._decoding = self._context = self._turns = 0
        self._promised = 0  # sum of `end` over those that decode
        self._phases = [0] * rules.block  # decoding sequences by (tokens in the cache - steps) mod block
        self._pool = Pool(blocks, rules.block)
        self._stuck = False  # nobody can be let in before something ends
        self._evicted = False  # in the step that begins: nobody is let in
        self._spent = (0, 0, 0, 0)  # picoseconds of decoding, communication, host and prompts since the start
        self._group = 0  # of layers, that reads the prompts next
        self._pace = Pace(tell)

    @property
    def load(self) -> int:
        """Requests inside."""
        return len(self.waiting) + len(self.running)

    @property
    def room(self) -> int:
        """Free blocks."""
        return self._pool.free

    def push(self, request: Request) -> None:
        """Let a request queue up; its arrival is not before that of the last."""
        self.pushed += 1
        most = -(-(request.prompt + request.output - 1) // self.rules.block)
        if request.prompt < 1 or request.output < 1:
            self.reject(request, "a prompt and an answer have at least one token")
        elif most > self.blocks:
            self.reject(request, f"it needs {most} blocks and there are {self.blocks}")
        elif not self.rules.chunked and request.prompt > self.rules.max_tokens:
            self.reject(request, f"its prompt is longer than a step of {self.rules.max_tokens} tokens")
        else:
            if not self.running and not self.waiting:
                self.now = max(self.now, request.arrival)
            if not self.waiting:
                self._stuck = False
            self.waiting.append(_Sequence(request))

    def advance(self, until: int | None = None) -> None:
        """Take all steps that begin before `until` (picoseconds), or all there are."""
        while (self.running or self.waiting) and (until is None or self.now < until):
            may = self.waiting and not self._stuck and not (self.rules.batched and self.running and not self._reading)
            if (may or self._reading) and (self._read_step() or not self._decoding):
                continue
            self._decode_run(until)

    # ---- a run of steps in which every sequence gives one token ----

    def _decode_run(self, until: int | None) -> None:
        self._make_room()
        if not self._decoding:
            self._evicted = False
            return
        count, context, times, block = self._decoding, self._context, self.times, self.rules.block
        piece = times.decoding(count, context, count)
        host, sent = times.host(count), times.communication(count)
        each = times.rows(count) + times.outputs(count) + piece.base + piece.slope * (context - piece.start) + host
        n = 1 if self._evicted else self._next_end() - self.steps  # after an eviction, the next step tries to let it in again
        self._evicted = False
        if piece.end:
            n = min(n, -(-(piece.end - context) // count))
        n = self._fitting(n, block)
        slope = piece.slope * count
        took = n * each + slope * (n * (n - 1) // 2)
        if until is not None and took > until - self.now:
            n = _steps_to(until - self.now, each, slope, n)
            took = n * each + slope * (n * (n - 1) // 2)
        self._pool.take(self._wanted(n, block))
        self._pace.steps(self.now, each, slope, n, count)
        self.now += took
        self.steps += n
        self.runs += 1
        self._context += n * count
        decode, wire, own, prompts = self._spent
        self._spent = (decode + took - n * (host + sent), wire + n * sent, own + n * host, prompts)
        self._leave()

    def _wanted(self, n: int, block: int) -> int:
        """New blocks for n steps of those that decode."""
        phases, steps = self._phases, self.steps
        whole, rest = divmod(n, block)
        return whole * self._decoding + sum(phases[-(steps + i) % block] for i in range(rest))

    def _fitting(self, n: int, block: int) -> int:
        """At most n steps, as many as there are free blocks for."""
        if self._wanted(n, block) <= self._pool.free:
            return n
        fits = self._pool.free // self._decoding * block
        left = self._pool.free - self._pool.free // self._decoding * self._decoding
        while True:
            left -= self._phases[-(self.steps + fits) % block]
            if left < 0:
                return fits
            fits += 1

    def _next_end(self) -> int:
        """The step after which the next sequence has all its tokens."""
        ends = self._ends
        while ends[0][2].turn != ends[0][1]:  # it lost its room since
            heappop(ends)
        return ends[0][0]

    def _make_room(self) -> None:
        """Free blocks for the next step of those that decode, by taking them from who came last."""
        block = self.rules.block
        while self._phases[-self.steps % block] > self._pool.free:
            self._evict(next(reversed(self.running)))

    def _evict(self, last: _Sequence) -> None:
        """Take a sequence's room; it waits at the head of the queue, to read its prompt and its answer so far again."""
        del self.running[last]
        if last.end:
            self._pace.lose(last)
            self._drop(last)
            last.left = last.end - self.steps
            last.todo = last.request.prompt + last.request.output - last.left
            last.end = last.turn = 0
            self._account(last)
        else:
            self._reading.remove(last)
            if last.preempted < 0:
                last.host += self._spent[2] - last.seen[2]
        last.lost = len(last.pieces), self._release(last)
        if last.preempted < 0:
            last.preempted = self.now
        last.read = 0
        last.times += 1
        self.preemptions += 1
        self.waiting.appendleft(last)
        self._stuck, self._evicted = False, True

    def _drop(self, sequence: _Sequence) -> None:
        """Out of the sums over those that decode."""
        held = sequence.base + self.steps
        self._pace.end(sequence)
        self._decoding -= 1
        self._promised -= sequence.end
        self._context -= held
        self._phases[sequence.base % self.rules.block] -= 1
        sequence.blocks = -(-held // self.rules.block)

    def _release(self, sequence: _Sequence) -> Stretch:
        """Give back the blocks of a sequence; pieces of its prompt that others hold stay."""
        pool = self._pool
        own = pool.give(sequence.blocks - pool.blocks(sequence.pieces))
        pool.release(sequence.pieces)
        sequence.pieces, sequence.blocks = [], 0
        return own

    def _account(self, sequence: _Sequence) -> None:
        """Add what the engine spent since the sequence began to decode to its own account."""
        then, now = sequence.seen, self._spent
        sequence.decode += now[0] - then[0]
        sequence.sent += now[1] - then[1]
        sequence.host += now[2] - then[2]
        sequence.interference += now[3] - then[3]

    def _leave(self) -> None:
        """Hand over all whose last token was given."""
        ends, steps = self._ends, self.steps
        while ends and ends[0][0] <= steps:
            _, turn, sequence = heappop(ends)
            if sequence.turn != turn:
                continue  # it lost its room since
            del self.running[sequence]
            self._drop(sequence)
            self._account(sequence)
            self._finish(sequence)

    def _finish(self, s: _Sequence) -> None:
        self._release(s)
        self._stuck = False
        self.emit(Answer(s.request, s.admitted, s.first, self.now, s.cached, s.times, s.admitted - s.request.arrival, s.own,
                         s.interference, s.decode, s.sent, s.host, s.out))  # fmt: skip

    # ---- a step that reads prompts ----

    def _read_step(self) -> bool:
        """One step with pieces of prompts; False if none could be let in and none is being read."""
        rules = self.rules
        decoding = self._decoding if rules.mixed else 0
        if decoding:
            self._make_room()
            decoding = self._decoding
        budget = rules.max_tokens - decoding
        demand = self._phases[-self.steps % rules.block] if decoding else 0
        pieces: list[tuple[_Sequence, int]] = []
        for sequence in list(self._reading):
            piece = min(sequence.todo - sequence.read, budget)
            if piece < 1:
                break
            while self._lacks(sequence, piece) > self._pool.free - demand and sequence in self.running:
                self._evict(next(reversed(self.running)))
                decoding, demand = self._again(decoding)
            if sequence not in self.running:
                break
            self._take(sequence, piece)
            pieces.append((sequence, piece))
            budget -= piece
        self._group = self._group if pieces else 0
        joining = [] if self._evicted or self._group else self._admit(pieces, budget, demand)
        if pieces:
            self._spend(pieces, decoding, demand)
            self._evicted = False
        for sequence in joining:
            self._start(sequence)
        return bool(pieces)

    def _again(self, decoding: int) -> tuple[int, int]:
        """How many decode in this step, and the blocks they want, after an eviction."""
        return (self._decoding, self._phases[-self.steps % self.rules.block]) if decoding else (0, 0)

    def _lacks(self, sequence: _Sequence, piece: int) -> int:
        """Blocks that the next piece of a prompt needs and has not."""
        return -(-(sequence.read + piece) // self.rules.block) - sequence.blocks

    def _take(self, sequence: _Sequence, piece: int) -> None:
        more = self._lacks(sequence, piece)
        sequence.blocks += more
        self._pool.take(more)

    def _admit(self, pieces: list[tuple[_Sequence, int]], budget: int, demand: int) -> list[_Sequence]:
        """Let waiting requests in, in order, as far as tokens, sequences and blocks go; gives those with nothing to read."""
        rules, pool = self.rules, self._pool
        joining: list[_Sequence] = []
        while self.waiting:
            sequence = self.waiting[0]
            if len(self.running) >= rules.max_sequences:
                self._stuck = True
                break
            found, own = self._remembered(sequence)
            cached = len(found) * PIECE + own * rules.block
            ready = sequence.request.read and sequence.first < 0
            piece = sequence.todo if ready else min(sequence.todo - cached, budget)
            if piece < 1 or (piece < sequence.todo - cached and not rules.chunked):
                break
            room = pool.free - demand - pool.idle(found) - own - round(rules.watermark * self.blocks)
            if rules.reserve:
                coming = self._promised - self.steps * self._decoding + sequence.left + sum(s.left for s in self._reading)
                room -= round(rules.reserve * coming / rules.block)
            held = pool.blocks(found) + own
            if -(-(cached + piece) // rules.block) - held > room and self.running:
                self._stuck = True
                break
            self.waiting.popleft()
            pool.hold(found)
            if own and sequence.lost is not None:
                pool.reclaim(sequence.lost[1], own)
            sequence.read, sequence.blocks, sequence.pieces, sequence.lost = cached, held, list(found), None
            self._take(sequence, piece)
            if sequence.admitted < 0:
                sequence.admitted = self.now
                sequence.cached = cached
            if sequence.first < 0:
                sequence.seen = self._spent
                if sequence.preempted >= 0:
                    sequence.out += self.now - sequence.preempted
                    sequence.preempted = -1
            self.running[sequence] = None
            if ready:
                sequence.read = sequence.todo
                joining.append(sequence)
                continue
            self._reading.append(sequence)
            pieces.append((sequence, piece))
            budget -= piece
        return joining

    def _remembered(self, sequence: _Sequence) -> tuple[Sequence[int], int]:
        """Pieces of a prompt that are there, and further blocks that are left of the sequence since it was evicted."""
        if not self.rules.prefix_cache:
            return (), 0
        hashes, block = sequence.request.hashes, self.rules.block
        found = self._pool.match(hashes, sequence.todo) if hashes else ()
        if sequence.lost is None or len(found) != sequence.lost[0]:
            return found, 0
        return found, min(sequence.lost[1].count, (sequence.todo - 1) // block - self._pool.blocks(found))

    def _spend(self, pieces: list[tuple[_Sequence, int]], decoding: int, demand: int) -> None:
        """Take the time of a step of pieces of prompts and of those that decode beside them."""
        times, layered = self.times, self.rules.layered
        tokens = sum(piece for _, piece in pieces)
        groups = min(-(-tokens // layered), times.layers) if layered else 1
        self._group = (self._group + 1) % groups if self._group < groups else 0
        done = 0 if self._group else sum(sequence.read + piece == sequence.todo for sequence, piece in pieces)
        host = times.host(decoding + len(pieces))
        own = [times.prompt(piece, sequence.read) // groups for sequence, piece in pieces]
        base = times.rows(decoding) + times.outputs(decoding) if decoding else 0
        alone = 0
        if decoding:
            segment = times.decoding(decoding, self._context, tokens + decoding)
            alone = segment.base + segment.slope * (self._context - segment.start)
        shared = (times.rows(tokens + decoding) - (times.rows(decoding) if decoding else 0)) // groups
        shared += times.outputs(decoding + done) - (times.outputs(decoding) if decoding else 0)
        took = base + shared + alone + sum(own) + host
        for (sequence, piece), attention in zip(pieces, own, strict=True):
            if sequence.first < 0:
                sequence.own += attention + shared * piece // tokens
        if decoding:
            self._pace.steps(self.now, took, 0, 1, decoding)
        self.now += took
        self.runs += 1
        decode, wire, hosts, prompts = self._spent
        kept = times.communication(decoding) if decoding else 0
        self._spent = (decode + base + alone - kept, wire + kept, hosts + host, prompts + took - host - base - alone)
        if decoding or self.rules.mixed:
            self.steps += 1
        if decoding:
            self._pool.take(demand)
            self._context += decoding
        self._leave()
        for sequence, piece in () if self._group else pieces:
            sequence.read += piece
            if sequence.read == sequence.todo:
                self._reading.remove(sequence)
                self._start(sequence)

    def _start(self, sequence: _Sequence) -> None:
        """A prompt is read: its first token is given, and it decodes from now on."""
        if sequence.first < 0:
            sequence.first = self.now
            sequence.host += self._spent[2] - sequence.seen[2]
            sequence.interference = self.now - sequence.admitted - sequence.own - sequence.host - sequence.out
        elif sequence.preempted >= 0:
            sequence.out += self.now - sequence.preempted
            sequence.preempted = -1
        self._pace.begin(sequence, self.now)
        sequence.seen = self._spent
        sequence.left -= 1
        if self.rules.prefix_cache and sequence.request.hashes:
            sequence.pieces += self._pool.keep(sequence.request.hashes, sequence.request.prompt)
        if not sequence.left:
            del self.running[sequence]
            self._pace.end(sequence)
            self._finish(sequence)
            return
        sequence.end = self.steps + sequence.left
        sequence.base = sequence.todo - self.steps
        self._turns += 1
        sequence.turn = self._turns
        heappush(self._ends, (sequence.end, sequence.turn, sequence))
        self._decoding += 1
        self._promised += sequence.end
        self._context += sequence.todo
        self._phases[sequence.base % self.rules.block] += 1


def _steps_to(gap: int, each: int, slope: int, most: int) -> int:
    """The fewest steps, of `each` picoseconds and `slope` more every time, that take at least `gap`; at most `most`."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if middle * each + slope * (middle * (middle - 1) // 2) >= gap:
            high = middle
        else:
            low = middle + 1
    return low
