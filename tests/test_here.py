"""What is made of measurements on this machine: errors, intervals, and whether the faster of two forms was named."""

import pytest

from narrows.errors import NarrowsError
from narrows.gain import Parts
from narrows.here import Case, measure, summary
from narrows.machine import machine


def case(plan: str, measured: float, predicted: float, step: str = "decode") -> Case:
    rests = Parts(predicted, {plan or "fp32": 0.1 * predicted})
    return Case("m", plan, step, measured, predicted, predicted * 0.9, predicted * 1.1, rests)


def test_errors_and_intervals_are_counted_over_the_cases() -> None:
    found = summary([case("", 1.0, 1.05), case("bf16", 0.5, 0.75), case("", 2.0, 2.0, "prefill")])
    assert found["median"] == pytest.approx(0.05)
    assert found["mape"] == pytest.approx((0.05 + 0.5) / 3)
    assert found["coverage80"] == pytest.approx(2 / 3)
    assert found["worst"]["plan"] == "bf16"


def test_the_faster_of_two_forms_must_be_named_at_the_same_step() -> None:
    right = summary([case("", 1.0, 1.0), case("bf16", 0.5, 0.9)])["faster_or_slower"]
    wrong = summary([case("", 1.0, 1.0), case("bf16", 0.5, 1.1)])["faster_or_slower"]
    even = summary([case("", 1.0, 1.0), case("bf16", 1.01, 0.5)])["faster_or_slower"]
    other = summary([case("", 1.0, 1.0), case("bf16", 0.5, 1.1, "prefill")])["faster_or_slower"]
    assert [right, wrong, even, other] == [{"cases": n, "right": r} for n, r in ((1, 1), (1, 0), (0, 0), (0, 0))]


def test_gains_are_judged_between_forms_of_one_step() -> None:
    found = summary([case("", 1.0, 1.0), case("bf16", 0.5, 0.55), case("awq", 0.5, 1.0), case("", 2.0, 2.0, "prefill")])
    assert [(g["before"], g["after"], g["measured"]) for g in found["gains"]] == [
        ("", "bf16", 2.0),
        ("", "awq", 2.0),
        ("bf16", "awq", 1.0),
    ]
    assert [g["predicted"] for g in found["gains"]] == pytest.approx([1 / 0.55, 1.0, 0.55])
    assert found["gains_coverage80"] == pytest.approx(1 / 3)
    assert all("parts" not in row for row in found["measurements"])
    assert summary([case("", 1.0, 1.0)])["gains_coverage80"] is None


def test_models_run_in_every_form_they_take_and_what_is_absent_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is not this one: only that each case is run and predicted."""
    import narrows.here as here

    def missing() -> object:
        raise NarrowsError("the sample is not installed.", remedy="Install it.")

    monkeypatch.setattr(here, "cpu_seconds", lambda run, rounds, least: [float(run() is not None)])
    chosen = {name: here._MODELS[name] for name in ("all-minilm-l6-v2", "efficientnet-lite0")}
    monkeypatch.setattr(here, "_MODELS", {**chosen, "smollm2-135m": (missing, here._generation)})
    found, absent = measure(machine("desktop-avx2"))
    assert absent["smollm2-135m"] == "the sample is not installed. Install it."
    assert {c.model for c in found} | set(absent) == set(here._MODELS)
    assert {c.plan for c in found if c.model == "all-minilm-l6-v2"} >= {"", "bf16"}
    assert all(0 < c.low <= c.predicted <= c.high for c in found)
    assert summary(found, absent)["absent"] == [{"model": name, "reason": why} for name, why in absent.items()]
