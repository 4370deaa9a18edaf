"""Commands that run a plan for real, on ranks of this machine."""

import sys
from pathlib import Path

import click

from narrows.cli.options import as_json_option, console, print_json
from narrows.errors import NarrowsError, require


@click.group()
def run() -> None:
    """Run a plan on this machine and hold it against its prediction."""


@run.command()
@click.argument("plan")
@click.option("--nproc", "-n", type=click.IntRange(min=1), help="Ranks to start (default: as many as the plan has devices).")
@click.option("--steps", default=2, show_default=True, type=click.IntRange(min=1), help="Optimizer steps.")
@click.option("--seq", "-s", "sequence", default=64, show_default=True, type=click.IntRange(min=1), help="Tokens of a sequence.")
@click.option("--folder", type=click.Path(file_okay=False), default="", help="Keep checkpoints here, and go on from the latest.")
@click.option("--every", default=0, help="Steps between checkpoints (0: none are written).")
@as_json_option
def train(plan: str, nproc: int | None, steps: int, sequence: int, folder: str, every: int, as_json: bool) -> None:
    """Train a small model as PLAN lays it out (a plan file, or text like tensor=2,pipeline=2) over gloo, and check it.

    Losses, gradients and weights must equal those of one process, passes run in the planned order, and the bytes sent be
    those of the graph; exit 1 if not. Under torchrun it takes part as the rank that torchrun says.
    """
    require("narrows run", "hf", "torch", "safetensors")
    from narrows import layout as layouts
    from narrows.run import check
    from narrows.run.launch import under_torchrun

    chosen = layouts.load(Path(plan).read_text(), plan)[0] if Path(plan).is_file() else layouts.Layout.parse(plan)
    mine = under_torchrun()
    ranks = mine[1] if mine else nproc or chosen.devices
    if ranks != chosen.devices:
        raise NarrowsError(f"the plan has {chosen.devices} devices, not {ranks}.", where="--nproc",
                           remedy=f"Start {chosen.devices}, or plan for {ranks}.")  # fmt: skip
    if every and not folder:
        raise NarrowsError("there is no place for checkpoints.", where="--every", remedy="Give --folder DIRECTORY.")
    asked = check.Run(chosen, sequence=sequence, steps=steps, folder=folder, every=every)
    if mine:
        from narrows.run.launch import joined_by_torchrun

        everyone = joined_by_torchrun(check.rank, asked)
        if mine[0]:
            return
        found = check.compared(asked, everyone)
    else:
        found = check.check(asked)
    if as_json:
        print_json(found.as_json())
    else:
        from narrows.report.terminal import show_reading

        show_reading(f"{chosen} on {ranks} ranks over gloo", found.reading, console())
        click.echo("it is what one process computes, in order, with the bytes of the graph" if found.passed else "it is NOT")
    if not found.passed:
        sys.exit(1)
