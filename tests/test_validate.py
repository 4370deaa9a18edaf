"""Validation: rows are judged or named, never lost; closed forms obey their laws; held rows meet the targets."""

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows import validate
from narrows.capture import capture
from narrows.cli import cli
from narrows.costmodel import achieved, fitted, generation, op_time
from narrows.diagnose import diagnose
from narrows.errors import NarrowsError
from narrows.graph import FP16, Op
from narrows.machine import machine, machines
from narrows.measured.table import Forecast, fingerprint, half, hardware, model
from narrows.simulate.closed_loop import Layout, closed_loop, engines, one_batch, preset
from narrows.step import Step

DATA = Path(__file__).parents[2] / "shared" / "data"
H100, A100 = machine("h100-sxm"), machine("a100-80gb")

KERNEL = {
    "source": "t",
    "model": "GEMM M=4096 N=4096 K=4096",
    "hardware": "A100",
    "n_devices": "1",
    "dtype": "fp16",
    "phase": "operator",
    "batch": "",
    "prompt": "",
    "output": "",
    "metric": "latency",
    "value": "0.6",
    "unit": "ms",
    "note": "",
}
TRAINING = {
    "source": "own runs",
    "model": "GPT h4096 L32 a32",
    "params": "6.4e9",
    "hardware": "A100-80GB (8/node)",
    "n_devices": "64",
    "tp": "4",
    "pp": "2",
    "dp": "8",
    "cp_or_ep": "",
    "microbatch": "2",
    "global_batch": "256",
    "seq": "2048",
    "precision": "fp16",
    "recompute": "full",
    "metric": "iteration_time",
    "value": "9",
    "unit": "s",
    "note": "",
}
SERVING = {
    "backend": "vllm",
    "backend_version": "0.12.0",
    "model_path": "meta-llama/Llama-3.1-70B-Instruct",
    "system": "h200_sxm",
    "precision": "fp8",
    "mode": "agg",
    "isl": "1024",
    "osl": "256",
    "gemm_quant_mode": "fp8",
    "moe_quant_mode": "fp8",
    "batch_size": "16",
    "tp_size": "4",
    "pp_size": "1",
    "attention_dp_size": "1",
    "moe_tp_size": "1",
    "moe_ep_size": "1",
    "silicon_ttft_ms": "300",
    "silicon_tpot_ms": "14",
    "concurrency": "16",
}
BATCH = {
    "model": "llama2-70b",
    "hardware": "h100-80gb",
    "prompt_size": "512",
    "batch_size": "4",
    "token_size": "128",
    "peak_power": "1",
    "average_power": "1",
    "prompt_time": "200",
    "token_time": "35",
    "e2e_time": "4500",
    "tensor_parallel": "8",
}
ROWS = {"kernel": KERNEL, "training": TRAINING, "serving": SERVING, "batch": BATCH}


def judged(folder: Path, *rows: Mapping[str, str]) -> validate.Report:
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return validate.validate(folder)


@pytest.mark.parametrize("kind", ROWS)
def test_every_schema_is_judged(kind: str, tmp_path: Path) -> None:
    report = judged(tmp_path, ROWS[kind])
    assert not report.errors
    for score in report.scores:
        assert (score.rows, score.covered, score.reasons) == (1, 1, {})
        assert score.mape is not None and 0 <= score.mape < 1, score
        assert score.coverage80 in (0.0, 1.0)


@pytest.mark.parametrize(
    ("kind", "change", "column"),
    [
        ("kernel", {"value": "-1"}, "value"),
        ("kernel", {"value": "nan"}, "value"),
        ("kernel", {"value": "fast"}, "value"),
        ("kernel", {"unit": "parsec"}, "unit"),
        ("kernel", {"hardware": "Abacus 3000"}, "hardware"),
        ("kernel", {"dtype": "fp7"}, "dtype"),
        ("kernel", {"model": "GEMM M=0 N=1 K=1"}, "model"),
        ("training", {"value": "0"}, "value"),
        ("training", {"unit": "TFLOP/s"}, "unit"),
        ("training", {"hardware": "unknown"}, "hardware"),
        ("training", {"tp": "two"}, "tp"),
        ("training", {"seq": ""}, "seq"),
        ("training", {"value": "1_000"}, "value"),
        ("training", {"recompute": "some"}, "recompute"),
        ("serving", {"silicon_ttft_ms": "-3"}, "silicon_ttft_ms"),
        ("serving", {"system": "z9"}, "system"),
        ("serving", {"backend": "nobody"}, "engine"),
        ("serving", {"gemm_quant_mode": "fp3"}, "gemm_quant_mode"),
        ("batch", {"prompt_time": ""}, "prompt_time"),
        ("batch", {"batch_size": "1.5"}, "batch_size"),
    ],
)
def test_a_wrong_row_is_named_and_the_others_are_judged(kind: str, change: dict[str, str], column: str, tmp_path: Path) -> None:
    good = ROWS[kind]
    report = judged(tmp_path, good, {**good, **change}, {**good})
    (error,) = report.errors
    assert "rows.csv: row 3" in error
    assert column in error
    assert all((s.rows, s.covered) == (3, 2) for s in report.scores)
    assert all(sum(s.reasons.values()) == 1 for s in report.scores)


@pytest.mark.parametrize(
    ("kind", "change", "word"),
    [
        ("kernel", {"model": "fft shape=12", "metric": "latency"}, "operator"),
        ("training", {"metric": "bubble_rate", "unit": "fraction"}, "metric"),
        ("training", {"model": "Mystery", "params": "", "note": ""}, "shape"),
        ("serving", {"model_path": "nobody/nothing-1b"}, "model"),
        ("batch", {"batch_size": "640", "tensor_parallel": "2"}, "fit"),
    ],
)
def test_a_row_out_of_reach_is_counted_with_its_reason(kind: str, change: dict[str, str], word: str, tmp_path: Path) -> None:
    report = judged(tmp_path, ROWS[kind], {**ROWS[kind], **change})
    assert not report.errors
    assert sum(s.rows - s.covered for s in report.scores) == sum(sum(s.reasons.values()) for s in report.scores) > 0
    assert any(word in reason for s in report.scores for reason in s.reasons)


def test_missing_columns_are_one_error(tmp_path: Path) -> None:
    report = judged(tmp_path, {k: v for k, v in TRAINING.items() if k not in ("dp", "seq")})
    (error,) = report.errors
    assert "dp, seq" in error and "rows.csv" in error
    assert [(s.rows, s.covered) for s in report.scores] == [(1, 0)]


def test_other_files_are_said_not_to_be_judged(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.csv").write_text("")
    report = judged(tmp_path, KERNEL)
    assert len(report.ignored) == 2
    with pytest.raises(NarrowsError, match="no CSV"):
        validate.validate(tmp_path / "nowhere")
    with pytest.raises(NarrowsError, match="no rows of a set"):
        validate.validate(tmp_path, "nonsense")


def test_the_command_line_keeps_its_contract(tmp_path: Path) -> None:
    judged(tmp_path, SERVING, {**SERVING, "isl": "x"})
    result = CliRunner().invoke(cli, ["validate", "--data", str(tmp_path), "--json"])
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert {"name", "rows", "covered", "mape", "median", "worst", "null_mape", "coverage80", "spearman", "regret"} <= set(
        found[0]
    )
    assert [s["name"] for s in found] == ["serving-tpot", "serving-ttft"]
    assert "row 3: isl" in result.stderr
    assert (
        CliRunner().invoke(cli, ["validate", "--data", str(tmp_path), "--set", "serving-ttft"]).output.count("serving-ttft") >= 1
    )


def test_fitted_rows_are_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "_fitted_rows", lambda: frozenset({fingerprint(KERNEL)}))
    (score,) = judged(tmp_path, KERNEL, {**KERNEL, "value": "0.7"}).scores
    assert (score.rows, score.covered, score.fitted) == (1, 1, 1)


def test_two_figures_of_one_run_fall_into_the_same_half() -> None:
    for changed in ({"metric": "mfu", "value": "40", "unit": "%"}, {"value": "8"}):
        assert half({**TRAINING, **changed}) == half(TRAINING)
    assert half({**SERVING, "tp_size": "8", "silicon_tpot_ms": "9"}) == half(SERVING)
    assert 20 < sum(half({**TRAINING, "global_batch": str(b)}) for b in range(64)) < 44


def test_published_names_are_understood() -> None:
    for text, name in (
        ("A100-80GB Selene (8/node NVSwitch, 8x HDR IB)", "a100-80gb"),
        ("h200_sxm", "h200"),
        ("a100_40gb", "a100-40gb"),
        ("H100 80GB SXM5", "h100-sxm"),
        ("AMD MI250x (one GCD)", "mi250x"),
        ("gb200_sxm", "gb200"),
        ("b200_sxm", "b200"),
        ("l40s", "l40s"),
    ):
        assert hardware(text).name == name
    for text, name in (
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-v3"),
        ("DeepSeek-V3", "deepseek-v3"),
        ("nvidia/Llama-3.1-8B-Instruct-FP8", "llama-3.1-8b"),
        ("llama2-70b", "llama-2-70b"),
        ("Qwen/Qwen3-32B", "qwen3-32b"),
        ("Mixtral-8x7B", "mixtral-8x7b"),
        ("meta-llama/Meta-Llama-3.1-70B", "llama-3.1-70b"),
    ):
        assert model(text) == name


@pytest.mark.parametrize("engine", ["trtllm", "vllm", "sglang"])
def test_a_fuller_engine_is_slower_for_each(engine: str) -> None:
    graph = capture("llama-3.1-8b")
    found = [closed_loop(graph, H100, Layout(2), c, 1024, 256, engine) for c in (1, 8, 64, 256)]
    assert [f.each for f in found] == sorted(f.each for f in found)
    assert [f.first for f in found] == sorted(f.first for f in found)


def test_requests_that_find_no_room_wait_by_little_s_law() -> None:
    graph = capture("llama-3.1-70b")
    full = closed_loop(graph, H100, Layout(2), 4096, 2048, 512, "vllm")
    assert full.running < 4096
    assert 4096 / (full.first + 512 * full.each) * (full.first + 512 * full.each) == pytest.approx(4096)
    assert full.first > 10 * closed_loop(graph, H100, Layout(2), 8, 2048, 512, "vllm").first


def test_engine_versions_have_their_own_constants() -> None:
    assert preset("sglang-0.5.1.post1") == "sglang-0.5.1"
    assert preset("sglang-0.5.9") == preset("sglang-") == "sglang"
    assert preset("trtllm-disagg") == "trtllm-disagg"
    with pytest.raises(NarrowsError, match="no engine"):
        preset("nobody")


def test_a_batch_on_an_eager_engine_is_bound_by_its_host() -> None:
    graph = capture("llama-2-70b")
    slow = replace(A100, launch_seconds=3 * A100.launch_seconds)
    here, there = (one_batch(graph, m, Layout(8), 1, 512, 128, "splitwise").each for m in (A100, slow))
    assert 2.5 < there / here < 3.1


def test_every_constant_has_a_provenance_and_an_order() -> None:
    for table, entries in fitted().items():
        if table in ("generations", "seen"):
            continue
        for name, entry in entries.items():
            assert entry["low"] <= entry["median"] <= entry["high"], (table, name)
            assert entry["median"] > 0, (table, name)
    assert {"trtllm", "vllm", "sglang", "splitwise"} <= set(engines())
    assert all(generation(m) or machine(m).kind != "gpu" for m in machines())


def test_a_calibrated_constant_comes_first_and_the_domain_is_said() -> None:
    own = replace(H100, efficiency={"matmul": {"median": 0.5, "low": 0.4, "high": 0.6}})
    assert achieved(own, "matmul-fp8-bf16").median == 0.5
    assert achieved(H100, "matmul-fp8-bf16").rows > 0
    op = Op("m", "matmul", {"rows": 8192, "inputs": 8192, "outputs": 8192}, act=FP16)
    assert op_time(op, Step.forward(1, 1), A100).inside
    assert not op_time(op, Step.forward(1, 1), machine("l4")).inside
    told = [
        any("validated domain" in n for n in diagnose(capture("llama-3.1-8b"), machine(m), Step.decode(8, 512)).notes)
        for m in ("h100-sxm", "l4")
    ]
    assert told == [False, True]


def test_intervals_hold_the_prediction_and_widen_outside() -> None:
    place = fitted()["seen"]["prompt"][0]
    inside = Forecast("x", 1.0, 2.0, "prompt", 1.0, place)
    outside = replace(inside, place="a machine of tomorrow")
    assert inside.inside and not outside.inside
    (low, high), (lowest, highest) = validate.interval(inside), validate.interval(outside)
    assert low <= 2.0 <= high and lowest <= 2.0 <= highest
    assert high / low < highest / lowest
    assert validate.interval(replace(inside, key="never-seen")) == (1.0, 4.0)


def test_rank_and_regret() -> None:
    found = [Forecast("x", m, p, "k", 1.0, "here", "job") for m, p in ((1.0, 3.0), (2.0, 1.0), (4.0, 5.0))]
    assert validate._regret(found) == 1.0  # takes the second, which measured twice the first
    assert validate._spearman(np.array([1.0, 2, 3]), np.array([10.0, 20, 30])) == pytest.approx(1.0)
    assert validate._spearman(np.array([1.0, 1.0]), np.array([1.0, 2.0])) is None


def forecast_of(kind: str, **change: str) -> list[float]:
    """The predictions of a row of a kind with some cells changed."""
    table = validate.table_of(ROWS[kind])
    assert table is not None
    return [f.predicted for f in table.forecast({**ROWS[kind], **change})]


@pytest.mark.parametrize("name", machines())
def test_every_machine_is_forecast_or_refused_with_a_reason(name: str) -> None:
    for kind, column in (("kernel", "hardware"), ("training", "hardware"), ("serving", "system"), ("batch", "hardware")):
        try:
            found = forecast_of(kind, **{column: name})
        except NarrowsError as error:
            refused = error
            found = [1.0] if refused.where and refused.remedy else []
        assert found and all(np.isfinite(found)) and min(found) > 0


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("kernel", [{"hardware": "NVIDIA A100-SXM4-80GB"}, {"hardware": "a100_sxm"}, {"hardware": " A100  80GB SXM "}]),
        ("kernel", [{"dtype": "torch.float16"}, {"dtype": "HALF"}, {"dtype": "bfloat16"}]),
        ("kernel", [{"unit": "us", "value": "6e2"}, {"unit": "µs", "value": "600"}, {"unit": "msec"}, {"n_devices": ""}]),
        ("kernel", [{"unit": "TFLOPS", "metric": "throughput"}, {"unit": "TFLOP/s", "metric": "throughput"}]),
        ("kernel", [{"model": "gemm m=4096, n=4096, k=4096"}, {"model": "matmul M = 4096 N = 4096 K = 4096"}]),
        ("training", [{"recompute": "Full"}, {"recompute": "yes"}, {"hardware": "NVIDIA A100-SXM4-80GB"}, {"dp": ""}]),
        ("training", [{"metric": "tokens_per_s", "unit": "tokens/sec"}, {"metric": "MFU", "unit": "fraction", "value": "0.4"}]),
        ("training", [{"tp": ""}, {"tp": "4.0"}, {"n_devices": "6.4e1"}, {"unit": "seconds"}, {"unit": "min", "value": ".15"}]),
        ("serving", [{"system": "NVIDIA H200"}, {"backend": "vLLM"}, {"mode": "AGG"}, {"gemm_quant_mode": "fp8_block"}]),
        ("serving", [{"model_path": "nvidia/Llama-3.1-70B-Instruct-FP8"}, {"model_path": "x/Llama-3.3-70B-FP8-dynamic"}]),
        ("batch", [{"hardware": "H100 SXM5 80GB"}, {"hardware": "NVIDIA H100 80GB HBM3"}, {"model": "m/Llama-2-70b-chat-hf"}]),
    ],
)  # fmt: skip
def test_other_spellings_say_the_same(kind: str, changes: list[dict[str, str]]) -> None:
    plain = forecast_of(kind)
    for change in changes:
        found = forecast_of(kind, **change)
        if change.get("unit") in ("TFLOPS", "TFLOP/s"):
            found = [2 * 4096**3 / rate for rate in found]
        assert found == pytest.approx(plain), change


def test_an_engine_by_its_other_name_and_only_its_own_versions() -> None:
    assert forecast_of("serving", backend="TensorRT-LLM") == forecast_of("serving", backend="trtllm")
    assert preset("sglang-0.5.10") == "sglang"


def test_formats_that_differ_are_told_apart() -> None:
    """fp32 moves twice the bytes of bf16; a 4-bit product on a machine without 4-bit units computes in 16 bits."""
    tokens = {"model": "Llama-2-7B", "phase": "decode", "output": "100", "metric": "tokens_per_s", "unit": "tok/s"}
    (wide,), (plain,) = (forecast_of("kernel", **tokens, dtype=d) for d in ("fp32", "bf16"))
    assert 1.7 < plain / wide < 2.3
    assert forecast_of("kernel", dtype="int4-g128") == pytest.approx(forecast_of("kernel"), rel=0.05)


def test_tables_are_read_in_any_order_and_dialect(tmp_path: Path) -> None:
    columns = [c for c in reversed(TRAINING) if c not in ("source", "params", "note", "cp_or_ep", "precision")]
    header = ",".join(f" {c.title()}" if c != "value" else "value,comment" for c in columns)
    cells = ",".join(f'"{TRAINING[c]}"' + (',"a, b"' if c == "value" else "") for c in columns)
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbf" + f"{header}\r\n{cells}\r\n".encode())
    (tmp_path / "broken.csv").write_bytes(b"\xff\xfe\x00")
    report = validate.validate(tmp_path)
    assert [(s.name, s.rows, s.covered) for s in report.scores] == [("training-other", 1, 1)]
    (error,) = report.errors
    assert "broken.csv" in error


def test_a_short_row_is_named_with_its_first_missing_column(tmp_path: Path) -> None:
    judged(tmp_path, KERNEL)
    with (tmp_path / "rows.csv").open("a") as file:
        file.write("t,GEMM M=1 N=1 K=1,A100\r\n")
    report = validate.validate(tmp_path)
    (error,) = report.errors
    assert "row 3: n_devices" in error
    assert report.scores[0].covered == 1


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"n_devices": "64", "dp": "4"}, "n_devices"),
        ({"model": "ResNet-50", "params": "2.5e7"}, "model"),
        ({"model": "GPT-205B", "params": "", "tp": "", "pp": "", "dp": ""}, "tp"),
        ({"precision": "fp32"}, "precision"),
    ],
)
def test_a_training_row_that_contradicts_itself_is_not_guessed_at(change: dict[str, str], column: str) -> None:
    with pytest.raises(NarrowsError) as error:
        forecast_of("training", **change)
    assert error.value.where == column


def test_what_a_layout_leaves_out_follows_from_its_devices() -> None:
    left_out = forecast_of("training", tp="", note="hidden 4096; layers 32; heads 32")
    assert left_out == forecast_of("training", note="hidden 4096; layers 32; heads 32")
    assert forecast_of("training", model="GPT-6.7B", params="") == pytest.approx(
        forecast_of("training", model="GPT", params="6.7e9")
    )


def test_a_model_that_does_not_fit_is_said_so() -> None:
    with pytest.raises(NarrowsError, match="GB of t4's memory"):
        forecast_of("serving", system="t4")


COUNTS = st.integers(0, 17).map(lambda n: str(2**n))


@given(
    isl=COUNTS, osl=COUNTS, concurrency=COUNTS, tp=st.sampled_from("1248"), backend=st.sampled_from(("trtllm", "vllm", "sglang"))
)
@settings(max_examples=40, deadline=None)
def test_any_load_is_forecast_above_the_roofline(isl: str, osl: str, concurrency: str, tp: str, backend: str) -> None:
    row = {**SERVING, "isl": isl, "osl": osl, "concurrency": concurrency, "tp_size": tp, "backend": backend}
    try:
        first, each = (t for t in validate.TABLES[1].forecast(row))
    except NarrowsError:
        return
    assert first.bound * 0.9 < first.predicted < np.inf
    assert each.bound * 0.9 < each.predicted < np.inf


@pytest.mark.skipif(not DATA.is_dir(), reason="the measurements are not beside the repository")
def test_held_rows_meet_the_targets() -> None:
    report = validate.validate(DATA)
    scores = {s.name: s for s in report.scores}
    assert not report.errors
    for name in (
        "training-sc21",
        "training-single-node",
        "training-tuning-log",
        "training-llm-foundry",
        "serving-tpot",
        "serving-ttft",
        "splitwise-prompt",
        "splitwise-token",
        "gemm",
        "attention",
        "pointwise",
        "collectives",
        "decode",
    ):
        score, target = scores[name], scores[name].target
        assert score.mape is not None and target is not None
        assert score.mape <= target, (name, score.mape)
        assert score.null_mape is None or score.mape < score.null_mape, name
    assert scores["serving-tpot"].covered == scores["serving-tpot"].rows
    for score in report.scores:
        assert score.rows == score.covered + sum(score.reasons.values()), score.name
        if score.covered >= 200:  # of fewer rows, which are fewer runs, chance decides
            assert score.coverage80 is not None and 0.75 <= score.coverage80 <= 0.85, (score.name, score.coverage80)
