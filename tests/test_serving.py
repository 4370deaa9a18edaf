"""The serving engine takes many equal steps at once: the same bits as a loop that takes them one after another."""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.capture import capture
from narrows.machine import machine
from narrows.simulate.serving import Answer, Engine, Request, Rules
from narrows.simulate.step_times import PS, Overlap, StepTimes

PLAIN, BESIDE, BROKEN = (
    StepTimes(capture("smollm2-135m"), machine("l4"), 1, 512, 64, step_seconds=1e-3, sequence_seconds=1e-5, overlap=overlap)
    for overlap in (None, Overlap(1, 0.5, 0.4), Overlap(1, 0.5, 0.4))
)
BROKEN._rows = [rows // 20 for rows in BROKEN._rows]  # so that attention meets every break of its line within these loads
BROKEN._more = [20_000_000] * len(BROKEN._rows)


@dataclass(eq=False)
class Plain:
    """A sequence of the plain loop, with the blocks that it really has."""

    request: Request
    todo: int
    left: int
    index: int
    read: int = 0
    blocks: list[int] = field(default_factory=list)
    first: int = -1
    admitted: int = -1
    evictions: int = 0
    told: int = -1


Found = tuple[dict[int, tuple[int, int, int, int]], Counter[int]]


def plain_loop(requests: list[Request], rules: Rules, blocks: int, times: StepTimes) -> Found:
    """(admitted, first, last, evictions) by request, one step after another, every block with what is in it.

    And how often which time passed between two tokens of a request.
    """
    free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
    inside: dict[int, tuple[int, int]] = {}
    where: dict[tuple[int, int], int] = {}
    now, arriving, waiting, running, answers = 0, list(enumerate(requests)), [], [], {}
    group, gaps = 0, Counter()

    def take(sequence: Plain, count: int) -> None:
        for _ in range(count):
            block, _ = free.popitem(last=False)
            where.pop(inside.pop(block, (-1, -1)), None)
            key = (sequence.index, len(sequence.blocks))
            inside[block], where[key] = key, block
            sequence.blocks.append(block)

    def give(sequence: Plain, keep: bool) -> None:
        for block in reversed(sequence.blocks):
            if not keep:
                where.pop(inside.pop(block), None)
            free[block] = None
        sequence.blocks = []

    def evict() -> Plain:
        last = running.pop()
        give(last, True)
        if last.first >= 0 and last.read >= last.todo:  # decoding: all it has said must be read again
            last.todo = last.request.prompt + last.request.output - last.left
        last.read = 0
        last.evictions += 1
        waiting.insert(0, last)
        return last

    while arriving or waiting or running:
        if not waiting and not running:
            now = max(now, arriving[0][1].arrival)
        while arriving and arriving[0][1].arrival <= now:
            index, request = arriving.pop(0)
            waiting.append(Plain(request, request.prompt, request.output, index))
        evicted = False
        reading = [s for s in running if s.read < s.todo]
        decoding = [s for s in running if s.read >= s.todo]
        beside = decoding if rules.mixed else []
        pieces: list[tuple[Plain, int]] = []

        def room_to_decode(decoding: list[Plain], reading: list[Plain]) -> None:
            nonlocal evicted
            while sum(len(s.blocks) * rules.block <= s.read for s in decoding) > len(free):
                gone = evict()
                evicted = True
                if gone in decoding:
                    decoding.remove(gone)
                if gone in reading:
                    reading.remove(gone)

        may = waiting and not (rules.batched and running and not reading)
        if may or reading:
            if rules.mixed:
                room_to_decode(decoding, reading)
                beside = decoding
            budget = rules.max_tokens - len(beside)
            demand = sum(len(s.blocks) * rules.block <= s.read for s in beside)
            for s in list(reading):
                piece = min(s.todo - s.read, budget)
                if piece < 1:
                    break
                while -(-(s.read + piece) // rules.block) - len(s.blocks) > len(free) - demand and s in running:
                    gone = evict()
                    evicted = True
                    if gone in decoding:
                        decoding.remove(gone)
                    demand = sum(len(d.blocks) * rules.block <= d.read for d in beside)
                if s not in running:
                    break
                take(s, -(-(s.read + piece) // rules.block) - len(s.blocks))
                pieces.append((s, piece))
                budget -= piece
            group = group if pieces else 0
            while may and not evicted and not group and waiting and len(running) < rules.max_sequences:
                s = waiting[0]
                own = 0
                while rules.prefix_cache and own < (s.todo - 1) // rules.block and where.get((s.index, own), -1) in free:
                    own += 1
                piece = min(s.todo - own * rules.block, budget)
                if piece < 1 or (piece < s.todo - own * rules.block and not rules.chunked):
                    break
                room = len(free) - demand - own - round(rules.watermark * blocks)
                more = -(-(own * rules.block + piece) // rules.block) - own
                if more > room and running:
                    break
                waiting.pop(0)
                for i in range(own):
                    block = where[s.index, i]
                    del free[block]
                    s.blocks.append(block)
                s.read = own * rules.block
                take(s, more)
                s.admitted = now if s.admitted < 0 else s.admitted
                running.append(s)
                pieces.append((s, piece))
                budget -= piece
        if not pieces:
            room_to_decode(decoding, reading)
            beside = decoding
            if not beside:
                continue
        read, tokens, count = pieces, sum(p for _, p in pieces), len(beside)
        groups = min(-(-tokens // rules.layered), times.layers) if rules.layered and pieces else 1
        if pieces:
            group = group + 1 if group + 1 < groups else 0
            pieces = [] if group else pieces
        done = [s for s, piece in pieces if s.read + piece == s.todo]
        alone = times.rows(count) if count else 0
        took = alone + (times.rows(tokens + count) - alone) // groups + times.outputs(count + len(done))
        took += times.host(count + len(read))
        if count:
            context = sum(s.read for s in beside)
            piece_of = times.decoding(count, context, tokens + count)
            took += piece_of.base + piece_of.slope * (context - piece_of.start)
        took += sum(times.prompt(piece, s.read) // groups for s, piece in read)
        now += took
        for s in beside:
            if len(s.blocks) * rules.block <= s.read:
                take(s, 1)
            s.read += 1
            s.todo += 1
            s.left -= 1
            gaps[now - s.told] += 1
            s.told = now
        for s, piece in pieces:
            s.read += piece
            if s in done:
                s.left -= 1
                if s.first >= 0:
                    gaps[now - s.told] += 1
                s.first, s.told = now if s.first < 0 else s.first, now
        for s in [s for s in running if s.read >= s.todo and not s.left]:
            running.remove(s)
            give(s, False)
            answers[s.index] = (s.admitted, s.first, now, s.evictions)
    return answers, gaps


def simulated(requests: list[Request], rules: Rules, blocks: int, times: StepTimes) -> tuple[Engine, list[Answer], Counter[int]]:
    answers: list[Answer] = []
    gaps: Counter[int] = Counter()

    def tell(first: int, slope: int, n: int, sequences: int) -> None:
        for i in range(n):
            gaps[first + i * slope] += sequences

    def reject(request: Request, why: str) -> None:
        raise AssertionError(why)

    engine = Engine(times, rules, blocks, answers.append, reject, tell)
    for request in requests:
        engine.advance(request.arrival)
        engine.push(request)
    engine.advance()
    return engine, answers, gaps


@st.composite
def loads(draw: st.DrawFn) -> tuple[list[Request], Rules, int]:
    count = draw(st.integers(1, 25))
    gaps = draw(st.lists(st.integers(0, 60), min_size=count, max_size=count))
    sizes = draw(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 60)), min_size=count, max_size=count))
    now, requests = 0, []
    for i, (gap, (prompt, output)) in enumerate(zip(gaps, sizes, strict=True)):
        now += gap * PS // 1000
        requests.append(Request(now, prompt, output, name=str(i)))
    mixed = draw(st.booleans())
    layered = draw(st.sampled_from([0, 32, 200])) if mixed else 0
    rules = Rules(
        "any",
        max_sequences=draw(st.integers(1, 16)),
        max_tokens=draw(st.sampled_from([64, 512])) if mixed and not layered else 512,
        mixed=mixed,
        chunked=not layered and (mixed or draw(st.booleans())),
        watermark=draw(st.sampled_from([0.0, 0.05])),
        prefix_cache=draw(st.booleans()),
        batched=draw(st.booleans()),
        layered=layered,
    )
    return requests, rules, draw(st.integers(23, 120))


@settings(max_examples=500, deadline=None)
@given(loads(), st.sampled_from([PLAIN, BESIDE, BROKEN]))
def test_runs_of_steps_give_the_same_bits_as_single_steps(load: tuple[list[Request], Rules, int], times: StepTimes) -> None:
    requests, rules, blocks = load
    engine, answers, gaps = simulated(requests, rules, blocks, times)
    got = {int(a.request.name): (a.admitted, a.first, a.last, a.preemptions) for a in answers}
    assert (got, gaps) == plain_loop(requests, rules, blocks, times)
    assert engine.room == blocks  # every block came back
    for a in answers:
        parts = (a.queue, a.prompt, a.interference, a.decode, a.communication, a.host, a.preemption)
        assert sum(parts) == a.last - a.request.arrival and min(parts) >= 0
