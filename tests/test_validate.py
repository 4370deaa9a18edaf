"""Validation: rows are judged or named, never lost; closed forms obey their laws; held rows meet the targets."""

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from narrows import validate
from narrows.capture import capture
from narrows.cli import cli
from narrows.costmodel import achieved, aligned, fitted, generation, op_time
from narrows.diagnose import diagnose
from narrows.errors import NarrowsError
from narrows.graph import FP16, Op
from narrows.machine import machine, machines
from narrows.measured.table import Forecast, fingerprint, half, hardware, model
from narrows.simulate.closed_loop import Layout, closed_loop, engines, one_batch, preset
from narrows.simulate.training import Fabric, Shape, Split, step_seconds
from narrows.step import Step

DATA = Path(__file__).parents[2] / "shared" / "data"
H100, A100 = machine("h100-sxm"), machine("a100-80gb")
DGX = Fabric(8, 25e9)

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
        ("training", {"metric": "peak_memory", "unit": "GB"}, "metric"),
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


SHAPE = Shape(4096, 32, 32)


def spent(split: Split, shape: Shape = SHAPE) -> dict[str, float]:
    return step_seconds(shape, A100, DGX, split, 2048)


def test_the_bubble_is_stages_less_one_over_microbatches() -> None:
    found = spent(Split(1, 4, 1, 1, 16))
    stage = found["bubble"] / 3
    assert found["compute"] > 16 * stage
    assert spent(Split(1, 4, 1, 1, 16, chunks=2))["bubble"] == pytest.approx(found["bubble"] / 2)
    assert spent(Split(1, 4, 1, 1, 16, bubble=0.0))["bubble"] == 0
    assert spent(Split(1, 1, 1, 1, 16))["bubble"] == spent(Split(1, 1, 1, 1, 16))["pipeline"] == 0


def test_recomputing_costs_a_forward_and_more_devices_cost_an_exchange() -> None:
    kinds = [sum(spent(Split(microbatches=8, recompute=r)).values()) for r in ("none", "selective", "full")]
    assert kinds == sorted(kinds)
    assert 1.15 < kinds[2] / kinds[0] < 1.45
    assert spent(Split(data=8, microbatches=8))["gradients"] > spent(Split(microbatches=8))["gradients"] == 0
    assert spent(Split(tensor=8))["compute"] > spent(Split(tensor=1))["compute"] / 8
    with pytest.raises(NarrowsError, match="heads"):
        spent(Split(), Shape(4096, 32, 30))


def test_a_head_of_108_is_slower_than_one_of_216() -> None:
    wide, odd = (
        sum(spent(Split(8, 6, 8, 4, 64, recompute="full"), Shape(13824, 78, h, fused=False)).values()) for h in (64, 128)
    )
    assert 1.15 < odd / wide < 1.6  # measured: 162.7 s against 121.3 s at equal FLOP
    assert aligned(A100, 108) < aligned(A100, 112) == 1.0
    assert aligned(machine("xeon-amx"), 108) == 1.0


def test_every_constant_has_a_provenance_and_an_order() -> None:
    for table, entries in fitted().items():
        if table == "generations":
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
    inside = Forecast("x", 1.0, 2.0, "tpot-vllm", 1.0)
    low, high = validate.interval(inside)
    wider = validate.interval(replace(inside, inside=False))
    assert wider[0] <= low <= 2.0 <= high <= wider[1]
    assert validate.interval(replace(inside, key="never-seen"))[0] < 2.0


def test_rank_and_regret() -> None:
    found = [Forecast("x", m, p, "k", 1.0, "job") for m, p in ((1.0, 3.0), (2.0, 1.0), (4.0, 5.0))]
    assert validate._regret(found) == 1.0  # takes the second, which measured twice the first
    assert validate._spearman(np.array([1.0, 2, 3]), np.array([10.0, 20, 30])) == pytest.approx(1.0)
    assert validate._spearman(np.array([1.0, 1.0]), np.array([1.0, 2.0])) is None


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
        "decode",
    ):
        score, target = scores[name], scores[name].target
        assert score.mape is not None and target is not None
        assert score.mape <= target, (name, score.mape)
        assert score.null_mape is None or score.mape < score.null_mape, name
    assert scores["serving-tpot"].covered == scores["serving-tpot"].rows
    for score in report.scores:
        assert score.rows == score.covered + sum(score.reasons.values()), score.name
