"""Laws of a fleet: queues as theory has them, nothing lost, everything accounted for, the same bits again."""

import random
import statistics
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.machine import Link, machine
from narrows.simulate.asked import saturation, timeline, what_if
from narrows.simulate.fleet import Group, engines, rules, serve
from narrows.simulate.outcome import Outcome
from narrows.simulate.requests import PARTS, Answer, Request
from narrows.simulate.rules import Rules
from narrows.simulate.scaling import Scaling, start_seconds
from narrows.simulate.serving import Engine
from narrows.simulate.step_times import PS, Shelf
from narrows.simulate.tiers import PIECE
from narrows.simulate.traffic import in_turn
from narrows.simulate.workload import Lengths, generate

GRAPH, L4 = capture("smollm2-135m"), machine("l4")
SMALL = Rules("vllm-v1", max_sequences=8, max_tokens=256)
ALONE = Group(GRAPH, L4, replace(SMALL, max_sequences=1, max_tokens=2048), blocks=1000)


def served(requests: list[Request], group: Group, prefill: Group | None = None) -> tuple[Outcome, list[Answer]]:
    answers: list[Answer] = []
    return serve(requests, group, prefill, each=answers.append), answers


def service(prompt: int, output: int) -> float:
    """Seconds of a request that is alone."""
    return served([Request(0, prompt, output)], ALONE)[0].e2e.mean


def against_theory(kinds: list[tuple[int, int]], use: float, seed: int) -> float:
    """Mean wait of Poisson requests of these kinds, over that of Pollaczek and Khinchine for the same arrivals."""
    alone = {kind: service(*kind) for kind in kinds}
    draw, mean = random.Random(seed), sum(alone.values()) / len(kinds)
    requests = [Request(r.arrival, *draw.choice(kinds)) for r in generate(use / mean, 10_000, Lengths(1, 1), seed=seed)]
    took = [alone[r.prompt, r.output] for r in requests]
    rate, mean, square = len(took) / (requests[-1].arrival / PS), sum(took) / len(took), sum(t * t for t in took) / len(took)
    answers = served(requests, ALONE)[1]
    waited = sum(a.queue for a in answers) / len(answers) / PS
    return waited / (rate * square / (2 * (1 - rate * mean)))


@pytest.mark.parametrize("use", [0.3, 0.7])
def test_equal_requests_one_at_a_time_wait_as_in_m_d_1(use: float) -> None:
    assert statistics.mean(against_theory([(100, 20)], use, seed) for seed in range(3)) == pytest.approx(1, abs=0.05)


def test_unequal_requests_one_at_a_time_wait_as_in_m_g_1() -> None:
    assert statistics.mean(against_theory([(50, 5), (200, 40)], 0.6, seed) for seed in range(3)) == pytest.approx(1, abs=0.05)


def test_requests_inside_are_rate_times_latency() -> None:
    group = Group(GRAPH, L4, SMALL, blocks=200)
    requests = list(generate(40.0, 3000, Lengths(200, 40, 1, 1), seed=4))
    answers: list[Answer] = []
    engine = Engine(group.times(), SMALL, 200, answers.append, lambda request, why: None)
    gap, now, inside, coming = PS // 50, 0, [], list(reversed(requests))
    while coming or engine.load:
        while coming and coming[-1].arrival <= now:
            engine.advance(coming[-1].arrival)
            engine.push(coming.pop())
        engine.advance(now)
        inside.append(engine.load)
        now += gap
    latency = sum(a.last - a.request.arrival for a in answers) / len(answers)
    assert sum(inside) / len(inside) == pytest.approx(len(answers) * latency / now, rel=0.005)


@st.composite
def loads(draw: st.DrawFn) -> list[Request]:
    sizes = st.tuples(st.integers(0, 40), st.integers(1, 400), st.integers(1, 60))
    now, found = 0, []
    for gap, prompt, output in draw(st.lists(sizes, min_size=1, max_size=30)):
        now += gap * PS // 1000
        found.append(Request(now, prompt, output, tuple(range(prompt // 600))))
    return found


@settings(max_examples=150, deadline=None)
@given(loads(), st.integers(1, 3), st.integers(0, 2), st.sampled_from(engines()), st.integers(8, 60), st.sampled_from([0, 200]))
def test_nothing_is_lost_and_every_second_has_its_place(
    requests: list[Request], replicas: int, reading: int, engine: str, blocks: int, context: int
) -> None:
    own = rules(engine, max_sequences=6, max_tokens=2048, block=16)
    group = Group(GRAPH, L4, own, replicas=replicas, blocks=blocks, context=context)
    apart = replace(group, replicas=reading, blocks=blocks) if reading else None
    outcome, answers = served(requests, group, apart)
    fitting = [r for r in requests if r.prompt + r.output - 1 <= 16 * blocks and (not context or r.prompt + r.output <= context)]
    assert outcome.requests == len(answers) == len(fitting) and outcome.rejected == len(requests) - len(fitting)
    assert outcome.tokens == sum(r.output for r in fitting) and outcome.prompts == sum(r.prompt for r in fitting)
    for a in answers:
        assert a.request.arrival <= a.admitted < a.first <= a.last
        assert sum(getattr(a, part) for part in PARTS) == a.last - a.request.arrival
    whole = sum(a.last - a.request.arrival for a in answers) / PS
    assert sum(outcome.ledger().values()) * len(answers) == pytest.approx(whole, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("reading", [0, 2])
def test_the_same_load_gives_the_same_bits(reading: int) -> None:
    group = Group(GRAPH, L4, SMALL, replicas=2, blocks=60)
    apart = replace(group, replicas=reading) if reading else None
    runs = [served(list(generate(60.0, 400, Lengths(200, 40, 1, 1), seed)), group, apart) for seed in (7, 7, 8)]
    assert runs[0][1] == runs[1][1] != runs[2][1]
    assert runs[0][0].as_json() == runs[1][0].as_json()


def test_apart_is_together_where_nothing_interferes_and_transfer_is_free() -> None:
    free = replace(L4, links=(Link("nvlink", 1e30, 1e-15),), sources={})
    group = Group(GRAPH, free, SMALL, blocks=500)
    requests = [Request(i * 100 * PS, 100 + 31 * i, 1 + 7 * i) for i in range(12)]
    together, apart = served(requests, group)[1], served(requests, group, group)[1]
    assert [(a.request, a.first, a.last) for a in together] == [(a.request, a.first, a.last) for a in apart]


def test_a_slow_wire_delays_what_follows_the_first_token() -> None:
    slow = replace(L4, links=(Link("nvlink", 1e6, 1e-3),), sources={})
    requests = [Request(0, 100, 10)]
    group = Group(GRAPH, slow, SMALL, blocks=100)
    (together,), (apart,) = served(requests, group)[1], served(requests, group, group)[1]
    seconds = 1e-3 + 100 * group.token_bytes() / 1e6
    assert apart.first == together.first
    assert (apart.last - together.last) / PS == pytest.approx(seconds) and apart.transfer / PS == pytest.approx(seconds)


def test_apart_needs_a_link() -> None:
    group = Group(GRAPH, replace(L4, links=(), sources={}), SMALL, blocks=100)
    with pytest.raises(NarrowsError, match="no link"):
        serve([Request(0, 10, 10)], group, group)


def test_requests_in_turn_are_spread_evenly() -> None:
    group = Group(GRAPH, L4, SMALL, replicas=4, blocks=100)
    alone = served([Request(0, 64, 8)], group)[0]
    outcome = serve([Request(0, 64, 8)] * 4, group, route=in_turn)
    assert outcome.e2e.mean == pytest.approx(alone.e2e.mean)


def test_a_load_past_saturation_ends_with_a_statement() -> None:
    seconds = service(100, 20)
    outcome = served(list(generate(5 / seconds, 500, Lengths(100, 20))), ALONE)[0]
    assert any("Past saturation" in note for note in outcome.notes()) and outcome.requests == 500


def test_a_request_past_the_context_is_rejected_with_its_reason() -> None:
    outcome = served([Request(0, 90, 10), Request(0, 91, 10)], replace(ALONE, context=100))[0]
    assert (outcome.requests, outcome.rejected) == (1, 1) and "100 tokens at most" in outcome.reasons[0]


# ---- what else there is to ask ----


def test_one_at_a_time_saturates_at_the_rate_of_its_service() -> None:
    assert saturation([Request(0, 100, 20)] * 50, ALONE) == pytest.approx(1 / service(100, 20), rel=1e-6)
    twice = replace(ALONE, replicas=2)
    assert saturation([Request(0, 100, 20)] * 50, twice) == pytest.approx(2 / service(100, 20), rel=0.03)


def test_saturation_needs_answers() -> None:
    with pytest.raises(NarrowsError, match="too few"):
        saturation([Request(0, 10**6, 10)], ALONE)


def test_more_of_a_resource_never_hurts_and_the_link_of_one_device_is_nothing() -> None:
    requests = list(generate(20.0, 200, Lengths(200, 40), seed=1))
    found = what_if(lambda group, apart: serve(requests, group, apart), Group(GRAPH, L4, SMALL, blocks=500))
    assert set(found) == {"compute", "bandwidth", "link"}
    assert set(found["link"].values()) == {1.0}
    for resource in ("compute", "bandwidth"):
        assert all(1 / 1.1 - 0.02 < ratio <= 1.0 for ratio in found[resource].values())
    assert found["bandwidth"]["tpot"] < found["compute"]["tpot"]


def test_a_timeline_has_every_second_of_every_request_in_a_lane_of_its_own() -> None:
    answers = served(list(generate(30.0, 100, Lengths(200, 40, 1, 1), seed=3)), Group(GRAPH, L4, SMALL, blocks=100))[1]
    found = timeline(answers)
    whole = sum(a.last - a.request.arrival for a in answers) / PS
    assert sum(span.end - span.start for span in found.spans) == pytest.approx(whole)
    for lane in found.lanes.values():
        assert all(found.spans[a].end <= found.spans[b].start + 1e-9 for a, b in pairwise(lane))
    assert len(found.trace()["traceEvents"]) > len(found.spans)


# ---- keys and values off the device ----


def test_keys_and_values_in_drives_take_their_bytes_at_the_rate_of_the_drives() -> None:
    near = replace(ALONE, blocks=0)
    each = near.token_bytes()
    seconds = []
    for rate, read in ((1e9, 1.0), (2e9, 1.0), (2e9, 0.5)):
        group = replace(near, shelf=Shelf(1e12, rate, read))
        assert group.room() == int(1e12 / (each * 16)) > near.room()
        seconds.append(served([Request(0, 1000, 201)], group)[0].tpot.mean)
    read = sum(1000 + i for i in range(1, 201)) / 200 * each / 1e9  # seconds of a token's keys and values at 1 GB/s
    assert seconds[0] - seconds[1] == pytest.approx(read / 2, rel=0.01)
    assert seconds[1] - seconds[2] == pytest.approx(read / 4, rel=0.01)


@pytest.mark.parametrize("pipeline, experts", [(1, 1), (2, 1), (1, 4)])
def test_the_batches_of_a_replica_share_its_host(pipeline: int, experts: int) -> None:
    group = Group(capture("olmoe-1b-7b"), machine("a100-80gb"), SMALL, 2, pipeline=pipeline, experts=experts, host_bytes=1e11)
    (host,) = group.tiers()
    used = host.pieces * PIECE * group.token_bytes() * group.devices * group.engines
    assert used == pytest.approx(1e11, rel=0.01) and used <= 1e11


# ---- a cap on power ----


def test_a_cap_lengthens_what_arithmetic_bounds_and_says_so() -> None:
    group = Group(capture("llama-3.2-1b"), machine("a100-80gb"), rules("vllm-v1"))
    requests = list(generate(30.0, 200, Lengths(1000, 40, 1, 1), seed=2))
    free = served(requests, group)[0]
    assert served(requests, replace(group, cap_watts=1000.0))[0].as_json() == free.as_json()
    before, capped = free.e2e.mean, []
    for watts in (300.0, 250.0, 200.0):
        outcome = served(requests, replace(group, cap_watts=watts))[0]
        assert outcome.e2e.mean > before
        before = outcome.e2e.mean
        capped.append(outcome.ledger()["power_cap"])
    assert 0 < capped[0] < capped[1] < capped[2] < before - free.e2e.mean
    alone = [served([Request(0, 10, 100)], replace(group, cap_watts=watts))[0].tpot.mean for watts in (0.0, 200.0)]
    assert alone[1] == pytest.approx(alone[0], rel=1e-3)  # one sequence waits for memory alone


def test_a_cap_that_cannot_be_held_is_refused() -> None:
    group = Group(GRAPH, L4, SMALL, blocks=100, cap_watts=20.0)
    with pytest.raises(NarrowsError, match="of its clock it draws up to"):
        group.times()
    with pytest.raises(NarrowsError, match="power is not known"):
        replace(group, machine=replace(L4, power_watts=None, sources={})).times()


# ---- replicas that come and go ----


def rising(count: int = 60) -> list[Request]:
    """A quiet start, a burst, a quiet end."""
    gaps = [0.5] * 5 + [0.005] * count + [2.0] * 10
    return [Request(round(sum(gaps[: i + 1]) * PS), 200, 60) for i in range(len(gaps))]


def test_replicas_that_are_all_always_there_are_as_without_scaling() -> None:
    group = Group(GRAPH, L4, SMALL, replicas=3, blocks=60)
    requests = list(generate(60.0, 400, Lengths(200, 40, 1, 1), 7))
    plain, same = served(requests, group), served(requests, replace(group, scaling=Scaling(3)))
    assert plain[1] == same[1]
    assert same[0].starts == 0 and same[0].replica_seconds == pytest.approx(plain[0].replica_seconds, rel=0.01)


@settings(max_examples=60, deadline=None)
@given(loads(), st.integers(0, 2), st.sampled_from([1.0, 3.0]), st.sampled_from([0.0, 0.05, 2.0]), st.sampled_from([0.0, 0.1]))
def test_replicas_that_come_and_go_lose_nothing(
    requests: list[Request], least: int, load: float, start: float, idle: float
) -> None:
    group = Group(GRAPH, L4, SMALL, replicas=4, blocks=60, scaling=Scaling(least, load, start, idle))
    outcome, answers = served(requests, group)
    assert len(answers) == len(requests)
    for a in answers:
        parts = [getattr(a, part) for part in PARTS]
        assert sum(parts) == a.last - a.request.arrival and min(parts) >= 0
        assert a.cold_start <= start * PS
    busy = sum(s for part, s in outcome.ledger().items() if part not in ("queue", "cold_start")) * len(answers)
    most = (max(a.last for a in answers) - min(r.arrival for r in requests)) / PS + start
    assert busy / SMALL.max_sequences <= outcome.replica_seconds * (1 + 1e-9)
    assert outcome.replica_seconds <= 4 * (most + requests[0].arrival / PS) * (1 + 1e-9)


def test_a_burst_starts_replicas_that_go_again_and_what_waits_for_the_first_says_so() -> None:
    group = Group(GRAPH, L4, SMALL, replicas=4, blocks=200)
    elastic = replace(group, scaling=Scaling(0, load=8, start_seconds=1.0, idle_seconds=1.0))
    outcome, answers = served(rising(), elastic)
    assert outcome.starts >= 2 and outcome.replica_seconds < 0.8 * served(rising(), group)[0].replica_seconds
    first = min(answers, key=lambda a: a.request.arrival)
    assert first.cold_start == PS and first.admitted == first.request.arrival + PS  # one starts for it and takes a second
    assert max(a.cold_start for a in answers if a.request.arrival > 4 * PS) == 0  # later ones go to those that serve


def test_a_replica_starts_when_its_engine_does_and_its_weights_are_there() -> None:
    h100, weights = machine("h100-sxm"), GRAPH.weight_bytes
    link, host = h100.link, h100.host_link
    assert link and host
    for source, rate in (("peer", link.bandwidth_bytes_per_s), ("host", host.bandwidth_bytes_per_s)):
        assert start_seconds(GRAPH, h100, 1, source, warm=True) == pytest.approx(weights / rate + 0.3)
    cold, warm = (start_seconds(GRAPH, h100, 1, "disk", one) for one in (False, True))
    assert cold - warm == 30.0
    with pytest.raises(NarrowsError, match="nothing comes from 'tape'"):
        start_seconds(GRAPH, h100, 1, "tape")
    with pytest.raises(NarrowsError, match="no link"):
        start_seconds(GRAPH, replace(h100, links=(), sources={}), 1, "peer")


def test_scaling_refuses_what_cannot_be() -> None:
    group = Group(GRAPH, L4, SMALL, blocks=100, scaling=Scaling(2))
    with pytest.raises(NarrowsError, match="2 are always there, and 1"):
        serve([Request(0, 10, 10)], group)
    with pytest.raises(NarrowsError, match="read prompts and decode"):
        serve([Request(0, 10, 10)], group, group)
    with pytest.raises(NarrowsError, match="cannot be"):
        Scaling(load=0)
    with pytest.raises(NarrowsError, match="several batches"):
        replace(group, pipeline=2)
