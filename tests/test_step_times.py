"""What changes the time of a step composes: any two together, in bounds that each sets, and no bit where one is neutral."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.machine import machine
from narrows.simulate.demand import Demand, Objective
from narrows.simulate.fleet import Group, rules, serve
from narrows.simulate.requests import PARTS, Answer
from narrows.simulate.serving import Engine
from narrows.simulate.sharing import Sharing
from narrows.simulate.speculation import Speculation
from narrows.simulate.step_times import Overlap, Shelf
from narrows.simulate.tiers import Tiers
from narrows.simulate.workload import Lengths, generate
from narrows.technique import Serves, techniques

GROUP = Group(capture("llama-3.2-1b"), machine("a100-80gb"), rules("vllm-v1", max_tokens=512, max_sequences=32), blocks=600)
CUT = replace(GROUP, devices=2)  # whose collectives overlap hides
NEED = 1e4  # watts that no device draws
CHANGES = {
    "overlap": Overlap(1, 0.5, 0.4),  # in one part: weights are read once, so that it hides something even in small steps
    "sharing": Sharing(0.4),
    "speculation": Speculation(3, 0.7, capture("gpt2")),
    "shelf": Shelf(1e12, 2e10),
    "cap_watts": 220.0,
}
PAIRS = [pair for pair in combinations(CHANGES, 2) if set(pair) != {"overlap", "sharing"}]
LOAD = list(generate(40.0, 40, Lengths(400, 40, 1.0, 1.0), seed=5))


def changed(group: Group, *names: str) -> Group:
    own = replace(group.rules, mixed="sharing" not in names)
    return replace(group, rules=own, **{name: CHANGES[name] for name in names})  # type: ignore[arg-type]


def answers(group: Group) -> list[Answer]:
    found: list[Answer] = []
    serve(LOAD, group, each=found.append)
    return found


def one_by_one(group: Group) -> list[Answer]:
    """No two steps of any stream taken at once."""
    found: list[Answer] = []
    engine = Engine(group.times(), group.rules, group.room(), found.append, lambda request, why: None, None, group.cuts(),
                    tiers=Tiers(group.tiers()))  # fmt: skip
    for moment in [request.arrival for request in LOAD] + [None]:
        while engine.load and (moment is None or engine.now < moment):
            engine.advance(engine.now + 1)
        engine.advance(moment)
        if moment is not None:
            engine.push(LOAD[engine.pushed])
    return found


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("group", [GROUP, CUT], ids=["whole", "cut"])
def test_any_two_changes_compose(group: Group, pair: tuple[str, str]) -> None:
    both = changed(group, *pair)
    found = answers(both)
    assert found == one_by_one(both) and len(found) == len(LOAD)
    for a in found:
        parts = [getattr(a, part) for part in PARTS]
        assert sum(parts) == a.last - a.request.arrival and min(parts) >= 0
    for other in (changed(group, pair[0]), changed(group, pair[1])):
        assert found != answers(other)


UNCAPPED = [names for names in [(name,) for name in CHANGES] + PAIRS if "cap_watts" not in names]


@pytest.mark.parametrize("names", UNCAPPED, ids="-".join)
def test_a_cap_above_the_need_changes_no_bit(names: tuple[str, ...]) -> None:
    for group in (GROUP, CUT):
        one = changed(group, *names)
        assert answers(replace(one, cap_watts=NEED)) == answers(one)


@pytest.mark.parametrize("other", [name for name in CHANGES if name != "cap_watts"])
def test_a_lower_cap_makes_no_step_shorter(other: str) -> None:
    cuts: list[list[int]] = []
    for watts in (NEED, 350.0, 280.0, 220.0):
        one = replace(changed(CUT, other), cap_watts=watts)
        cut = one.cuts()
        tables = [one.times()] if cut is None else [one.times(), cut.cuts[0].prompts, cut.cuts[0].decoding]
        cuts.append([t.decode(n, n * 700)[1] + t.reading(m, n) + t.prompt(m, 300)
                     for t in tables for n in (1, 9, 32) for m in (1, 64, 512)])  # fmt: skip
    for quicker, slower in pairwise(cuts):
        assert all(a <= b for a, b in zip(quicker, slower, strict=True))
    assert sum(cuts[0]) < sum(cuts[-1])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([name for name in CHANGES if name != "speculation"]), st.integers(1, 32), st.integers(1, 3000))
def test_tokens_that_are_kept_more_often_never_take_longer(other: str, sequences: int, context: int) -> None:
    took = []
    for acceptance in (0.0, 0.4, 0.8, 0.95):
        drafts = replace(CHANGES["speculation"], acceptance=acceptance)  # type: ignore[type-var]
        one = replace(changed(GROUP, other), speculation=drafts)
        cut = one.cuts()
        times = cut.cuts[0].decoding if cut else one.times()
        took.append(times.decode(sequences, sequences * context)[1])
    assert took == sorted(took, reverse=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 32), st.integers(0, 400), st.integers(1, 9000))
def test_overlap_never_lengthens_a_step_that_is_capped_checked_or_read_from_drives(count: int, more: int, each: int) -> None:
    for other in ("cap_watts", "speculation", "shelf"):
        seen = []
        for group in (CUT, replace(CUT, overlap=CHANGES["overlap"])):
            times, context = changed(group, other).times(), count * each
            piece = times.decoding(count, context, count + more)
            assert piece.start <= context and (not piece.end or context < piece.end)
            reads = times.reading(more, count) if more else 0
            seen.append(times.rows(count) + reads + piece.base + piece.slope * (context - piece.start))
            slack = 4 + context  # slopes and breaks are whole numbers
        assert seen[1] <= seen[0] + slack


def test_a_share_of_the_units_has_as_much_of_the_cap() -> None:
    both = changed(GROUP, "sharing", "cap_watts")
    cut = both.cuts()
    assert cut
    free = replace(both, cap_watts=0.0).cuts()
    assert free
    slower = cut.cuts[0].prompts.rows(512) / free.cuts[0].prompts.rows(512)
    whole = both.times().rows(512) / replace(both, cap_watts=0.0).times().rows(512)
    assert slower == pytest.approx(whole, rel=0.1) and slower > 1.1


def test_what_two_streams_and_overlap_would_both_give_out_is_refused() -> None:
    with pytest.raises(NarrowsError, match="both give out the device's units"):
        replace(GROUP, overlap=Overlap(), sharing=Sharing())


@pytest.mark.parametrize("given", [(0, 0.5, 0.4), (2, 1.0, 0.4), (2, -0.1, 0.4), (2, 0.5, 1.1)])
def test_overlap_that_hides_nothing_is_refused(given: tuple[int, float, float]) -> None:
    with pytest.raises(NarrowsError, match="hides nothing"):
        Overlap(*given)


@pytest.mark.parametrize("given", [(0.0, 1.0, 1.0, 0.0), (1.0, 0.0, 1.0, 0.0), (1.0, 1.0, 0.0, 0.0), (1.0, 1.0, 1.0, -1.0)])
def test_a_shelf_without_room_or_rate_is_refused(given: tuple[float, float, float, float]) -> None:
    with pytest.raises(NarrowsError, match="cannot be"):
        Shelf(*given)


@pytest.mark.parametrize("slug", ["nanoflow", "sarathi-serve", "deepspeed-fastgen-dynamic-splitfuse", "nexus"])
def test_a_policy_is_served_with_speculation_under_a_cap(slug: str) -> None:
    policy = techniques()[slug]()
    assert isinstance(policy, Serves)
    group = replace(changed(GROUP, "speculation", "cap_watts"), blocks=2000)
    demand = Demand(group, tuple(LOAD), (Objective("tbt", 0.9, 1.0),))
    verdict = policy.check(demand)
    assert verdict is True or "nothing is gained" in verdict.reason  # type: ignore[union-attr]
    deployed = policy.deploy(demand).group
    assert (deployed.speculation, deployed.cap_watts) == (group.speculation, group.cap_watts)
    assert len(answers(deployed)) == len(LOAD)
