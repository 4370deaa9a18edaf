"""Traces are read as they come, every fault is named with its line, and generators have the moments that they are given."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.errors import NarrowsError
from narrows.simulate.requests import Request
from narrows.simulate.step_times import PS
from narrows.simulate.workload import Lengths, first, generate, like, loads, mean_rate, ramped, read, scaled, swung

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def written(folder: Path, text: str, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


def test_azure_rows_start_at_zero_and_keep_their_gaps(tmp_path: Path) -> None:
    path = written(tmp_path, f"{AZURE}2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n")
    one, two = read(path)
    assert (one.arrival, one.prompt, one.output) == (0, 374, 44)
    assert two.arrival == pytest.approx(4.314579 * PS, rel=1e-6) and (two.prompt, two.output) == (396, 109)


def test_mooncake_times_are_milliseconds_and_hashes_are_kept(tmp_path: Path) -> None:
    rows = [{"timestamp": 1000 + 27 * i, "input_length": 600, "output_length": 5, "hash_ids": [0, i]} for i in range(2)]
    found = list(read(written(tmp_path, "\n".join(map(json.dumps, rows)))))
    assert [r.arrival for r in found] == [0, 27 * PS // 1000] and found[1].hashes == (0, 1)


def test_vllm_requests_carry_their_names(tmp_path: Path) -> None:
    row = {"request_id": "a", "input_toks": 3, "output_toks": 4, "arrival_time": 1787267980.08, "queued_ts": 1.0}
    assert list(read(written(tmp_path, json.dumps(row)))) == [Request(0, 3, 4, (), "a")]


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("", "", "lacks the columns"),
        ("TIMESTAMP,ContextTokens\n1,2\n", "", "lacks the columns GeneratedTokens"),
        (AZURE, "", "no requests"),
        (AZURE + "1,10,5\n0.5,10,5\n", "line 3", "0.5 s before the line above"),
        (AZURE + "-1,10,5\n", "line 2", "arrives at -1"),
        (AZURE + "nan,10,5\n", "line 2", "arrives at nan"),
        (AZURE + "inf,10,5\n", "line 2", "arrives at inf"),
        (AZURE + "noon,10,5\n", "line 2", "'noon' is no time"),
        (AZURE + "1,0,5\n", "line 2", "prompt tokens are '0'"),
        (AZURE + "1,10,0\n", "line 2", "output tokens are '0'"),
        (AZURE + "1,-3,5\n", "line 2", "prompt tokens are '-3'"),
        (AZURE + "1,2.5,5\n", "line 2", "prompt tokens are '2.5'"),
        (AZURE + "1,99999999999999999999,5\n", "line 2", "prompt tokens are"),
        (AZURE + "1,10\n", "line 2", "output tokens are"),
        ('{"timestamp": 0, "input_length": 5}', "line 1", "not the fields of a trace"),
        ('{"timestamp": 0,', "line 1", "not JSON"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1}\n[1]', "line 2", "not the fields"),
        ('{"timestamp": "0", "input_length": 5, "output_length": 1}', "line 1", "timestamp is '0'"),
        ('{"timestamp": -5, "input_length": 5, "output_length": 1}', "line 1", "arrives at -0.005"),
        ('{"timestamp": NaN, "input_length": 5, "output_length": 1}', "line 1", "timestamp is nan"),
        (f'{{"timestamp": {10**400}, "input_length": 5, "output_length": 1}}', "line 1", "timestamp is 1000"),
        ('{"timestamp": 0, "input_length": Infinity, "output_length": 1}', "line 1", "prompt tokens are 'inf'"),
        ('{"timestamp": 0, "input_length": [5], "output_length": 1}', "line 1", "prompt tokens are '[5]'"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": 3}', "line 1", "hash_ids"),
    ],
)
def test_a_fault_is_named_with_its_line(tmp_path: Path, text: str, line: str, says: str) -> None:
    with pytest.raises(NarrowsError) as error:
        list(read(written(tmp_path, text)))
    assert line in error.value.where and says in error.value.problem and error.value.remedy


def test_what_is_no_text_or_not_there_is_refused(tmp_path: Path) -> None:
    binary = tmp_path / "trace.bin"
    binary.write_bytes(b"\xff\xfe\x00\x81" * 50)
    for path in (binary, tmp_path / "none.csv", tmp_path):
        with pytest.raises(NarrowsError, match="Give a trace"):
            list(read(path))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([b"", AZURE.encode(), b'{"timestamp": 0, "input_length": ']), st.binary(max_size=300))
def test_any_bytes_give_requests_or_a_refusal(tmp_path_factory: pytest.TempPathFactory, head: bytes, rest: bytes) -> None:
    path = tmp_path_factory.mktemp("traces") / "trace"
    path.write_bytes(head + rest)
    where = "none"
    try:
        found = list(read(path))
    except NarrowsError as refusal:
        found, where = [], refusal.where
    assert where and all(r.arrival >= 0 and r.prompt > 0 and r.output > 0 for r in found)


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, AZURE + "1,10,5\n" * 3 + "broken")
    assert len(list(first(read(path), 3))) == 3


def test_generated_requests_have_the_rate_and_lengths_asked_for() -> None:
    asked = Lengths(800, 200, 1.2, 0.5)
    found = list(generate(5.0, 20_000, asked, seed=3))
    assert len(found) / (found[-1].arrival / PS) == pytest.approx(5.0, rel=0.03)
    like = Lengths.like(found)
    assert (like.prompt, like.output) == (pytest.approx(800, rel=0.05), pytest.approx(200, rel=0.02))
    assert (like.prompt_spread, like.output_spread) == (pytest.approx(1.2, rel=0.1), pytest.approx(0.5, rel=0.05))


@pytest.mark.parametrize("burst", [0.0, 0.5, 1.0, 3.0])
def test_gaps_vary_as_asked_for(burst: float) -> None:
    arrivals = [r.arrival / PS for r in generate(2.0, 20_000, Lengths(10, 10), burst=burst)]
    gaps = [b - a for a, b in pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5 / mean
    assert mean == pytest.approx(0.5, rel=0.06) and spread == pytest.approx(burst, rel=0.1, abs=1e-6)


def test_the_same_seed_gives_the_same_requests_and_another_others() -> None:
    asked = Lengths(100, 100, 1, 1)
    one, same, other = (list(generate(1.0, 50, asked, seed)) for seed in (1, 1, 2))
    assert one == same != other


def test_a_faster_load_has_the_same_requests_sooner() -> None:
    found = list(generate(1.0, 10, Lengths(5, 5)))
    fast = list(scaled(found, 4.0))
    assert [r.arrival for r in fast] == [round(r.arrival / 4) for r in found]
    assert [(r.prompt, r.output) for r in fast] == [(r.prompt, r.output) for r in found]


def test_a_rate_that_swings_is_met_in_the_mean_and_where_it_should_be() -> None:
    found = list(generate(10.0, 20_000, Lengths(5, 5)))
    period = found[-1].arrival / PS
    moved = list(swung(found, 0.5, period))
    assert [r.arrival for r in moved] == sorted(r.arrival for r in moved)
    assert moved[-1].arrival == pytest.approx(found[-1].arrival, rel=1e-6)
    day = [sum(r.arrival / PS < share * period for r in moved) / len(moved) for share in (0.25, 0.5, 0.75)]
    swing = 0.5 / (2 * math.pi)  # integral of the rate up to a share of the period, over the period
    assert day == pytest.approx([0.25 + swing, 0.5 + 2 * swing, 0.75 + swing], abs=0.01)
    assert all(abs(a.arrival - b.arrival) < 1e-6 * PS for a, b in zip(found, swung(found, 0.0), strict=True))
    with pytest.raises(NarrowsError, match="swing"):
        list(swung(found, 1.0))


@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
def test_a_ramp_ends_so_many_times_as_fast_as_it_begins(factor: float) -> None:
    found = list(generate(10.0, 20_000, Lengths(5, 5), burst=0.0))
    moved = [r.arrival / PS for r in ramped(found, factor)]
    assert moved[-1] == pytest.approx(found[-1].arrival / PS) and moved == sorted(moved)
    assert (moved[101] - moved[1]) / (moved[-1] - moved[-101]) == pytest.approx(factor, rel=0.05)


def test_a_ramp_without_sense_is_refused() -> None:
    assert not list(ramped([], 2.0))
    for factor in (0.0, -1.0, math.inf):
        with pytest.raises(NarrowsError, match="factor"):
            list(ramped([], factor))


def test_no_rate_is_refused() -> None:
    with pytest.raises(NarrowsError, match="no rate"):
        list(generate(0.0, 1, Lengths(1, 1)))


@pytest.mark.parametrize("name", loads())
def test_a_bundled_load_is_like_its_trace(name: str) -> None:
    made = list(like(name, count=20_000, seed=1))
    assert made == list(like(name, count=20_000, seed=1))
    assert mean_rate(name) == pytest.approx(len(made) / (made[-1].arrival / PS), rel=0.25)
    spans = made[-1].arrival / PS / (len(made) - 1)
    again = list(like(name, count=20_000, rate=2.0, seed=1))
    assert again[-1].arrival / PS / (len(again) - 1) == pytest.approx(0.5, rel=0.35)  # the code trace comes in long bursts
    assert spans > 0 and Lengths.like(made).prompt == pytest.approx(Lengths.like(again).prompt, rel=0.05)


def test_an_unknown_load_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(NarrowsError, match="azure-2023-conv"):
        next(like("azure-conv"))
