"""Commands that run a plan for real, on ranks of this machine."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from narrows.cli.options import as_json_option, console, machine_option, print_json, progress, target
from narrows.errors import NarrowsError, require

if TYPE_CHECKING:
    from narrows.run.job import Run
    from narrows.run.timing import Timed


@click.group()
def run() -> None:
    """Run a plan on this machine and hold it against its prediction."""


@run.command()
@click.argument("plan")
@click.option("--nproc", "-n", type=click.IntRange(min=1), help="Ranks to start (default: as many as the plan has devices).")
@click.option("--steps", default=2, show_default=True, type=click.IntRange(min=1), help="Optimizer steps.")
@click.option("--seq", "-s", "sequence", default=64, show_default=True, type=click.IntRange(min=1), help="Tokens of a sequence.")
@click.option("--timed", default=6, show_default=True, type=click.IntRange(min=0),
              help="Steps to time on a wider model, beside what is predicted for them (0: none).")  # fmt: skip
@machine_option
@click.option("--folder", type=click.Path(file_okay=False), default="", help="Keep checkpoints here, and go on from the latest.")
@click.option("--every", default=0, help="Steps between checkpoints (0: none are written).")
@as_json_option
def train(plan: str, nproc: int | None, steps: int, sequence: int, timed: int, machine: str, folder: str, every: int,
          as_json: bool) -> None:  # fmt: skip
    """Train a small model as PLAN lays it out (a plan file, or text like tensor=2,pipeline=2) over gloo, and check it.

    Losses, gradients and weights must equal those of one process, passes run in the planned order, and the bytes sent be
    those of the graph; exit 1 if not. Then steps of a wider model are timed and held against the forecast of --machine,
    which is this one. Under torchrun it takes part as the rank that torchrun says, and times nothing.
    """
    require("narrows run", "hf", "torch", "safetensors")
    from narrows import layout as layouts
    from narrows.run import check, job
    from narrows.run.launch import under_torchrun

    chosen = layouts.load(Path(plan).read_text(), plan)[0] if Path(plan).is_file() else layouts.Layout.parse(plan)
    mine = under_torchrun()
    ranks = mine[1] if mine else nproc or chosen.devices
    if ranks != chosen.devices:
        raise NarrowsError(f"the plan has {chosen.devices} devices, not {ranks}.", where="--nproc",
                           remedy=f"Start {chosen.devices}, or plan for {ranks}.")  # fmt: skip
    if every and not folder:
        raise NarrowsError("there is no place for checkpoints.", where="--every", remedy="Give --folder DIRECTORY.")
    asked = job.Run(chosen, sequence=sequence, steps=steps, folder=folder, every=every)
    if mine:
        from narrows.run.launch import joined_by_torchrun

        everyone = joined_by_torchrun(check.rank, asked)
        if mine[0]:
            return
        found = check.compared(asked, everyone)
    else:
        found = check.check(asked)
    if offloads := chosen.offload != "none" and bool(timed):
        click.echo("not timed: what the disk takes is not calibrated.", err=True)
    clocked = None if mine or not timed or offloads else _timed(asked, timed, machine)
    if as_json:
        print_json({**found.as_json(), "timed": clocked and clocked.as_json()})
    else:
        from narrows.report.terminal import show_reading

        show_reading(f"{chosen} on {ranks} ranks over gloo", found.reading, console())
        click.echo("it is what one process computes, in order, with the bytes of the graph" if found.passed else "it is NOT")
        if clocked:
            wide = clocked.run.model["hidden_size"]
            show_reading(f"\nsteps of a model {wide} wide in fp32, on {clocked.cores} cores", clocked.reading, console())
            click.echo(clocked.verdict)
    if not found.passed:
        sys.exit(1)


def _timed(run: "Run", steps: int, machine: str) -> "Timed":
    from narrows.run.timing import timed

    on = target(machine)
    with progress("timing") as tell:
        return timed(run, on, steps, tell)
