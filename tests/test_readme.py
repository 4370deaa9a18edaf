"""Every command and program in the README runs; those of one block in order, in one folder."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.S)
SHELL = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if "narrows " in block], ids=lambda block: block.split("#")[0].strip()
)
def test_the_commands_of_a_block_run_in_order(block: str, tmp_path: Path) -> None:
    for line in block.splitlines():
        if line.startswith("narrows"):
            run(shlex.split(line, comments=True)[1:], tmp_path)


def run(args: list[str], folder: Path) -> None:
    env = {**os.environ, "NARROWS_HOME": str(ROOT / ".cache" / "narrows"), "HF_HUB_OFFLINE": "1"}
    if args[0] == "verify":  # timings on a busy machine may refuse; that it runs to its verdict is what this tests
        args += ["--rounds", "3"]
    if "--hours" in args:  # a day takes half a minute; an hour says as much of whether it runs
        args[args.index("--hours") + 1] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "narrows", *args], cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode in ((0, 1) if args[0] == "verify" else (0,)), done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("make")])
def test_a_make_target_exists(line: str) -> None:
    target = shlex.split(line, comments=True)[1]
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("program", PYTHON)
def test_a_program_runs(program: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_nothing_in_the_readme_is_left_out() -> None:
    assert all(line.startswith(("narrows ", "make ")) for line in SHELL)
    assert len(PYTHON) == 1
    for path in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / path).exists(), path
