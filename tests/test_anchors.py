"""Anchors: a few measured steps bring a shipped machine nearer to the real one, as far as they tell its causes apart."""

import csv
import json
import statistics
from pathlib import Path

import pytest
from click.testing import CliRunner

from narrows.anchors import COLUMNS, Anchor, anchors, fit
from narrows.cli import cli
from narrows.diagnose import seconds
from narrows.errors import NarrowsError
from narrows.machine import machine
from narrows.measured.table import graph_of
from narrows.step import Step

STEPS = {
    "prefill": [Step.prefill(1, 2048), Step.prefill(4, 1024), Step.prefill(8, 4096)],
    "decode": [Step.decode(1, 512), Step.decode(8, 2048), Step.decode(32, 1024)],
}
DATA = Path(__file__).parents[2] / "shared" / "data" / "splitwise_a100.csv"


def of_truth(compute: float, bandwidth: float, *phases: str) -> list[Anchor]:
    graph, true = graph_of("llama-2-7b"), machine("a100-80gb").scaled(compute=compute, bandwidth=bandwidth)
    steps = [step for phase in phases for step in STEPS[phase]]
    return [Anchor(row, graph, step, float(seconds(graph, true, step)[0])) for row, step in enumerate(steps, 2)]  # type: ignore[arg-type]


def test_a_known_truth_is_found_again() -> None:
    found = fit(machine("a100-80gb"), of_truth(0.7, 0.8, "prefill", "decode"), "a test")
    assert found.scales["compute"] == pytest.approx(0.7, rel=0.1)
    assert found.scales["bandwidth"] == pytest.approx(0.8, rel=0.1)
    assert statistics.median(found.after) < statistics.median(found.left_out) < 0.5 * statistics.median(found.before)
    assert found.machine.provenance == "calibrated"


def test_what_no_anchor_depends_on_stays_as_it_was() -> None:
    found = fit(machine("a100-80gb"), of_truth(0.7, 0.8, "decode"), "a test")
    assert found.identified["link"] == pytest.approx(0.0, abs=1e-6)
    assert found.scales["link"] == pytest.approx(1.0)
    assert found.identified["bandwidth"] > found.identified["compute"]
    assert abs(found.scales["compute"] - 1) < abs(found.scales["bandwidth"] - 1)


def test_one_wild_anchor_does_not_carry_the_fit_away() -> None:
    found = of_truth(0.7, 0.8, "prefill", "decode")
    wild = [*found[:2], Anchor(4, found[2].graph, found[2].step, found[2].seconds * 30), *found[3:]]
    assert fit(machine("a100-80gb"), wild, "a test").scales["bandwidth"] == pytest.approx(0.8, rel=0.15)


def written(path: Path, *rows: str) -> Path:
    path.write_text("\n".join([",".join(COLUMNS), *rows]) + "\n")
    return path


def row(step: Step, measured: float) -> str:
    new, past = int(step.new[0]), int(step.past[0])
    return f"llama-2-7b,{step.phase},{int(step.batch[0])},{new},{past},{measured!r}"


def test_a_wrong_row_is_named_with_its_column_and_the_others_are_fitted(tmp_path: Path) -> None:
    good = [row(a.step, a.seconds) for a in of_truth(0.7, 0.8, "prefill", "decode")]
    bad = {
        "seconds": "llama-2-7b,prefill,1,512,0,fast",
        "phase": "llama-2-7b,warming,1,512,0,1",
        "tokens": "llama-2-7b,decode,1,5,9,1",
        "model": "no-such-model,decode,1,1,9,1",
        "batch": "llama-2-7b,decode,1.5,1,9,1",
    }
    file, out = written(tmp_path / "a.csv", *good, *bad.values()), tmp_path / "m.toml"
    done = CliRunner().invoke(cli, ["calibrate", "--anchors", str(file), "-m", "a100-80gb", "--out", str(out), "--json"])
    assert done.exit_code == 2
    errors = json.loads(done.stdout)["errors"]
    for place, column in enumerate(bad, 2 + len(good)):
        assert any(f"row {place}: {column}: " in line for line in errors), (column, errors)
    assert len(json.loads(done.stdout)["rows"]) == len(good)
    assert machine(out).peak("bf16") == pytest.approx(0.7 * machine("a100-80gb").peak("bf16"), rel=0.1)


def test_too_few_rows_or_no_column_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NarrowsError, match="0 sound rows"):
        anchors(written(tmp_path / "a.csv", "llama-2-7b,prefill,1,512,0,-1"), machine("a10"))
    (tmp_path / "b.csv").write_text("model,phase\nx,y\n")
    with pytest.raises(NarrowsError, match="no column 'batch'"):
        anchors(tmp_path / "b.csv", machine("a10"))


@pytest.mark.skipif(not DATA.is_file(), reason="measurements lie beside the repository")
def test_published_steps_are_predicted_better_when_others_of_them_are_known(tmp_path: Path) -> None:
    """Llama-2-70B on 8 A100: each step as predicted from the other ones."""
    seen: dict[tuple[str, ...], str] = {}
    for r in csv.DictReader(DATA.open()):
        if (r["model"], r["hardware"], r["tensor_parallel"]) == ("llama2-70b", "a100-80gb", "8"):
            seen.setdefault(("prefill", r["batch_size"], r["prompt_size"], "0"), str(float(r["prompt_time"]) / 1e3))
            seen.setdefault(("decode", r["batch_size"], "1", r["prompt_size"]), str(float(r["token_time"]) / 1e3))
    some = list(seen.items())[:: max(1, len(seen) // 7)][:7]
    file = tmp_path / "a.csv"
    file.write_text(
        ",".join([*COLUMNS, "devices"]) + "\n" + "\n".join(",".join(["llama-2-70b", *k, v, "8"]) for k, v in some) + "\n"
    )
    steps, errors = anchors(file, machine("a100-80gb"))
    found = fit(machine("a100-80gb"), steps, "a test")
    assert not errors
    assert statistics.median(found.left_out) < 0.7 * statistics.median(found.before)


def test_anchors_without_a_machine_are_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["calibrate", "--anchors", str(written(tmp_path / "a.csv"))])
    assert done.exit_code == 2
    assert "need each other" in done.output
