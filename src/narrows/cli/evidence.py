"""Commands on evidence: the papers, their claims, the accuracy of the cost model."""

import sys
from pathlib import Path

import click

from narrows.cli.options import as_json_option, console, print_json, progress, target
from narrows.errors import NarrowsError, require


def _known_family(name: str | None) -> str | None:
    from narrows.errors import closest
    from narrows.papers import papers

    known = sorted({p.family for p in papers()})
    if name is not None and name not in known:
        raise NarrowsError(f"no family is called {name!r}.", where="--family", remedy=closest(name, known))
    return name


@click.command()
@click.option("--family", help="Only this family.")
@click.option("--status", "wanted", type=click.Choice(["described", "built", "works"]), help="Only rows of this status.")
@as_json_option
def papers(family: str | None, wanted: str | None, as_json: bool) -> None:
    """The 484 papers with their status: described, built, or works (every claim's check passes)."""
    from narrows import claims

    family = _known_family(family)
    rows = [row for row in claims.table() if family in (None, row["family"]) and wanted in (None, row["status"])]
    if as_json:
        print_json(rows)
    else:
        from narrows.report.terminal import show_papers

        show_papers(rows, console())


@click.command()
@click.argument("slugs", nargs=-1)
@click.option("--family", help="Every built technique of a family.")
@click.option("--all", "every", is_flag=True, help="Every built technique.")
@click.option("--with-baseline", is_flag=True, help="Also measure with the technique swapped for its baseline, which must fail.")
@click.option("--record", is_flag=True, help="Keep the figures in results/claims.csv.")
@as_json_option
def reproduce(slugs: tuple[str, ...], family: str | None, every: bool, with_baseline: bool, record: bool, as_json: bool) -> None:
    """Measure what papers claim, again, on real models. Exit 1 where a claim fails."""
    from dataclasses import asdict

    from narrows import claims
    from narrows.papers import paper
    from narrows.technique import built

    family = _known_family(family)
    chosen = list(slugs) or [s for s in built() if every or paper(s).family == family]
    if not chosen:
        raise NarrowsError("no technique is named.", where="reproduce", remedy="Give slugs, --family or --all.")
    for slug in chosen:
        paper(slug)  # a misspelt name is known before the first minute of measuring
    found = []
    with progress("reproducing") as tell:
        for at, slug in enumerate(chosen):
            tell(slug, at, len(chosen))
            rows = claims.reproduce(slug, with_baseline)
            found += rows
            if record:
                claims.record(rows)
    if as_json:
        print_json([{k: None if v != v else v for k, v in asdict(e).items()} for e in found])  # JSON has no NaN
    else:
        from narrows.report.terminal import show_evidence

        show_evidence(found, console())
    if not all(e.passed for e in found):
        sys.exit(1)


@click.command()
@click.option("--set", "only", default="", metavar="NAME", help="Only sets whose name starts so: serving, training-sc21, gemm.")
@click.option("--data", type=click.Path(exists=True), help="A folder of measurements, or one CSV file.")
@click.option("--record", is_flag=True, help="Keep the figures in results/accuracy.csv, from which docs/accuracy.md is made.")
@click.option("--here", is_flag=True, help="Instead, run real models on this machine beside what is predicted for them.")
@as_json_option
def validate(only: str, data: str | None, record: bool, here: bool, as_json: bool) -> None:
    """Judge the cost model on measured rows that it was not fitted on: error, 80 % interval, rank, regret.

    Exit 2 where rows are wrong; the others are judged all the same.
    """
    if here:
        _validate_here(as_json)
        return
    from narrows import validate as validating

    with progress("validating") as tell:
        found = validating.validate(Path(data) if data else validating.beside(), only, tell)
    if record:
        validating.record(found)
    if as_json:
        print_json(validating.as_json(found))
    else:
        click.echo("\n".join(validating.table(found)))
        for line in validating.uncovered(found):
            click.echo(line)
    for line in found.errors:
        click.echo(f"error: {line}", err=True)
    if found.errors:
        sys.exit(2)


def _validate_here(as_json: bool) -> None:
    require("narrows validate --here", "hf", "torch", "transformers")
    from narrows import here as measuring

    machine = target("here")
    with progress("measuring") as tell:
        found = measuring.summary(*measuring.measure(machine, tell))
    if as_json:
        print_json([found])
        return
    from narrows.report.terminal import show_here

    show_here(found, console())
