"""The serving engine takes many equal steps at once: the same bits as a loop that takes them one after another."""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field, replace
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.capture import capture
from narrows.diagnose import prepared
from narrows.errors import NarrowsError
from narrows.machine import Machine, machine
from narrows.simulate.requests import PARTS, Answer, Request
from narrows.simulate.rules import Rules
from narrows.simulate.serving import Engine
from narrows.simulate.sharing import Sharing, Streams
from narrows.simulate.step_times import PS, Overlap, StepTimes
from narrows.simulate.tiers import PIECE, Tier, Tiers
from narrows.step import Step

PLAIN, BESIDE, BROKEN = (
    StepTimes(capture("smollm2-135m"), machine("l4"), 1, 512, 64, step_seconds=1e-3, sequence_seconds=1e-5, overlap=overlap)
    for overlap in (None, Overlap(1, 0.5, 0.4), Overlap(1, 0.5, 0.4))
)
CAPPED = StepTimes(capture("smollm2-135m"), machine("l4"), 1, 512, 64, step_seconds=1e-3, cap_watts=45.0)
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


Seen = tuple[Engine, list[Answer], Counter[int]]


def simulated(
    requests: list[Request],
    rules: Rules,
    blocks: int,
    times: StepTimes,
    streams: Streams | None = None,
    one: bool = False,
    tiers: tuple[Tier, ...] = (),
) -> Seen:
    """All requests served; `one`: so that no two steps are taken at once."""
    answers: list[Answer] = []
    gaps: Counter[int] = Counter()

    def tell(first: int, slope: int, n: int, sequences: int) -> None:
        for i in range(n):
            gaps[first + i * slope] += sequences

    def reject(request: Request, why: str) -> None:
        raise AssertionError(why)

    def advance(until: int | None) -> None:
        while one and engine.load and (until is None or engine.now < until):
            engine.advance(engine.now + 1)
        engine.advance(until)

    engine = Engine(times, rules, blocks, answers.append, reject, tell, streams, tiers=Tiers(tiers))
    for request in requests:
        advance(request.arrival)
        engine.push(request)
    advance(None)
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
@given(loads(), st.sampled_from([PLAIN, BESIDE, BROKEN, CAPPED]))
def test_runs_of_steps_give_the_same_bits_as_single_steps(load: tuple[list[Request], Rules, int], times: StepTimes) -> None:
    requests, rules, blocks = load
    engine, answers, gaps = simulated(requests, rules, blocks, times)
    got = {int(a.request.name): (a.admitted, a.first, a.last, a.preemptions) for a in answers}
    assert (got, gaps) == plain_loop(requests, rules, blocks, times)
    assert engine.room == blocks  # every block came back
    assert_accounted(answers)


def assert_accounted(answers: list[Answer]) -> None:
    for a in answers:
        parts = [getattr(a, part) for part in PARTS]
        assert sum(parts) == a.last - a.request.arrival and min(parts) >= 0


# ---- prompts in a stream of their own ----

L4 = machine("l4")


def cut(share: float = 0.0, slower: float = 1.3) -> Streams:
    ready = prepared(capture("smollm2-135m"), Step.decode(1, 1), L4, 1)
    return Streams(Sharing(share, slower=slower), ready, L4, 512, tabled)


@lru_cache
def tabled(part: Machine) -> StepTimes:
    return StepTimes(capture("smollm2-135m"), part, 1, 512, 64, step_seconds=1e-3, sequence_seconds=1e-5)


CUTS = [cut(), cut(0.3), cut(slower=1.05)]


@settings(max_examples=100, deadline=None)
@given(loads(), st.sampled_from(CUTS), st.sampled_from([0.0, 200.0]))
def test_two_streams_give_the_same_bits_step_by_step_and_lose_nothing(
    load: tuple[list[Request], Rules, int], streams: Streams, patience: float
) -> None:
    requests, rules, blocks = load
    rules = replace(rules, mixed=False, layered=0, batched=False, chunked=True, patience=patience)
    engine, answers, gaps = simulated(requests, rules, blocks, PLAIN, streams)
    assert (answers, gaps) == simulated(requests, rules, blocks, PLAIN, streams, one=True)[1:]
    assert len(answers) == len(requests) and engine.room == blocks and not engine.load
    assert sum(gaps.values()) == sum(r.output - 1 for r in requests)
    assert_accounted(answers)


def test_a_prompt_is_read_beside_decoding_at_once_and_both_take_what_their_share_says() -> None:
    rules, streams = Rules("two", mixed=False, max_tokens=512), cut(0.5)
    beside = streams.cuts[0]
    _, (one, two), gaps = simulated([Request(0, 100, 200), Request(PS // 2, 300, 1)], rules, 200, PLAIN, streams)
    if one.request.prompt == 300:
        one, two = two, one
    times = beside.prompts
    assert two.first - PS // 2 == times.rows(300) + times.prompt(300, 0) + times.outputs(1) + times.host(1)
    assert two.queue == 0
    late = [gap for gap in gaps if any(gap == beside.decoding.decode(1, n)[1] for n in range(100, 300))]
    assert sum(gaps[gap] for gap in late) == pytest.approx((two.first - PS // 2) / late[0], abs=1)
    alone = sum(PLAIN.decode(1, n)[1] for n in range(100, 299))
    assert one.last - one.first == alone + one.interference > alone  # what the prompt beside it cost is interference


def test_the_share_of_prompts_follows_what_waits_and_what_room_is_left() -> None:
    streams = cut(slower=3.0)
    units = {id(times): i for i, times in enumerate(one.prompts for one in streams.cuts)}
    few, many = ([(512, 0)], 2, 400, 0.1), ([(512, 0)], 60, 60 * 2000, 0.1)
    roomy, scarce = streams.choose(*many), streams.choose(*many[:3], 0.9)
    assert units[id(streams.choose(*few).prompts)] >= units[id(roomy.prompts)] >= units[id(scarce.prompts)]
    assert units[id(roomy.prompts)] > units[id(scarce.prompts)]


def test_two_streams_exclude_steps_that_hold_both() -> None:
    with pytest.raises(NarrowsError, match="a stream of their own"):
        simulated([], Rules("mixed"), 10, PLAIN, cut())
    with pytest.raises(NarrowsError, match="is no share"):
        Sharing(1.0)


# ---- tiers below the device's memory ----

PROMPTS = st.tuples(st.integers(1, 900), st.lists(st.integers(0, 6), max_size=4), st.integers(1, 40))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(PROMPTS, min_size=1, max_size=9),
    st.sampled_from([130, 200, 900]),
    st.tuples(st.integers(0, 3), st.integers(0, 4)),
    st.booleans(),
)
def test_what_is_found_below_is_counted_moved_and_the_same_step_by_step(
    prompts: list[tuple[int, list[int], int]], blocks: int, rooms: tuple[int, int], swap: bool
) -> None:
    requests = []
    for i, (more, names, output) in enumerate(prompts):
        hashes = tuple(hash(tuple(names[: k + 1])) for k in range(len(names)))
        requests.append(Request(i * PS // 20, PIECE * len(names) + more, output, hashes))
    requests = [r for r in requests if r.prompt + r.output <= blocks * 16]
    below = tuple(Tier(name, room, 10**9 * (i + 1)) for i, (name, room) in enumerate(zip(("host", "disk"), rooms, strict=True)))
    rules = Rules("tiered", max_sequences=4, max_tokens=512, swap=swap)
    engine, answers, gaps = simulated(requests, rules, blocks, PLAIN, tiers=below)
    again, *same = simulated(requests, rules, blocks, PLAIN, tiers=below, one=True)
    assert [answers, gaps] == same and engine.hits == again.hits
    assert len(answers) == len(requests) and engine.room == blocks
    assert_accounted(answers)
    if not engine.preemptions:
        assert sum(engine.hits) == sum(a.cached for a in answers)
        moved = sum(hits // PIECE * tier.fetch for hits, tier in zip(engine.hits[1:], below, strict=True))
        assert moved == sum(a.transfer for a in answers)


def test_a_sequence_that_is_swapped_out_comes_back_without_being_read_again() -> None:
    requests = [Request(0, 480, 200), Request(0, 480, 200)]  # 60 blocks hold both prompts, not both answers
    again, crowded, swapped = (
        simulated(
            requests, Rules("swap", max_tokens=512, prefix_cache=False, swap=swap), 66, PLAIN, tiers=(Tier("host", room, 512),)
        )
        for swap, room in ((False, 2), (True, 1), (True, 2))  # who is swapped has more than a piece
    )
    assert again[1:] == crowded[1:]  # where the host has no room, prompts are read again
    assert again[0].preemptions and swapped[0].preemptions
    late, early = (max(answers, key=lambda a: a.last) for _, answers, _ in (again, swapped))
    assert early.last < late.last and early.preemption < late.preemption
    with pytest.raises(NarrowsError, match="no host to swap to"):
        simulated(requests, Rules("swap", swap=True), 66, PLAIN)


def test_a_tier_without_end_finds_whatever_was_read() -> None:
    names = [(1, 2), (3, 4), (5, 6), (1, 2), (3, 9), (5, 6)]
    requests = [Request(i * PS, PIECE * 2 + 100, 5, pair) for i, pair in enumerate(names)]
    _, answers, _ = simulated(requests, Rules("tiered", max_tokens=512), 80, PLAIN, tiers=(Tier("host", 100, 7),))
    assert [a.cached // PIECE for a in answers] == [0, 0, 0, 2, 1, 2]
    assert [a.transfer for a in answers] == [0, 0, 0, 14, 7, 14]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 8)), max_size=60), st.integers(0, 3), st.integers(0, 3))
def test_who_is_swapped_takes_room_of_prompts_and_gives_it_back(events: list[tuple[bool, int]], first: int, second: int) -> None:
    tiers, away = Tiers((Tier("host", first, 1), Tier("disk", second, 2))), []
    for swaps, number in events:
        there = {piece for piece in range(9) if tiers.find(piece) >= 0}
        if not swaps:
            tiers.put(number)
            there.add(number)
        elif number < 6 and tiers.swap(200 * number):
            away.append(200 * number)
        elif number >= 6 and away:
            tiers.back(away.pop())
        places = [tiers.find(piece) for piece in range(9)]
        assert tiers.swapped == sum(away) <= first * PIECE
        assert places.count(0) * PIECE + tiers.swapped <= first * PIECE and places.count(1) <= second
        assert {piece for piece in range(9) if places[piece] >= 0} <= there


@given(st.lists(st.integers(0, 8), max_size=60), st.integers(1, 3), st.integers(0, 3))
def test_tiers_keep_what_was_used_last(pieces: list[int], first: int, second: int) -> None:
    tiers, last = Tiers((Tier("host", first, 1), Tier("disk", second, 2))), []
    for piece in pieces:
        tiers.put(piece)
        last = [*(p for p in last if p != piece), piece]
    for piece in range(9):
        age = len(last) - 1 - last.index(piece) if piece in last else 99
        assert (tiers.find(piece) == 0) == (age < first)
        assert tiers.find(piece) < 0 or age < first + second + len(set(pieces))
