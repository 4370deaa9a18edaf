"""Ranking: what is free comes first, gains are ratios of two predictions, refusals have reasons."""

import json

import pytest

from narrows.capture import capture
from narrows.diagnose import diagnose, prepared, timed
from narrows.free import FREE
from narrows.machine import machine, of_cluster
from narrows.own import OWN
from narrows.papers import papers
from narrows.plan import Plan
from narrows.prescribe import WORTHWHILE, as_json, prescribe
from narrows.step import Step

A100, DECODE = machine("a100-80gb"), Step.decode(1, 2048)


def test_every_row_of_the_catalogue_is_ranked_or_refused() -> None:
    found = prescribe(capture("llama-3.1-8b"), A100, DECODE)
    ranked = {t.card.slug for o in found.options for t in o.plan}
    assert ranked | set(found.why_not) | {t.card.slug for o in found.free for t in o.plan} == {p.slug for p in papers()} | {
        *FREE,
        *OWN,
    }
    assert all(len(reason) > 10 for reason in found.why_not.values())


def test_gains_are_those_of_the_rewritten_graph() -> None:
    graph = capture("llama-3.1-8b")
    found = prescribe(graph, A100, DECODE)
    assert found.before.seconds == diagnose(graph, A100, DECODE).seconds
    for option in (*found.free, *found.options):
        after = timed(option.plan.rewrite(graph), A100, DECODE)[0]
        assert option.gain == pytest.approx(found.before.seconds / float(after))
        assert option.interval[0] <= option.gain <= option.interval[1]
        assert option.plan.conflict() is True
    gains = [o.gain for o in found.options if o.fits]
    assert gains == sorted(gains, reverse=True)
    assert found.best is not None


def test_weight_formats_help_decoding_and_not_long_prompts() -> None:
    graph = capture("llama-3.1-8b")
    decode = prescribe(graph, A100, DECODE)
    assert any("awq" in str(o.plan) and o.gain > 1.5 for o in decode.options)
    prefill = prescribe(graph, A100, Step.prefill(8, 4096))
    assert not any("awq" in str(o.plan) for o in prefill.options)
    assert "not prefill" in prefill.why_not["awq"]


def test_what_is_free_is_what_techniques_must_beat() -> None:
    graph = capture("smollm2-135m")
    from dataclasses import replace

    found = prescribe(replace(graph, eager=True), machine("h100-sxm"), Step.decode(1, 128))
    assert found.free[0].plan.steps[0].card.slug == "compile"
    for option in found.options:
        smaller = option.bytes_saved > 0
        assert option.over_free >= WORTHWHILE or smaller


def test_a_slow_network_calls_for_compressed_gradients() -> None:
    graph, step = capture("bert-large"), Step.train(16, 128)
    slow = prescribe(graph, of_cluster("ethernet-10g-v100"), step, replicas=64)
    assert any("1-bit-adam" in str(o.plan) and o.gain > 2 for o in slow.options)
    alone = prescribe(graph, machine("v100-sxm2-32gb"), step)
    assert "one device" in alone.why_not["1-bit-adam"]


def test_only_what_keeps_quality_is_left_within_a_ratio() -> None:
    found = prescribe(capture("llama-3.1-8b"), A100, DECODE)
    kept = found.within(1.0)
    assert all(o.exact or (o.quality_ratio is not None and o.quality_ratio <= 1.0) for o in (*kept.free, *kept.options))
    assert len(kept.options) < len(found.options)


def test_a_prescription_is_plain_data() -> None:
    data = as_json(prescribe(capture("bert-base"), A100, Step.forward(8, 128)))
    assert json.loads(json.dumps(data)) == data
    assert {"model", "machine", "step_seconds", "limit", "free", "options", "best", "why_not"} == set(data)


def test_plans_order_their_techniques_and_refuse_conflicts() -> None:
    plan = Plan.parse("awq:group=64 + llm-drop")
    assert [t.card.slug for t in plan] == ["llm-drop", "awq"]
    assert Plan.parse(str(plan)) == plan
    clash = Plan.parse("awq + awq:group=64").conflict()
    assert not clash
    assert "awq" in clash.reason  # type: ignore[union-attr]


def test_replicas_exchange_gradients_once() -> None:
    graph, step = capture("bert-base"), Step.train(1, 128)
    ready = prepared(graph, step, machine("h100-sxm"), replicas=8)
    assert sum(op.kind == "all_reduce" for op in ready) == 1
    assert sum(op.kind == "all_reduce" for op in prepared(graph, step, machine("h100-sxm"))) == 0
