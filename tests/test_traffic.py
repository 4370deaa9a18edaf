"""Replicas that are unlike: two equal groups are one, nothing is lost, each does what it can, and who routes knows it."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.capture import capture
from narrows.cli import cli
from narrows.cli.serving import serve as command
from narrows.errors import NarrowsError
from narrows.machine import machine
from narrows.simulate.asked import saturation, what_if
from narrows.simulate.fleet import Group, Groups, rules, serve
from narrows.simulate.outcome import Outcome
from narrows.simulate.requests import PARTS, Answer, Request
from narrows.simulate.rules import Rules
from narrows.simulate.scaling import Scaling
from narrows.simulate.step_times import PS
from narrows.simulate.traffic import ROUTES, fewest, least_work
from narrows.simulate.workload import Lengths, generate

GRAPH, SMALL = capture("smollm2-135m"), Rules("any", max_sequences=8, max_tokens=256)
FAST = Group(GRAPH, machine("h100-sxm"), SMALL, blocks=120)
SLOW = Group(GRAPH, machine("l4"), SMALL, blocks=60)
LOAD = list(generate(300.0, 400, Lengths(200, 40, 1, 1), seed=5))


def served(requests: list[Request], group: Groups, **options: object) -> tuple[Outcome, list[Answer]]:
    answers: list[Answer] = []
    return serve(requests, group, each=answers.append, **options), answers


@pytest.mark.parametrize("route", ROUTES.values())
@pytest.mark.parametrize("apart", [False, True])
def test_equal_groups_are_one_group_of_the_sum(route: object, apart: bool) -> None:
    one, two = replace(SLOW, replicas=3), (replace(SLOW, replicas=2), SLOW)
    whole, answers = served(LOAD, one, prefill=replace(SLOW, replicas=3) if apart else None, route=route)
    parts, same = served(LOAD, two, prefill=two if apart else None, route=route)
    assert answers == same
    seen = parts.as_json()
    assert sum(group["requests"] for group in seen.pop("groups")) == whole.requests * (1 + apart)
    assert seen | {"notes": []} == whole.as_json() | {"notes": []}


SIZES = st.tuples(st.integers(0, 40), st.integers(1, 1200), st.integers(1, 60))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(SIZES, min_size=1, max_size=30),
    st.lists(st.tuples(st.booleans(), st.integers(1, 2)), min_size=1, max_size=3),
    st.lists(st.tuples(st.booleans(), st.integers(1, 2)), max_size=2),
    st.sampled_from(sorted(ROUTES)),
)
def test_nothing_is_lost_on_unlike_replicas_and_each_second_has_its_place(
    sizes: list[tuple[int, int, int]], ones: list[tuple[bool, int]], others: list[tuple[bool, int]], route: str
) -> None:
    now, requests = 0, []
    for gap, prompt, output in sizes:
        now += gap * PS // 1000
        requests.append(Request(now, prompt, output))
    groups, prefill = (tuple(replace(FAST if fast else SLOW, replicas=many) for fast, many in some) for some in (ones, others))
    outcome, answers = served(requests, groups, prefill=prefill or None, route=ROUTES[route])
    room = max(group.blocks for group in groups)
    fits = [r for r in requests if (prefill and r.output == 1) or not r.refusal(SMALL, room)]  # one token comes from the reader
    if prefill:
        fits = [r for r in fits if not replace(r, output=1).refusal(SMALL, max(group.blocks for group in prefill))]
    assert sorted(a.request.arrival for a in answers) == [r.arrival for r in fits]  # whoever has room for it gets it
    assert outcome.rejected == len(requests) - len(fits) and outcome.tokens == sum(r.output for r in fits)
    for a in answers:
        assert sum(getattr(a, part) for part in PARTS) == a.last - a.request.arrival
    for group in outcome.groups:
        assert 0 <= group.utilization <= 1 + 1e-9 and group.seconds == outcome.seconds
    if outcome.groups:
        twice = sum(r.output > 1 for r in fits) if prefill else 0  # whose prompts one replica reads and that another answers
        assert sum(group.seen.requests for group in outcome.groups) == outcome.requests + twice
        assert sum(group.seen.tbt.count for group in outcome.groups) == outcome.tbt.count
    again = served(requests, groups, prefill=prefill or None, route=ROUTES[route])
    assert again[1] == answers and again[0].as_json() == outcome.as_json()


def test_least_work_knows_that_replicas_differ() -> None:
    graph, own, like = capture("llama-3.2-1b"), rules("vllm-v1"), Lengths(600, 100, 1, 1)
    groups = (Group(graph, machine("h100-sxm"), own), Group(graph, machine("l4"), own, replicas=2))
    load = list(generate(40.0, 500, like, seed=3))
    (plain, _), (known, _) = (served(load, groups, route=route) for route in (fewest, least_work))
    assert known.e2e.mean < 0.9 * plain.e2e.mean and known.e2e.quantile(0.99) < 0.9 * plain.e2e.quantile(0.99)
    full = [saturation(load, one) for one in groups]
    assert known.groups[0].seen.requests / len(load) == pytest.approx(full[0] / sum(full), abs=0.05)


def test_another_replica_helps_and_unlike_ones_cost_what_their_devices_do() -> None:
    alone, both = served(LOAD, SLOW)[0], served(LOAD, (SLOW, FAST), route=least_work)[0]
    assert both.e2e.mean < alone.e2e.mean
    for group, one in zip(both.groups, (SLOW, FAST), strict=True):
        assert group.dollars == pytest.approx(one.machine.price_per_hour * both.seconds / 3600)


def test_a_request_goes_where_there_is_room_for_it() -> None:
    outcome, answers = served([Request(i * PS, 1500, 2) for i in range(4)], (SLOW, FAST))  # 94 blocks: of 60 and of 120
    assert len(answers) == 4 and [group.seen.requests for group in outcome.groups] == [0, 4]


def test_what_else_to_ask_takes_unlike_replicas_too() -> None:
    groups = (FAST, SLOW)
    one, both = (saturation(LOAD, group) for group in (SLOW, groups))
    assert both > one
    gains = what_if(lambda some, prefill: serve(LOAD, some, prefill), groups)
    assert all(ratio <= 1.05 for ratios in gains.values() for ratio in ratios.values())


def test_replicas_that_come_and_go_are_alike() -> None:
    with pytest.raises(NarrowsError, match="are all alike"):
        serve(LOAD, (replace(SLOW, scaling=Scaling()), FAST))


def test_unlike_replicas_from_the_command_line() -> None:
    words = ["simulate", "serve", "smollm2-135m", "-m", "h100-sxm", "--rate", "30", "--requests", "60", "-p", "100", "-o", "20"]
    also = ["--also", "l4:2", "--also", "l4:replicas=1,weights=int8,max_sequences=4", "--route", "least-work"]
    found = CliRunner().invoke(cli, [*words, *also, "--json"])
    groups = json.loads(found.stdout)["groups"]
    assert [group["group"] for group in groups] == ["1 x 1 h100-sxm", "2 x 1 l4", "1 x 1 l4"]
    assert sum(group["share"] for group in groups) == pytest.approx(1)
    apart = CliRunner().invoke(cli, [*words, *also, "--prefill", "1", "--prefill-also", "l4:1"])
    assert "and 2 x 1 l4 and 1 x 1 l4, prompts on 1 x 1 h100-sxm and 1 x 1 l4" in apart.output.replace("\n", " ").replace(
        "  ", " "
    )
    assert "read the prompts of" in apart.output and "busy" in apart.output
    for more, says in (
        (["--also", "l4:replicas=0"], "replicas=0"),
        (["--also", "l4:speed=2"], "speed=2"),
        (["--also", "nothing"], "nothing"),
        (["--prefill-also", "l4"], "no replicas read prompts apart"),
        (["--also", "l4", "--policy", "sarathi-serve"], "a policy says itself"),
    ):
        assert says in str(CliRunner().invoke(cli, [*words, *more]).exception)
    choices = next(option.type.choices for option in command.params if option.name == "route")
    assert list(choices) == list(ROUTES)
