"""Recorded runs become rows of `narrows validate`: what is in the files decides, and a fault is named with its line."""

import json
from pathlib import Path
from typing import Any

import pytest

from narrows.errors import NarrowsError
from narrows.machine import machine
from narrows.measured.recorded import SETS, Run, figures, forecasts, runs
from narrows.simulate.fleet import serve
from narrows.simulate.step_times import PS
from narrows.simulate.workload import Lengths, generate
from narrows.validate import ROOT, TARGETS, validate

META = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "vllm_version": "0.19.0",
    "engine_kwargs": {"tensor_parallel_size": 1, "max_num_seqs": 16, "max_num_batched_tokens": 512, "dtype": "bfloat16"},
    "kv_cache": {"num_gpu_blocks": 400, "block_size": 16, "gpu_memory_utilization": 0.9, "enable_prefix_caching": True},
    "hardware": {"device_name": "NVIDIA L4"},
}


def recorded(folder: Path, meta: dict[str, Any] = META, rows: list[dict[str, Any]] | None = None) -> Path:
    """A run whose times are those of the simulator itself, or with rows of its own."""
    path = folder / "run_requests.jsonl"
    (folder / "run_meta.json").write_text(json.dumps(meta))
    if rows is None:
        requests = list(generate(20.0, 60, Lengths(200, 30, 1, 1), seed=1))
        path.write_text("\n".join(json.dumps(row(i, r.arrival / PS, r.prompt, r.output)) for i, r in enumerate(requests)))
        answers: list[Any] = []
        serve(Run(path).requests, Run(path).group(400), each=answers.append)
        found = {a.request.arrival: a for a in answers}
        rows = [row(i, r.arrival / PS, r.prompt, r.output, found[r.arrival].first / PS, found[r.arrival].last / PS)
                for i, r in enumerate(requests)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def row(number: int, arrival: float, prompt: int, output: int, first: float = 1e9, last: float = 2e9) -> dict[str, Any]:
    return {"request_id": f"r{number}", "input_toks": prompt, "output_toks": output, "arrival_time": arrival,
            "queued_ts": arrival, "scheduled_ts": arrival, "first_token_ts": first, "last_token_ts": last}  # fmt: skip


def test_a_run_that_the_simulator_has_played_is_forecast_exactly(tmp_path: Path) -> None:
    found = [f for _, f in forecasts(recorded(tmp_path)) if not f.name.endswith("own-blocks")]
    assert {f.name for f in found} == set(SETS[:2]) and len(found) == 8
    for forecast in found:
        assert forecast.predicted == pytest.approx(forecast.measured, rel=1e-6)


def test_the_group_is_as_the_files_say(tmp_path: Path) -> None:
    run = Run(recorded(tmp_path))
    group = run.group(run.blocks)
    assert (group.machine.name, group.graph.name, group.room()) == ("l4", "smollm2-135m", 400)
    assert (group.rules.max_sequences, group.rules.max_tokens, group.rules.name) == (16, 512, "vllm-v1")
    assert run.group(0).room() > 400
    old = Run(recorded(tmp_path, {**META, "vllm_version": "0.6.3"}, [row(0, 1.0, 10, 5, 2.0, 3.0)]))
    assert old.group(400).rules.name == "vllm-v0"


def test_both_sets_come_with_and_without_the_blocks(tmp_path: Path) -> None:
    recorded(tmp_path)
    report = validate(tmp_path)
    assert {s.name: (s.rows, s.covered) for s in report.scores} == dict.fromkeys(SETS, (4, 4)) and not report.errors
    assert set(SETS) <= set(TARGETS)
    without = {**META, "kv_cache": None}
    recorded(tmp_path, without)
    assert {s.name for s in validate(tmp_path).scores} == set(SETS[2:])


def test_only_runs_with_a_meta_file_count(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    assert runs(tmp_path) == runs(path) == [path]
    (tmp_path / "run_meta.json").unlink()
    assert runs(tmp_path) == []


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"first_token_ts": None}, "lacks first_token_ts"),
        ({"request_id": 3}, "lacks request_id"),
        ({"first_token_ts": 0.5}, "backwards"),
        ({"last_token_ts": 1.5}, "backwards"),
        ({"output_toks": 0}, "output tokens are '0'"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, broken: dict[str, Any], says: str) -> None:
    good = row(0, 1.0, 10, 5, 2.0, 3.0)
    path = recorded(tmp_path, rows=[good, {**good, **broken}])
    with pytest.raises(NarrowsError, match="line 2") as error:
        list(forecasts(path))
    assert says in str(error.value)
    assert any("line 2" in line for line in validate(tmp_path).errors)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"model": "nobody/none-1b"}, "model"),
        ({"engine_kwargs": {"dtype": "float8"}}, "dtype"),
        ({"engine_kwargs": {"quantization": "awq"}}, "quantization"),
    ],
)
def test_what_is_not_modelled_is_counted_with_its_reason(tmp_path: Path, change: dict[str, Any], where: str) -> None:
    recorded(tmp_path, {**META, **change}, rows=[row(0, 1.0, 10, 5, 2.0, 3.0)] * 4)
    report = validate(tmp_path)
    assert not report.errors and all(s.covered == 0 and where in next(iter(s.reasons)) for s in report.scores)


def test_a_meta_file_without_engine_arguments_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NarrowsError, match="engine_kwargs"):
        list(forecasts(recorded(tmp_path, {}, rows=[row(0, 1.0, 10, 5, 2.0, 3.0)] * 4)))


DATA = ROOT.parent / "shared" / "data" / "traces"


@pytest.mark.skipif(not DATA.is_dir(), reason="the recorded runs are not there")
@pytest.mark.parametrize("path", runs(DATA) if DATA.is_dir() else [], ids=lambda p: p.name)
def test_real_runs_are_within_the_targets_in_the_mean(path: Path) -> None:
    run = Run(path)
    for blocks in {run.blocks, 0}:
        times = run.simulated(blocks)
        for what, limit in (("tpot", 0.05), ("ttft", 0.10 if blocks else 0.20)):
            measured, simulated = (figures(getattr(t, what))["mean"] for t in (run.measured, times))
            assert simulated == pytest.approx(measured, rel=limit), what


def test_unlike_machines_are_not_forecast_alike(tmp_path: Path) -> None:
    slow = Run(recorded(tmp_path))
    fast = slow.simulated(400, machine("h100-sxm"))
    assert figures(fast.tpot)["mean"] < 0.8 * figures(slow.simulated(400).tpot)["mean"]
