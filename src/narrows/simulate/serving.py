"""A serving engine, iteration by iteration: what vLLM, SGLang and their like do with a stream of requests.

While no request ends, arrives, is cut or evicted, every step holds the same sequences and their caches grow by one
token each: the sum of such a run of steps is closed, and the engine takes it at once. Times are whole picoseconds, so
this gives the same bits as one step after another.
"""

import math
from bisect import insort
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush

from narrows.errors import NarrowsError
from narrows.simulate.blocks import Growth
from narrows.simulate.pace import Pace, Tell
from narrows.simulate.requests import Answer, Piece, Request, Sequence, Spent
from narrows.simulate.room import Room
from narrows.simulate.rules import Rules
from narrows.simulate.sharing import Beside, Streams
from narrows.simulate.step_times import PS, StepTimes, steps_to
from narrows.simulate.tiers import PIECE, Tiers


class Engine:
    """One replica: `push` requests in the order of their arrival, `advance` it, and it hands answers to `emit`.

    `blocks` is the room for keys and values. A request that could never fit is handed to `reject` with the reason.
    `tell` hears of the time between tokens, as `Pace` says. With `streams`, prompts are read beside decoding, in steps of
    their own. It takes no step before it is `ready` (picoseconds). What is forgotten of prompts goes to `tiers` below.
    """

    def __init__(self, times: StepTimes, rules: Rules, blocks: int, emit: Callable[[Answer], None],
                 reject: Callable[[Request, str], None], tell: Tell | None = None,
                 streams: Streams | None = None, ready: int = 0, tiers: Tiers | None = None) -> None:  # fmt: skip
        if blocks < 1:
            raise NarrowsError("there is no room for keys and values.", where="serving", remedy="Use more or larger devices.")
        if rules.layered and rules.chunked:
            raise NarrowsError("prompts are read by layers or in pieces, not both.", where=rules.name, remedy="Set one.")
        if streams and (rules.mixed or rules.layered or rules.batched):
            raise NarrowsError("its prompts are read in a stream of their own.", where=rules.name,
                               remedy="Set neither mixed, layered nor batched.")  # fmt: skip
        if rules.swap and not (tiers and tiers.tiers):
            raise NarrowsError("there is no host to swap to.", where=rules.name, remedy="Give one (host_bytes), or no swap.")
        self.times, self.rules, self.blocks, self.emit, self.reject = times, rules, blocks, emit, reject
        self.now = self.ready = ready
        self.steps = 0  # taken so far
        self.runs = 0  # of equal steps, taken at once
        self.preemptions = 0
        self.pushed = 0  # requests so far
        self.idle = 0  # picoseconds in which nothing was inside
        self.prompts = self.outputs = 0  # tokens of the requests inside
        self.hits = [0] * (1 + len(tiers.tiers if tiers else ()))
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}  # in the order in which they were let in
        self._reading: list[Sequence] = []  # of these, the ones whose prompt is not read
        self._forks = 0  # further answers for which these stand
        self._ends: list[tuple[int, int, Sequence]] = []
        self._decoding = self._context = self._turns = 0
        self._promised = 0  # sum of `end` over those that decode
        self._growth = Growth(rules.block)  # of those that decode
        self._room = Room(blocks, rules, tiers)
        self._pool = self._room.pool
        self._swap = tiers.tiers[0].fetch // PIECE if tiers and rules.swap else 0  # picoseconds of a token
        self._stuck = False  # nobody can be let in before something ends
        self._evicted = False  # in the step that begins: nobody is let in
        self._single = False  # the next one tries again to let somebody in
        self._spent: Spent = (0, 0, 0, 0, 0)  # since the start
        self._group = 0  # of layers, that reads the prompts next
        self._pace = Pace(tell, times.taken)
        self._streams = streams  # where prompts have one of their own:
        self._beside: Beside | None = None  # how the device is cut while both streams run
        self._under_way: list[Piece] = []  # pieces of prompts that it reads
        self._host_under_way = 0
        self._read_until = ready  # when it is done with them, or was with the last ones
        self._held_up = False  # it could not begin when it was free
        self._asked, self._late = math.inf, list[int]()  # the moment advanced to, and when steps end in which answers do after it
        self._going = False  # decoding's last step, up to now: what prompts do before comes first
        self._freed = 0  # when something ended that nobody could be let in before
        self._aside = 0  # picoseconds of the host for its steps

    @property
    def load(self) -> int:
        """Sequences inside: of a request whose prompt is not read, one."""
        return len(self.waiting) + len(self.running) + len(self._late)

    @property
    def room(self) -> int:
        """Free blocks."""
        return self._pool.free

    def found(self, request: Request) -> int:
        """Tokens of a prompt that are remembered here."""
        return self._room.found(request)

    def push(self, request: Request) -> None:
        """Let a request queue up; its arrival is not before that of the last."""
        self.pushed += 1
        if why := request.refusal(self.rules, self.blocks):
            self.reject(request, why)
            return
        self.prompts += request.prompt
        self.outputs += request.tokens
        if not self.running and not self.waiting and self.now < request.arrival:
            self.idle += request.arrival - self.now
            self.now = request.arrival
        sequence, patience = Sequence(request), self.rules.patience
        if request.session:
            sequence.lost = self._pool.resume(request.session)
        if patience:
            insort(self.waiting, sequence, key=lambda one: one.request.prompt + patience * one.request.arrival / PS)
        else:
            self.waiting.append(sequence)
        if self.waiting[0] is sequence:
            self._stuck = False

    @property
    def bound(self) -> float:
        """No answer comes before this moment (picoseconds) unless more is pushed; infinite where nothing is inside."""
        if not (self.running or self.waiting):
            return math.inf
        waits = self._reading or (self.waiting and not self._stuck)
        if self._streams:
            ends = self._read_until if self._under_way else 1 + (self._begins() if waits else self.now)
            return min(ends, self.now + (not self._going))
        if waits or self._evicted or not self._decoding or self._growth.next(self.steps) > self._pool.free:
            return self.now + 1  # the end of the step that begins now is later still
        n, each, slope = self._run()
        return self.now + n * each + slope * (n * (n - 1) // 2)

    def advance(self, until: int | None = None) -> None:
        """Take all steps that begin before `until` (picoseconds), or all there are."""
        self._asked = math.inf if until is None else until
        self._late = [at for at in self._late if at > self._asked]
        if self._streams:
            while (self.running or self.waiting) and self._advance_both(until):
                pass
            return
        while (self.running or self.waiting) and (until is None or self.now < until):
            may = self.waiting and not self._stuck and not (self.rules.batched and self.running and not self._reading)
            if (may or self._reading) and (self._read_step() or not self._decoding):
                continue
            self._decode_run(until)

    def _advance_both(self, until: int | None) -> bool:
        """Begin or end a step of prompts, or decode until one ends; False where nothing more begins before `until`."""
        waits = self._reading or (self.waiting and not self._stuck)
        begins = self._begins() if waits and not self._under_way else None
        if begins is not None and (until is None or begins < until) and (begins < self.now or not self._going):
            self._held_up = not self._read_step()
        if self._under_way and (self._read_until <= self.now or not self._decoding):
            self.now = max(self.now, self._read_until)
            self._beside = None
            self._aside += self._host_under_way
            read, self._under_way = self._under_way, []
            self._read(read, self._read_until)
            return True
        if self._going and (until is None or self.now <= until):
            self._going = False
            self._leave()
            return True
        if until is not None and self.now >= until:
            return False
        ends = self._read_until if self._under_way else until
        self._decode_run(ends if until is None or ends is None else min(until, ends))
        return True

    def _begins(self) -> int:
        """When the next step of prompts begins: now, or in their own stream as soon as it is free and one is there."""
        if not self._streams or self._held_up:
            return self.now
        head = 0 if self._reading else max(self.waiting[0].request.arrival, self.waiting[0].preempted)
        return max(self._read_until, self._freed, head)

    @property
    def _hosts(self) -> int:
        """Picoseconds that the host took of the steps that read prompts."""
        return self._aside if self._streams else self._spent[2]

    # ---- a run of steps in which every sequence gives one token ----

    def _decode_run(self, until: int | None) -> None:
        self._make_room()
        if not self._decoding:
            self._evicted = False
            return
        count, context = self._decoding, self._context
        times = self._beside.decoding if self._beside else self.times
        n, each, slope = self._run()
        host, sent = times.host(count), times.communication(count)
        self._evicted = self._single = False
        took = n * each + slope * (n * (n - 1) // 2)
        if until is not None and took > until - self.now:
            n = steps_to(until - self.now, each, slope, n)
            took = n * each + slope * (n * (n - 1) // 2)
        self._pool.take(self._growth.wanted(self.steps, n, count))
        self._pace.steps(self.now, each, slope, n, count)
        self.now += took
        self.steps += n
        self.runs += 1
        self._context += n * count
        decode, wire, own, prompts, cap = self._spent
        held = n * self.times.held(count) if times.capped else 0
        longer = 0  # than without prompts beside it
        if self._beside:
            piece, alone = self.times.decode(count, context)
            longer = n * (each - alone) + (slope - piece.slope * count) * (n * (n - 1) // 2)
        decode += took - longer - n * (host + sent) - held
        self._spent = (decode, wire + n * sent, own + n * host, prompts + longer, cap + held)
        self._going = bool(self._streams)
        if not self._going:
            self._leave()

    def _run(self) -> tuple[int, int, int]:
        """Steps until something else may happen, and picoseconds: of the first of them, and how much longer each next one is."""
        count, context = self._decoding, self._context
        piece, each = (self._beside.decoding if self._beside else self.times).decode(count, context)
        n = 1 if self._evicted or self._single else self._next_end() - self.steps
        if piece.end:
            n = min(n, -(-(piece.end - context) // count))
        return self._growth.fitting(self.steps, n, count, self._pool.free), each, piece.slope * count

    def _next_end(self) -> int:
        """The step after which the next sequence has all its tokens."""
        ends = self._ends
        while ends[0][2].turn != ends[0][1]:  # it lost its room since
            heappop(ends)
        return ends[0][0]

    def _make_room(self) -> None:
        """Free blocks for the next step of those that decode, by taking them from who came last."""
        while self._growth.next(self.steps) > self._pool.free:
            self._evict(next(reversed(self.running)))

    def _evict(self, last: Sequence) -> None:
        """Take a sequence's room; it waits at the head of the queue, to read its prompt and its answer so far again."""
        del self.running[last]
        if last.end:
            self._pace.lose(last)
            self._drop(last)
            last.left = last.end - self.steps
            last.todo = last.base + self.steps + 1
            last.end = last.turn = 0
            last.account(self._spent)
            last.swapped = last.todo - 1 if self.rules.swap and self._pool.tiers.swap(last.todo - 1) else 0
        else:
            self._reading.remove(last)
            self._forks -= last.forks
            if last.preempted < 0:
                last.host += self._hosts - last.seen[2]
        last.lost = self._room.release(last)
        if last.preempted < 0:
            last.preempted = self.now
        last.read = 0
        last.times += 1
        if last.family:
            last.family.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(last)
        self._stuck, self._evicted = False, True

    def _drop(self, sequence: Sequence) -> None:
        """Out of the sums over those that decode."""
        held = sequence.base + self.steps
        self._pace.end(sequence)
        self._decoding -= 1
        self._promised -= sequence.end
        self._context -= held
        self._growth.drop(sequence.base)
        sequence.blocks = -(-held // self.rules.block)

    def _leave(self) -> None:
        """Hand over all whose last token was given."""
        ends, steps = self._ends, self.steps
        while ends and ends[0][0] <= steps:
            _, turn, sequence = heappop(ends)
            if sequence.turn != turn:
                continue  # it lost its room since
            del self.running[sequence]
            self._drop(sequence)
            sequence.account(self._spent)
            self._finish(sequence, self.now)

    def _finish(self, sequence: Sequence, at: int) -> None:
        """The last token of an answer was given: of a request, if it is the last of its answers."""
        request, family = sequence.request, sequence.family
        self._room.finish(sequence)
        if self._stuck:
            self._stuck, self._freed = False, at
        if at > self._asked:
            self._late.append(at)
        if family:
            family.to_come -= 1
            if family.to_come:
                return
        self.prompts -= request.prompt
        self.outputs -= request.tokens
        self.emit(sequence.answer(at, self.ready))

    # ---- a step that reads prompts ----

    def _read_step(self) -> bool:
        """One step with pieces of prompts; False if none could be let in and none is being read."""
        rules, at = self.rules, self._begins()
        decoding = self._decoding if rules.mixed else 0
        if decoding:
            self._make_room()
            decoding = self._decoding
        budget = rules.max_tokens - decoding
        demand = self._growth.next(self.steps) if decoding else 0
        pieces: list[tuple[Sequence, int]] = []
        for sequence in list(self._reading):
            piece = min(sequence.todo - sequence.read, budget)
            if piece < 1:
                break
            while (short := self._room.lacks(sequence, piece) > self._pool.free - demand) and sequence in self.running:
                if self._going:
                    break  # who takes part in a step keeps its room until it ends
                self._evict(next(reversed(self.running)))
                decoding = self._decoding if decoding else 0
                demand = self._growth.next(self.steps) if decoding else 0
            if short or sequence not in self.running:
                budget = 0
                break
            self._room.take(sequence, piece)
            pieces.append((sequence, piece))
            budget -= piece
        self._group = self._group if pieces else 0
        joining = [] if self._evicted or self._group else self._admit(pieces, budget, demand, at)
        if pieces:
            self._spend(pieces, decoding, demand, at)
            self._evicted = False
        for sequence in joining:
            self._start(sequence, self.now)
        return bool(pieces)

    def _admit(self, pieces: list[tuple[Sequence, int]], budget: int, demand: int, at: int) -> list[Sequence]:
        """Let waiting requests in, in order, as far as tokens, sequences and blocks go; gives those with nothing to read."""
        rules, pool = self.rules, self._pool
        joining: list[Sequence] = []
        while self.waiting:
            sequence = self.waiting[0]
            if len(self.running) + self._forks + sequence.forks >= rules.max_sequences:
                self._stuck = True
                break
            found, own, common = ((), 0, 0) if sequence.swapped else self._room.remembered(sequence)
            cached = sequence.swapped or len(found) * PIECE + (own + common) * rules.block
            ready = sequence.request.read and sequence.first < 0
            piece = sequence.todo if ready else min(sequence.todo - cached, budget)
            if piece < 1 or (piece < sequence.todo - cached and not rules.chunked):
                break
            free = pool.idle(found) + own  # of what is remembered, what others may get before
            room = pool.free - demand - free - round(rules.watermark * self.blocks)
            if rules.reserve:
                coming = self._promised - self.steps * self._decoding + sequence.coming + sum(s.coming for s in self._reading)
                room -= round(rules.reserve * coming / rules.block)
            held = pool.blocks(found) + own + common
            if self._room.blocks(sequence, cached + piece) - held > room and self.running:
                if free and sequence.todo > budget:
                    self._single = True  # some of it may be lost, and a step's piece of the prompt then need less room
                else:
                    self._stuck = True
                break
            self.waiting.popleft()
            if found:
                if sequence.first < 0:
                    self._count(found)
                sequence.fetch = pool.hold(found)
            if sequence.swapped:
                pool.tiers.back(sequence.swapped)
                sequence.fetch, sequence.swapped = 2 * sequence.swapped * self._swap, 0
            if own and sequence.lost is not None:
                pool.reclaim(sequence.lost.rest, own)
            sequence.read, sequence.blocks, sequence.pieces, sequence.lost = cached, held, list(found), None
            self._room.take(sequence, piece)
            self._forks += sequence.forks
            if common and sequence.family:
                sequence.shares = True
                sequence.family.holders += 1
            if sequence.admitted < 0:
                sequence.admitted = at
                sequence.cached = cached
                self.hits[0] += own * rules.block
            if sequence.first < 0:
                sequence.seen = (*self._spent[:2], self._aside, *self._spent[3:]) if self._streams else self._spent
                if sequence.preempted >= 0:
                    sequence.out += at - sequence.preempted
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

    def _count(self, pieces: tuple[int, ...]) -> None:
        """Tokens of a prompt that are found, by where: on the device, in the first tier below it, ..."""
        places = [place for _, place in self._pool.below(pieces)]
        for place in [-1] * (len(pieces) - len(places)) + places:
            self.hits[place + 1] += PIECE

    def _spend(self, pieces: list[tuple[Sequence, int]], decoding: int, demand: int, at: int) -> None:
        """Take the time of a step of pieces of prompts and of those that decode beside them."""
        layered, tokens = self.rules.layered, sum(piece for _, piece in pieces)
        if self._streams and self._decoding:
            sizes, used = [(piece, sequence.read) for sequence, piece in pieces], 1 - self._pool.free / self.blocks
            self._beside = self._streams.choose(sizes, self._decoding, self._context, used)
        times = self._beside.prompts if self._beside else self.times
        groups = min(-(-tokens // layered), times.layers) if layered else 1
        self._group = (self._group + 1) % groups if self._group < groups else 0
        done = 0 if self._group else sum(sequence.read + piece == sequence.todo for sequence, piece in pieces)
        host = times.host(decoding, len(pieces))
        own = [times.prompt(piece, sequence.read) // groups for sequence, piece in pieces]
        base = times.rows(decoding) + times.outputs(decoding) if decoding else 0
        alone = 0
        if decoding:
            segment = times.decoding(decoding, self._context, tokens + decoding)
            alone = segment.base + segment.slope * (self._context - segment.start)
        shared = times.reading(tokens, decoding) // groups + times.ending(done, decoding)
        read = [Piece(sequence, piece, one + shared * piece // tokens, 0, sequence.fetch)
                for (sequence, piece), one in zip(pieces, own, strict=True)]  # fmt: skip
        took, added = base + shared + alone + sum(own) + host + sum([piece.moved for piece in read]), 0
        if times.capped:
            more = times.held_reading(tokens, decoding) // groups
            caps = [times.held_prompt(piece, sequence.read) // groups + more * piece // tokens for sequence, piece in pieces]
            read = [piece._replace(own=piece.own - cap, capped=cap) for piece, cap in zip(read, caps, strict=True)]
            added = sum(caps)
        self.runs += 1
        if self._streams:
            self._under_way, self._read_until, self._host_under_way = read, at + took, host
            return
        if decoding:
            self._pace.steps(self.now, took, 0, 1, decoding, base + alone + times.host(decoding))
        self.now += took
        decode, wire, hosts, prompts, cap = self._spent
        kept, held = (times.communication(decoding), times.held(decoding)) if decoding else (0, 0)
        decode += base + alone - kept - held
        self._spent = (decode, wire + kept, hosts + host, prompts + took - host - base - alone - added, cap + held + added)
        if decoding or self.rules.mixed:
            self.steps += 1
        if decoding:
            self._pool.take(demand)
            self._context += decoding
        self._leave()
        self._read(read, self.now)

    def _read(self, pieces: list[Piece], at: int) -> None:
        """A step of prompts is over: its pieces are read."""
        for sequence, tokens, own, cap, moved in pieces:
            sequence.fetch = 0
            if sequence not in self.running:
                continue  # it lost its room while the step went on
            if sequence.first < 0:
                sequence.own += own
                sequence.capped += cap
                sequence.moved += moved
            if self._group:
                continue  # further layers are to read it
            sequence.read += tokens
            if sequence.read == sequence.todo:
                self._reading.remove(sequence)
                self._start(sequence, at)

    def _start(self, sequence: Sequence, at: int) -> None:
        """A prompt is read: its first token is given, and it decodes from the next step on."""
        self._room.keep(sequence)
        if sequence.first < 0:
            sequence.first = at
            sequence.host += self._hosts - sequence.seen[2]
            sequence.interference = at - sequence.admitted - sequence.own - sequence.host - sequence.out
            sequence.interference -= sequence.capped + sequence.moved
            if sequence.forks:
                self._forks -= sequence.forks
                for one in self._room.fork(sequence):
                    self.running[one] = None
                    self._start(one, at)
        elif sequence.preempted >= 0:
            sequence.out += at - sequence.preempted
            sequence.preempted = -1
        self._pace.begin(sequence, at)
        sequence.seen = self._spent
        sequence.left -= 1
        if not sequence.left:
            del self.running[sequence]
            self._pace.end(sequence)
            self._finish(sequence, at)
            return
        sequence.decode += self.now - at  # the step under way goes on without it
        sequence.end = self.steps + sequence.left
        sequence.base = sequence.todo - self.steps
        self._turns += 1
        sequence.turn = self._turns
        heappush(self._ends, (sequence.end, sequence.turn, sequence))
        self._decoding += 1
        self._promised += sequence.end
        self._context += sequence.todo
        self._growth.add(sequence.base)
