"""Demands and policies of serving: objectives, capacity, the split of a budget, and what every policy owes its clients."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.capture import capture
from narrows.cli import cli
from narrows.errors import NarrowsError
from narrows.machine import Link, machine
from narrows.simulate.demand import Demand, Deployment, Objective, split
from narrows.simulate.fleet import Group, clients, rules
from narrows.simulate.outcome import Outcome, Spread
from narrows.simulate.requests import Request
from narrows.simulate.step_times import Overlap, StepTimes
from narrows.simulate.workload import Lengths, generate
from narrows.technique import No, Serves, techniques

POLICIES = {slug: t for slug, t in techniques().items() if issubclass(t, Serves)}
REQUESTS = tuple(generate(20.0, 120, Lengths(900, 40, 0.5, 0.5), seed=3))
OBJECTIVES = (Objective("ttft", 0.9, 1.0), Objective("tpot", 0.9, 0.05), Objective("tbt", 0.99, 0.05))


def demand(model: str = "olmoe-1b-7b", replicas: int = 2, **changes: object) -> Demand:
    group = Group(capture(model), machine("a100-80gb"), rules("vllm-v1"), replicas=replicas)
    return replace(Demand(group, REQUESTS, OBJECTIVES), **changes)  # type: ignore[arg-type]


def one_unit() -> Group:
    group = demand(replicas=1).group
    return replace(group, machine=replace(group.machine, units=1))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_a_policy_and_its_baseline_answer_every_request_on_no_more_devices(policy: type[Serves]) -> None:
    wanted, one = demand(), policy()
    assert wanted.group.graph.find("expert")
    verdict = one.check(wanted)
    assert verdict is True or len(verdict.reason) > 20  # type: ignore[union-attr]
    for policy_or_baseline in [one.baseline()] + [one] * bool(verdict):
        deployed = policy_or_baseline.deploy(wanted)
        assert deployed.devices <= 2
        seen = wanted.play(deployed)
        assert (seen.requests, seen.rejected) == (len(REQUESTS), 0)
        assert seen.tokens == sum(r.output for r in REQUESTS)


def test_a_refusal_names_what_is_missing() -> None:
    tight = (Objective("tbt", 0.99, 1e-4),)
    asked = {
        "sarathi-serve": (demand(objectives=tight), "longer than 0.0001 s"),
        "distserve": (demand(replicas=1), "1 devices hold no replica"),
        "splitwise": (demand(replicas=1), "too little for a pool of each"),
        "nanoflow": (demand("smollm2-135m", requests=(Request(0, 1, 1),)), "nothing is gained"),
        "layered-prefill": (demand("llama-3.2-1b"), "no experts"),
        "nexus": (demand(replicas=1, group=one_unit()), "1 units: too few"),
        "deepflow-serverless-llm": (demand(replicas=1), "none can come or go"),
        "instinfer": (demand(), "fit the memory"),
    }
    for slug, (wanted, reason) in asked.items():
        verdict = POLICIES[slug]().check(wanted)
        assert isinstance(verdict, No), slug
        assert reason in verdict.reason


def test_a_demand_says_what_it_lacks() -> None:
    with pytest.raises(NarrowsError, match="no requests"):
        demand(requests=())
    with pytest.raises(NarrowsError, match="'tpft' is no measure"):
        Objective("tpft", 0.9, 1.0)
    at_once = demand(replicas=1, requests=(Request(0, 10, 2), Request(0, 10, 2)))
    assert at_once.play(Deployment(at_once.group), 5.0).requests == 2


def test_an_objective_counts_what_was_rejected_as_broken() -> None:
    outcome, objective = Outcome(), Objective("ttft", 0.5, 1.0)
    outcome.ttft.add(0.5)
    outcome.requests = 1
    assert objective.kept(outcome)
    for _ in range(2):
        outcome.reject(Request(0, 1, 1), "too long")
    assert not objective.kept(outcome)


def test_capacity_lies_between_a_rate_that_keeps_the_objectives_and_one_that_does_not() -> None:
    wanted = demand(replicas=1)
    deployed = Deployment(wanted.group)
    rate = wanted.capacity(deployed)
    assert rate > 0
    assert wanted.kept(wanted.play(deployed, rate))
    assert not wanted.kept(wanted.play(deployed, 1.1 * rate))
    assert demand(replicas=1, objectives=(Objective("ttft", 0.9, 1e-6),)).capacity(deployed) == 0


@settings(deadline=None)
@given(st.floats(1, 40), st.tuples(st.floats(0.1, 9), st.floats(1, 5)), st.tuples(st.floats(0.1, 9), st.floats(1, 5)))
def test_a_budget_is_split_as_well_as_any_other_way(
    budget: float, read: tuple[float, float], answer: tuple[float, float]
) -> None:
    (rate, price, _), readers, writers = split(budget, read, answer)
    assert -price <= budget
    assert rate == min(readers * read[0], writers * answer[0])
    affordable = [(a, b) for a in range(41) for b in range(41) if a * read[1] + b * answer[1] <= budget]
    assert rate == max(min(a * read[0], b * answer[0]) for a, b in affordable)


@settings(deadline=None)
@given(st.floats(1e-6, 10), st.floats(0, 0.1), st.integers(1, 100), st.integers(1, 5))
def test_a_run_of_numbers_is_counted_as_one_by_one(first: float, slope: float, n: int, weight: int) -> None:
    run, single = Spread(), Spread()
    run.add_run(first, slope, n, weight)
    for i in range(n):
        for _ in range(weight):
            single.add(first + i * slope)
    assert run.count == single.count
    assert run.total == pytest.approx(single.total)
    assert run.quantile(0.5) == pytest.approx(single.quantile(0.5), rel=4e-3)
    assert run.quantile(0.99) == pytest.approx(single.quantile(0.99), rel=4e-3)


def test_clients_obey_little_s_law() -> None:
    group = demand(replicas=1).group
    seen = clients(REQUESTS, group, 8)
    assert seen.requests == len(REQUESTS)
    assert seen.e2e.total / seen.seconds == pytest.approx(8, rel=0.1)  # fewer than 8 only while the last ones end


def test_keys_and_values_that_leave_layer_by_layer_are_seen_less() -> None:
    wire = Link("infiniband", 25e9, 1e-9)
    waits = []
    for streams in (False, True):
        reader = replace(demand(replicas=1).group, wire=wire, streams=streams)
        waits.append(demand().play(Deployment(reader, reader), 1.0).ledger()["transfer"])
    assert 0 < waits[1] < waits[0] / 4  # 16 layers: a sixteenth, where reading takes longer than sending


OVERLAPS = [None, Overlap(1, 0.5, 0.4), Overlap(2, 0.5, 0.4)]
PLAIN, WHOLE, HALVES = (
    StepTimes(capture("llama-3.1-8b"), machine("a100-80gb"), 2, 2048, 512, overlap=overlap) for overlap in OVERLAPS
)


@settings(deadline=None)
@given(st.integers(1, 512), st.integers(0, 2000), st.integers(1, 20_000))
def test_overlap_never_lengthens_a_step_nor_ends_it_before_its_longest_part(count: int, more: int, each: int) -> None:
    rows, context = count + more, count * each
    alone = PLAIN.decoding(count, context, rows)
    attention = alone.base + alone.slope * (context - alone.start)
    for times in (WHOLE, HALVES):
        piece = times.decoding(count, context, rows)
        seen = piece.base + piece.slope * (context - piece.start)
        slack = 2 + alone.slope * count + (context - alone.start)  # slopes and breaks are whole numbers
        assert times.rows(rows) + seen <= PLAIN.rows(rows) + attention + slack
        assert times.rows(rows) + seen >= attention - slack
        assert not piece.end or piece.start <= context < piece.end


def test_a_policy_is_played_from_the_command_line() -> None:
    load = ["--rate", "20", "--requests", "50", "--prompt", "2000", "--output", "20", "--tbt", "0.05", "--json"]
    command = ["simulate", "serve", "smollm2-135m", "-m", "l4", *load]
    found = CliRunner().invoke(cli, [*command, "--policy", "sarathi-serve:tokens=256"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["engine"] == "vllm-v1, sarathi-serve:tokens=256"
    for wrong, message in (("layered-prefill", "no experts"), ("awq", "no policy of serving")):
        refused = CliRunner().invoke(cli, [*command, "--policy", wrong])
        assert message in str(refused.exception)


def test_replicas_that_change_are_played_from_the_command_line(tmp_path: Path) -> None:
    trace = tmp_path / "turns.jsonl"
    turns = [
        {"timestamp": 1000 * i, "input_length": 1600, "output_length": 20, "hash_ids": [i % 40, 100 + i % 40, 200 + i % 40]}
        for i in range(120)
    ]
    trace.write_text("\n".join(map(json.dumps, turns)))
    command = ["simulate", "serve", "smollm2-135m", "-m", "l4", "-r", "3", "--blocks", "900", "--trace", str(trace)]
    options = ["--autoscale", "host", "--least", "1", "--power-cap", "60", "--host-cache", "2", "--disk-cache", "5"]
    found = CliRunner().invoke(cli, [*command, *options, "--json"])
    assert found.exit_code == 0, found.output
    seen = json.loads(found.stdout)
    assert seen["requests"] == 120 and len(seen["prefix_hits_by_tier"]) == 3
    assert sum(seen["prefix_hits_by_tier"]) == pytest.approx(seen["prefix_hits"]) and seen["prefix_hits_by_tier"][1] > 0.1
    assert {"cold_start", "power_cap", "transfer"} <= set(seen["ledger"]) and seen["ledger"]["transfer"] > 0
    shown = CliRunner().invoke(cli, [*command, *options])
    assert "replicas were started" in shown.output and "Of the prompts' tokens were found: device" in shown.output
    refused = CliRunner().invoke(cli, [*command, "--autoscale", "host", "--prefill", "1"])
    assert "Leave autoscaling out" in str(refused.exception)


def test_prompts_are_read_by_layers_or_in_pieces() -> None:
    group = demand(replicas=1).group
    with pytest.raises(NarrowsError, match="not both"):
        clients(REQUESTS, replace(group, rules=replace(group.rules, layered=512)), 1)
