"""The command line: fast, without torch, JSON everywhere, one clear error for bad input."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from narrows.cli import cli, main
from narrows.errors import NarrowsError
from narrows.papers import papers

COMMAND = [sys.executable, "-m", "narrows"]
UNLOADED = """
import sys
sys.argv = ["narrows", *{args}]
from narrows.cli import main
try:
    main()
finally:
    assert not {names} & set(sys.modules)
"""


def run(*args: str) -> dict | list:
    result = CliRunner().invoke(cli, [*args, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def children_cpu(args: list[str]) -> float:
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(args, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["diagnose", "llama-3.1-70b", "--machine", "h100-sxm", "--decode"],
        ["prescribe", "llama-3.1-8b", "--machine", "a100-80gb", "--decode"],
        ["papers"],
        ["machines"],
    ],
)
def test_answers_without_torch(args: list[str]) -> None:
    code = UNLOADED.format(args=args, names={"torch"})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr


def test_help_imports_neither_numpy_nor_rich() -> None:
    code = UNLOADED.format(args=["--help"], names={"numpy", "rich", "torch"})
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_diagnose_keeps_its_contract() -> None:
    data = run(
        "diagnose", "llama-3.1-70b", "--machine", "h100-sxm", "--devices", "4", "--decode", "--batch", "16", "--context", "4096"
    )
    assert {
        "model",
        "machine",
        "step_seconds",
        "interval",
        "limit",
        "ledger",
        "flop",
        "read_bytes",
        "write_bytes",
        "memory",
        "ops",
    } <= set(data)
    assert {"weights_bytes", "kv_bytes", "activation_bytes", "total_bytes", "capacity_bytes", "fits"} <= set(data["memory"])
    assert data["memory"]["fits"] is True
    assert data["limit"] == "bandwidth"
    assert data["memory"]["kv_bytes"] == 16 * 4097 * 80 * 8 // 4 * 256 * 2
    assert {"cause", "seconds"} <= set(data["ledger"][0])


def test_papers_are_the_catalogue() -> None:
    rows = run("papers")
    assert [row["slug"] for row in rows] == [p.slug for p in papers()]
    assert len(rows) == 484
    assert {row["status"] for row in rows} <= {"described", "built", "works"}
    assert {"slug", "name", "family", "priority", "route", "face", "status", "claims", "passing"} == set(rows[0])


def test_machines_and_models_are_listed() -> None:
    assert len(run("machines")["machines"]) >= 25
    names = {row["name"]: row["parameters"] for row in run("models")}
    assert {
        "llama-3.1-8b",
        "llama-3.1-70b",
        "llama-2-70b",
        "mixtral-8x7b",
        "qwen3-32b",
        "deepseek-v3",
        "gpt-oss-120b",
        "mamba-2.8b",
        "bert-base",
        "vit-l-16",
        "resnet-50",
        "flux.1-dev",
        "smollm2-135m",
        "all-minilm-l6-v2",
    } <= set(names)
    assert names["resnet-50"] == 25_557_032


def test_a_graph_file_is_a_model(tmp_path: Path) -> None:
    kept = tmp_path / "g.json"
    assert CliRunner().invoke(cli, ["capture", "gpt2", "--out", str(kept)]).exit_code == 0
    assert run("capture", str(kept))["parameters"] == run("capture", "gpt2")["parameters"] == 124_439_808


BAD = {
    "unknown model": ["diagnose", "lama-3.1-8b", "--machine", "a10"],
    "unknown machine": ["diagnose", "gpt2", "--machine", "h1000"],
    "zero batch": ["diagnose", "gpt2", "--machine", "a10", "--decode", "--batch", "0"],
    "negative context": ["diagnose", "gpt2", "--machine", "a10", "--decode", "--context", "-1"],
    "no cache": ["diagnose", "bert-base", "--machine", "a10", "--decode"],
    "no devices": ["diagnose", "gpt2", "--machine", "a10", "--devices", "0"],
    "not a number": ["diagnose", "gpt2", "--machine", "a10", "--batch", "many"],
    "unknown option": ["diagnose", "gpt2", "--fast"],
    "unknown slug": ["reproduce", "awqq"],
    "described": ["reproduce", "flashfftconv"],
    "nothing named": ["reproduce"],
    "unknown technique": ["apply", "smollm2-135m", "--plan", "awqq", "--out", "x"],
    "a size of nothing": ["apply", "smollm2-135m", "--plan", "awq:group=0", "--out", "x"],
    "unknown choice": ["apply", "smollm2-135m", "--plan", "awq:bitz=4", "--out", "x"],
    "no such module": ["capture", "nowhere.at.all:factory"],
    "no module at all": ["capture", ":"],
    "no factory": ["capture", "json:dumps"],
    "beyond any float": ["diagnose", "gpt2", "--machine", "a10", "--batch", "9" * 400],
    "no source": ["diagnose", "t5-base", "--machine", "a10", "--forward"],
    "heads do not divide": ["diagnose", "llama-3.1-8b", "--machine", "h100-sxm", "--devices", "3"],
    "no cut is known": ["diagnose", "resnet-50", "--machine", "h100-sxm", "--devices", "4"],
    "unknown family": ["papers", "--family", "quantisation"],
    "nowhere to write": ["capture", "gpt2", "--out", "no/such/folder/g.json"],
}


@pytest.mark.parametrize("args", BAD.values(), ids=BAD.keys())
def test_bad_input_gives_one_clear_error(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["narrows", *args])
    start = time.process_time()
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert time.process_time() - start < 20  # loading torch included


HOSTILE = {
    "empty": b"",
    "truncated": b'{"model_type": "llama", "hidden',
    "binary": bytes(range(256)),
    "list": b"[1, 2]",
    "deep": b"[" * 10_000,
    "no type": b"{}",
    "zero": b'{"model_type": "llama", "hidden_size": 0}',
    "huge": b'{"model_type": "llama", "hidden_size": 1e30}',
    "heads": b'{"model_type": "gpt2", "n_embd": 768, "n_head": 7, "n_layer": 2, "vocab_size": 10}',
    "type": b'{"model_type": ["llama"]}',
    "remote": b'{"model_type": "mystery", "auto_map": {"AutoModel": "evil.Model"}}',
}


OP = {"name": "x", "kind": "linear", "dims": {"rows": {"tokens": 1}, "inputs": 1, "outputs": 2}}
EXPERT = {"name": "x", "kind": "expert", "dims": {"rows": 1, "inputs": 1, "outputs": 2, "experts": 0, "top_k": 1}}


@pytest.mark.parametrize(
    "op",
    [
        {"name": "x"},
        {**OP, "repeat": "many"},
        {**OP, "act": ["bf16", "x", 0, 0, 0]},
        EXPERT,
        {**OP, "dims": {**OP["dims"], "rows": {"tokens": "a"}}},
        {**OP, "dims": {**OP["dims"], "rows": {"evil": 1}}},
    ],
)
def test_hostile_graphs_are_refused(op: dict, tmp_path: Path) -> None:
    file = tmp_path / "g.json"
    file.write_text(
        json.dumps({"format": "narrows-graph-1", "name": "g", "source": "", "notes": [], "eager": False, "ops": [op]})
    )
    with pytest.raises(NarrowsError):
        CliRunner().invoke(cli, ["diagnose", str(file), "--machine", "a10"], catch_exceptions=False)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    for model in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(NarrowsError, match=r"not a file|neither a file"):
            CliRunner().invoke(cli, ["diagnose", str(model), "--machine", "a10"], catch_exceptions=False)


@pytest.mark.parametrize(
    "args",
    [
        ["calibrate"],
        ["apply", "x", "--plan", "awq", "--out", "y"],
        ["verify", "x", "y", "--machine", "a10"],
        ["capture", "a.b:c"],
        ["reproduce", "llm-drop"],
    ],
)
def test_without_torch_the_error_says_what_to_install(args: list[str]) -> None:
    code = f"import sys\nsys.modules['torch'] = None\nsys.argv = ['narrows', *{args!r}]\nfrom narrows.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "pip install 'narrows[" in done.stderr


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_configs_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    done = subprocess.run(
        [*COMMAND, "diagnose", str(tmp_path), "--machine", "a10", "--json"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 2, done.stderr
    assert "error" in json.loads(done.stderr)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
