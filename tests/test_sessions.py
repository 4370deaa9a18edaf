"""Turns that follow an answer and several answers to one prompt: the bits of a loop that takes step by step, block by block."""

import json
import math
from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.capture import capture
from narrows.cli import cli
from narrows.errors import NarrowsError
from narrows.machine import Link, machine
from narrows.simulate.fleet import Group, clients, serve
from narrows.simulate.outcome import Outcome
from narrows.simulate.requests import PARTS, Answer, Request
from narrows.simulate.rules import Rules
from narrows.simulate.scaling import Scaling
from narrows.simulate.serving import Engine
from narrows.simulate.sessions import Talks, in_turns
from narrows.simulate.sharing import Sharing
from narrows.simulate.step_times import PS
from narrows.simulate.tiers import PIECE
from narrows.simulate.traffic import ROUTES, fewest, sticky
from narrows.simulate.workload import Lengths, generate, read

GRAPH, L4 = capture("smollm2-135m"), machine("l4")


@dataclass(eq=False)
class Plain:
    """An answer of the plain loop, with the blocks that it really has; the first `shares` of them its family has in common."""

    request: Request
    key: object
    todo: int
    left: int
    forks: int = 0
    read: int = 0
    blocks: list[int] = field(default_factory=list)
    family: list["Plain"] = field(default_factory=list)  # those that share, of the answers to one prompt
    shares: int = 0
    shared: int = 0  # blocks when it was evicted
    to_come: list[int] = field(default_factory=list)
    first: int = -1
    admitted: int = -1
    order: int = 0  # in which it began to decode


def plain_loop(requests: list[Request], rules: Rules, blocks: int, times: object) -> dict[str, tuple[int, int, int]]:
    """(admitted, first, last) by name: every block with what is in it, one step after another, on one engine."""
    free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
    inside: dict[int, tuple[object, int]] = {}
    where: dict[tuple[object, int], int] = {}
    size, now, evicted, orders = rules.block, 0, False, count(1)
    arriving = [(r.arrival, i, r) for i, r in enumerate(requests)]
    waiting: list[Plain] = []
    running: list[Plain] = []
    found: dict[str, tuple[int, int, int]] = {}

    def take(s: Plain, count: int) -> None:
        for _ in range(count):
            block, _ = free.popitem(last=False)
            forget(block)
            key = (s.key, len(s.blocks))
            inside[block], where[key] = key, block
            s.blocks.append(block)

    def forget(block: int) -> None:
        key = inside.pop(block, None)
        if key in where and where[key] == block:
            del where[key]

    def give(s: Plain, keep: int) -> None:
        """Blocks go back from the last to the first; `keep` of them can still be found."""
        for i, block in reversed(list(enumerate(s.blocks))):
            if i >= s.shares:
                if i >= keep:
                    forget(block)
                free[block] = None
        if s.shares:
            s.family.remove(s)
            if not s.family:
                for block in reversed(s.blocks[: s.shares]):
                    forget(block)
                    free[block] = None
        s.blocks, s.shares = [], 0

    def evict() -> Plain:
        nonlocal evicted
        last = running.pop()
        last.shared = last.shares
        give(last, len(last.blocks))
        if last.first >= 0 and last.read >= last.todo:
            last.todo = last.read + 1
        last.read, evicted = 0, True
        waiting.insert(0, last)
        return last

    def remembered(s: Plain) -> list[int]:
        if not rules.prefix_cache or (s.shared and not s.family):
            return []
        own = s.family[0].blocks[: s.shared] if s.shared else []
        while len(own) < (s.todo - 1) // size and (block := where.get((s.key, len(own)), -1)) in free:
            own = [*own, block]
        return own

    def wants(s: Plain, tokens: int) -> int:
        return -(-tokens // size) + (s.forks if tokens == s.todo and tokens % size else 0)

    def finish(s: Plain) -> None:
        r = s.request
        running.remove(s)
        turn = r.next_turn if not s.to_come else None
        give(s, (r.prompt + r.output - 1) // size if turn else 0)
        if s.to_come:
            s.to_come.pop()
            if s.to_come:
                return
        found[r.name] = (s.admitted, s.first, now)
        for one in r.then:
            insort(
                arriving, (now + one.arrival, 10**6 + len(found), replace(one, arrival=now + one.arrival)), key=lambda a: a[:2]
            )

    def start(s: Plain) -> Iterator[Plain]:
        """Its further answers, which share the full blocks of its prompt."""
        forks, s.forks = s.forks, 0
        full = s.todo // size
        copies, s.blocks = s.blocks[-(-s.todo // size) :], s.blocks[: -(-s.todo // size)]
        s.family, s.to_come, s.shares = [s], [0] * (1 + forks), full
        for output in s.request.also:
            one = Plain(s.request, (s.key, output, len(s.family)), s.todo, output - 1, 0, s.todo, family=s.family, shares=full)
            one.blocks = s.blocks[:full]
            if s.todo % size:
                forget(block := copies.pop(0))
                inside[block], where[one.key, full] = (one.key, full), block
                one.blocks.append(block)
            one.to_come, one.first, one.admitted, one.order = s.to_come, s.first, s.admitted, next(orders)
            s.family.append(one)
            yield one

    while arriving or waiting or running:
        if not waiting and not running:
            now = max(now, arriving[0][0])
        while arriving and arriving[0][0] <= now:
            r = arriving.pop(0)[2]
            waiting.append(Plain(r, r.session or r.name, r.prompt, r.output, len(r.also)))
        evicted = False
        decoding = [s for s in running if s.read >= s.todo]
        reading = [s for s in running if s.read < s.todo]
        pieces: list[tuple[Plain, int]] = []

        def make_room(decoding: list[Plain], reading: list[Plain]) -> None:
            while sum(len(s.blocks) * size <= s.read for s in decoding) > len(free):
                gone = evict()
                for some in (decoding, reading):
                    if gone in some:
                        some.remove(gone)

        beside = decoding if rules.mixed else []
        if waiting or reading:
            if rules.mixed:
                make_room(decoding, reading)
            budget = rules.max_tokens - len(beside)
            demand = sum(len(s.blocks) * size <= s.read for s in beside)
            for s in list(reading):
                piece = min(s.todo - s.read, budget)
                if piece < 1:
                    break
                while wants(s, s.read + piece) - len(s.blocks) > len(free) - demand and s in running:
                    gone = evict()
                    if gone in decoding:
                        decoding.remove(gone)
                    demand = sum(len(d.blocks) * size <= d.read for d in beside)
                if s not in running:
                    break
                take(s, wants(s, s.read + piece) - len(s.blocks))
                pieces.append((s, piece))
                budget -= piece
            while not evicted and waiting:
                s = waiting[0]
                if len(running) + sum(one.forks for one in running) + s.forks >= rules.max_sequences:
                    break
                own = remembered(s)
                piece = min(s.todo - len(own) * size, budget)
                if piece < 1 or (piece < s.todo - len(own) * size and not rules.chunked):
                    break
                more = wants(s, len(own) * size + piece) - len(own)
                shared = s.shared if own else 0
                if more > len(free) - demand - (len(own) - shared) - round(rules.watermark * blocks) and running:
                    break
                waiting.pop(0)
                for block in own[shared:]:
                    del free[block]
                s.blocks, s.read, s.shares, s.shared = own, len(own) * size, shared, 0
                if shared:
                    s.family.append(s)
                take(s, more)
                s.admitted = now if s.admitted < 0 else s.admitted
                running.append(s)
                pieces.append((s, piece))
                budget -= piece
        if not pieces:
            make_room(decoding, reading)
            beside = decoding
            if not beside:
                continue
        tokens, many = sum(p for _, p in pieces), len(beside)
        done = [s for s, piece in pieces if s.read + piece == s.todo]
        took = times.rows(tokens + many) + times.outputs(many + len(done)) + times.host(many + len(pieces))
        if many:
            context = sum(s.read for s in beside)
            line = times.decoding(many, context, tokens + many)
            took += line.base + line.slope * (context - line.start)
        now += took + sum(times.prompt(piece, s.read) for s, piece in pieces)
        for s in beside:
            if len(s.blocks) * size <= s.read:
                take(s, 1)
            s.read, s.todo, s.left = s.read + 1, s.todo + 1, s.left - 1
        for s in sorted((s for s in beside if not s.left), key=lambda s: s.order):
            finish(s)
        for s, piece in pieces:
            s.read += piece
            if s in done:
                s.left -= 1
                fresh, s.first = s.first < 0, now if s.first < 0 else s.first
                if fresh and s.forks:
                    further = list(start(s))
                    running.extend(further)
                    for one in [one for one in further if not one.left]:
                        finish(one)
                s.order = next(orders)
                if not s.left:
                    finish(s)
    return found


def talk(number: int, arrival: int, turns: list[tuple[int, int, int]], named: bool = False) -> Request:
    """A session of turns: (think time in ms, new words, answer); `named`: with the hashes of its pieces."""
    prompts, said = [], 0
    for _, words, output in turns:
        prompts.append(said + words)
        said += words + output
    following: tuple[Request, ...] = ()
    for i, ((think, _, output), prompt) in reversed(list(enumerate(zip(turns, prompts, strict=True)))):
        gap = think * PS // 1000 + 1000 * number + i if i else arrival  # so that no two requests arrive at once
        hashes = tuple(number << 32 | k for k in range(prompt // PIECE)) if named else ()
        following = (Request(gap, prompt, output, hashes, f"{number}.{i}", session=number, then=following),)
    return following[0]


TURNS = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 120), st.integers(1, 40)), min_size=1, max_size=4)


@st.composite
def loads(draw: st.DrawFn, named: bool = False) -> list[Request]:
    """Sessions, some of whose last turns have several answers, in the order of arrival."""
    now, found = 0, []
    for number, (gap, turns) in enumerate(draw(st.lists(st.tuples(st.integers(0, 20), TURNS), min_size=1, max_size=12)), 1):
        now += gap * PS // 1000
        also = tuple(draw(st.lists(st.integers(1, 120), max_size=4)))
        first = talk(number, now, turns, named)
        found.append(replace(first, also=also) if not first.then else first)
    return found


def every(requests: list[Request]) -> list[Request]:
    return [one for first in requests for one in (first, *first.followers())]


def served(requests: list[Request], group: object, **options: object) -> tuple[Outcome, list[Answer]]:
    answers: list[Answer] = []
    return serve(requests, group, each=answers.append, **options), answers


RULES = st.builds(
    Rules,
    st.just("any"),
    max_sequences=st.integers(5, 12),
    max_tokens=st.sampled_from([64, 512]),
    prefix_cache=st.booleans(),
    watermark=st.sampled_from([0.0, 0.05]),
)


def whole(rules: Rules, mixed: bool) -> Rules:
    return rules if mixed else replace(rules, mixed=False, chunked=False, max_tokens=4096)


@settings(max_examples=200, deadline=None)
@given(loads(), RULES, st.booleans(), st.integers(0, 12))
def test_turns_and_further_answers_give_the_bits_of_single_steps(
    requests: list[Request], rules: Rules, mixed: bool, more: int
) -> None:
    blocks = next(n for n in range(1, 1000) if not any(r.refusal(rules, n) for r in every(requests))) + more
    group = Group(GRAPH, L4, whole(rules, mixed), blocks=blocks)
    outcome, answers = served(requests, group)
    got = {a.request.name: (a.admitted, a.first, a.last) for a in answers}
    assert got == plain_loop(requests, group.rules, blocks, group.times())
    assert_conserved(outcome, answers, requests)


def assert_conserved(outcome: Outcome, answers: list[Answer], requests: list[Request]) -> None:
    sent = every(requests)
    assert outcome.requests == len(answers) and outcome.requests + outcome.rejected == len(sent)
    assert outcome.tokens == sum(a.request.tokens for a in answers)
    if not outcome.rejected:
        assert outcome.tbt.count == sum(sum(one - 1 for one in (r.output, *r.also)) for r in sent)
    for a in answers:
        parts = [getattr(a, part) for part in PARTS]
        assert sum(parts) == a.last - a.request.arrival and min(parts) >= 0
        assert a.request.arrival <= a.admitted < a.first <= a.last


# ---- many replicas ----


def stepwise(patch: pytest.MonkeyPatch) -> None:
    """Engines take one step at a time, in the order of their clocks."""
    run, bound = Engine._run, Engine.bound.fget
    patch.setattr(Engine, "_run", lambda self: (1, *run(self)[1:]))
    patch.setattr(
        Engine, "bound", property(lambda self: min(bound(self), self.now + 1) if self.running or self.waiting else math.inf)
    )


@settings(max_examples=100, deadline=None)
@given(
    loads(named=True),
    st.sampled_from(["together", "apart", "scaled", "streams", "clients"]),
    st.integers(1, 3),
    st.sampled_from(sorted(ROUTES)),
    st.integers(60, 200),
)
def test_replicas_give_the_bits_of_single_steps_and_lose_nothing(
    requests: list[Request], kind: str, replicas: int, route: str, blocks: int
) -> None:
    rules = Rules("any", max_sequences=6, max_tokens=256, mixed=kind != "streams")
    group = Group(GRAPH, L4, rules, replicas=replicas, blocks=blocks, host_bytes=1e8, context=900)
    prefill = replace(group, replicas=2) if kind == "apart" else None
    if kind == "scaled":
        group = replace(group, scaling=Scaling(1, 2.0, 0.1, 0.2))
    if kind == "streams":
        group = replace(group, sharing=Sharing(0.4))

    def once() -> tuple[Outcome, list[Answer]]:
        answers: list[Answer] = []
        if kind == "clients":
            return clients(requests, group, 3, each=answers.append, route=ROUTES[route]), answers
        return serve(requests, group, prefill, ROUTES[route], each=answers.append), answers

    outcome, answers = once()
    with pytest.MonkeyPatch.context() as patch:
        stepwise(patch)
        single = once()[1]
    by_name = lambda a: a.request.name  # noqa: E731
    assert sorted(answers, key=by_name) == sorted(single, key=by_name)
    assert_conserved(outcome, answers, requests)


def test_a_turn_finds_its_talk_on_the_replica_that_has_it() -> None:
    requests = [talk(n, n * PS // 10, [(0, 500, 100)] + [(2000, 60, 100)] * 5, named=True) for n in range(1, 17)]
    group = Group(GRAPH, L4, Rules("any", max_tokens=2048), replicas=4, blocks=2000)
    (stays, there), (strays, _) = (served(requests, group, route=route) for route in (sticky, fewest))
    assert stays.cached > 1.3 * strays.cached and stays.ttft.mean < strays.ttft.mean
    for a in there:
        turn = int(a.request.name.split(".")[1])
        if turn:  # all but what the last answer's last token and a block that was not full held
            before = 500 + 100 + 160 * (turn - 1)
            assert before - 1 - 16 < a.cached <= before - 1


def test_a_session_ends_with_a_turn_that_is_rejected_and_every_turn_is_counted() -> None:
    first = talk(1, 0, [(0, 100, 10), (10, 300, 10), (10, 10, 10)])
    outcome = served([first], Group(GRAPH, L4, Rules(), blocks=100, context=200))[0]
    assert (outcome.requests, outcome.rejected) == (1, 2)
    assert "200 tokens at most" in outcome.reasons[0] and "was rejected" in outcome.reasons[1]


def test_a_talk_that_was_forgotten_is_found_in_the_tiers_below() -> None:
    requests = [talk(n, n * PS, [(0, 600, 500), (20_000, 50, 10)], named=True) for n in range(1, 6)]
    group = Group(GRAPH, L4, Rules("any", max_tokens=2048), blocks=120)
    cold, warm = served(requests, group)[0], served(requests, replace(group, host_bytes=1e9))[0]
    assert cold.cached < warm.cached and sum(warm.hits) == warm.cached and warm.hits[1] >= 4 * 2 * PIECE


def test_sessions_obey_little_s_law_once_they_are_many() -> None:
    requests = [talk(n, n * PS // 5, [(0, 100, 40), (1000, 30, 40), (1000, 30, 40)]) for n in range(1, 400)]
    inside, answers = [], served(requests, Group(GRAPH, L4, Rules("any"), blocks=2000))[1]
    for tick in range(1300):  # moments of seconds in which as many begin as end, in no step with the arrivals
        now = round((20 + tick / 26) * PS)
        inside.append(sum(a.request.arrival <= now < a.last for a in answers))
    seen = [a for a in answers if 20 * PS <= a.request.arrival < 70 * PS]
    assert len(seen) == pytest.approx(50 * 5 * 3, rel=0.02)
    latency = sum(a.last - a.request.arrival for a in seen) / len(seen) / PS
    assert sum(inside) / len(inside) == pytest.approx(15 * latency, rel=0.05)


# ---- several answers to one prompt ----


def test_a_prompt_with_several_answers_is_read_once_and_its_blocks_are_shared() -> None:
    group = Group(GRAPH, L4, Rules("any"), blocks=1000)
    alone, many = (served([Request(0, 1000, 50, also=also)], group)[1][0] for also in ((), (50,) * 7))
    assert many.first == alone.first and many.prompt == alone.prompt
    assert many.decode > alone.decode
    engine = Engine(group.times(), group.rules, 1000, lambda answer: None, lambda request, why: None)
    engine.push(Request(0, 1000, 50, also=(50,) * 7))
    engine.advance(many.first + 1)
    assert 1000 - engine.room == 62 + 8 and engine.load == 8  # 62 full blocks in common, the last one eight times
    engine.advance()
    assert engine.room == 1000


def test_the_request_ends_with_its_longest_answer_and_says_how_many_tokens_it_got() -> None:
    outcome, (answer,) = served([Request(0, 100, 5, also=(1, 30))], Group(GRAPH, L4, Rules("any"), blocks=100))
    assert outcome.tokens == 36 and outcome.tbt.count == 4 + 0 + 29
    assert outcome.tpot.mean == pytest.approx((answer.last - answer.first) / PS / 29)


def test_more_answers_than_run_at_a_time_or_fit_are_rejected() -> None:
    outcome = served(
        [Request(0, 10, 5, also=(5,) * 5), Request(0, 300, 5, also=(5,) * 3), Request(0, 10, 5, also=(0,))],
        Group(GRAPH, L4, Rules("any", max_sequences=5), blocks=20),
    )[0]
    assert outcome.requests == 0 and outcome.rejected == 3
    assert "6 answers and 5 run" in outcome.reasons[0] and "needs 22 blocks" in outcome.reasons[1]


def test_further_answers_are_also_given_apart_from_where_the_prompt_was_read() -> None:
    free = replace(L4, links=(Link("nvlink", 1e30, 1e-15),), sources={})
    group = Group(GRAPH, free, Rules("any"), blocks=500)
    requests = [Request(i * 100 * PS, 100 + 31 * i, 1 + 7 * i, also=(3, 20)) for i in range(6)]
    together, apart = served(requests, group)[1], served(requests, group, prefill=group)[1]
    assert [(a.request, a.first, a.last) for a in together] == [(a.request, a.first, a.last) for a in apart]


# ---- where they come from ----


def test_generated_sessions_have_the_moments_that_were_asked_for_and_whole_talks_as_prompts() -> None:
    talks = Talks(3.0, 20.0, 1.0, Lengths(50, 80, 0.5, 0.5))
    sessions = list(in_turns(generate(5.0, 4000, Lengths(300, 80, 0.5, 0.5), seed=1), talks, seed=2))
    assert [r.then for r in sessions] == [r.then for r in in_turns(generate(5.0, 4000, Lengths(300, 80, 0.5, 0.5), 1), talks, 2)]
    sent = [[first, *first.followers()] for first in sessions]
    assert sum(map(len, sent)) / len(sent) == pytest.approx(3.0, rel=0.05)
    pairs = [pair for turns in sent for pair in pairwise(turns)]
    words = [b.prompt - a.prompt - a.output for a, b in pairs]
    assert min(words) >= 1 and sum(words) / len(words) == pytest.approx(50, rel=0.05)
    assert sum(b.arrival for _, b in pairs) / len(pairs) / PS == pytest.approx(20.0, rel=0.1)
    for a, b in pairs:
        assert a.session == b.session > 0 and b.hashes[: len(a.hashes)] == a.hashes and len(b.hashes) == b.prompt // PIECE
    named = [name for turns in sent for name in set(turns[-1].hashes)]
    assert len(named) == len(set(named))  # no two sessions have anything in common


def test_how_talks_go_on_is_known_where_a_trace_has_hashes() -> None:
    assert Talks.like("mooncake-conversation").turns > 1.2
    with pytest.raises(NarrowsError, match="nothing is known of the sessions"):
        Talks.like("azure-2023-conv")
    with pytest.raises(NarrowsError, match="0 turns"):
        Talks(0.0, 1.0, 1.0, Lengths(1, 1))
    with pytest.raises(NarrowsError, match="-1 s apart"):
        Talks(2.0, -1.0, 1.0, Lengths(1, 1))


ROWS = [
    {"arrival": 1.5, "prompt": 600, "output": 20, "session": "a", "turn": 1},
    {"think": 4, "prompt": 700, "output": 30, "session": "a", "turn": 2},
    {"think": 0.25, "prompt": 740, "output": 5, "session": "a", "turn": 3, "n": 2},
    {"arrival": 2, "prompt": 10, "output": 5, "n": 3},
    {"arrival": 2.5, "prompt": 9, "output": 5, "session": "b"},
]


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_trace_says_sessions_and_how_many_answers(tmp_path: Path) -> None:
    first, alone, single = read(written(tmp_path / "talks.jsonl", ROWS))
    assert [r.prompt for r in (first, *first.followers())] == [600, 700, 740]
    assert [r.arrival for r in (first, *first.followers())] == [0, 4 * PS, PS // 4]
    assert [len(r.hashes) for r in (first, *first.followers())] == [1, 1, 1]
    assert list(first.followers())[-1].also == (5,) and alone.also == (5, 5) and not alone.session
    assert (single.arrival, single.then) == (PS, ())


@pytest.mark.parametrize(
    ("change", "line", "says"),
    [
        ({"turn": 3}, 2, "turn 3 of session 'a' does not follow"),
        ({"session": "b"}, 2, "turn 2 of session 'b' does not follow"),
        ({"think": -1}, 2, "it arrives at -1"),
        ({"think": None}, 2, "think is None"),
        ({"prompt": 620}, 2, "no new words after the talk so far"),
        ({"n": 0}, 2, "answers are '0'"),
    ],
)
def test_a_trace_out_of_order_names_the_line(tmp_path: Path, change: dict[str, object], line: int, says: str) -> None:
    rows = [row | (change if i == line else {}) for i, row in enumerate(ROWS, 1)]
    with pytest.raises(NarrowsError, match=says) as refused:
        list(read(written(tmp_path / "talks.jsonl", rows)))
    assert f"line {line}" in str(refused.value)


def test_a_second_turn_before_the_first_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NarrowsError, match="line 1: turn 2 of session 'a'"):
        list(read(written(tmp_path / "talks.jsonl", ROWS[1:])))


def test_sessions_and_answers_from_the_command_line(tmp_path: Path) -> None:
    command = ["simulate", "serve", "smollm2-135m", "-m", "l4", "--blocks", "2000", "--rate", "5", "--requests", "40"]
    options = ["--turns", "3", "--think", "2", "--words", "40", "-p", "600", "-o", "30", "--answers", "2", "--json"]
    seen = json.loads(CliRunner().invoke(cli, [*command, *options, "-r", "2", "--route", "sticky"]).stdout)
    assert seen["requests"] > 60 and seen["prefix_hits"] > 0.4
    closed = json.loads(CliRunner().invoke(cli, [*command, *options, "--clients", "3"]).stdout)
    assert closed["requests"] == seen["requests"]
    trace = str(written(tmp_path / "talks.jsonl", ROWS))
    played = json.loads(CliRunner().invoke(cli, [*command[:-4], "--trace", trace, "--json"]).stdout)
    assert played["requests"] == 5 and played["prefix_hits"] > 0.3
    for words, says in (
        (["simulate", "serve", "smollm2-135m", "-m", "l4", "--trace", trace, "--turns", "2"], "a trace says itself"),
        (["plan", "serve", "smollm2-135m", "-m", "l4:2", "--trace", trace], "are not planned for"),
        ([*command, "--answers", "0"], "0 answers"),
    ):
        assert says in str(CliRunner().invoke(cli, words).exception)
