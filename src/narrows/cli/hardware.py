"""Commands on machines: which are known, measuring this one, what is installed."""

import sys
from pathlib import Path

import click

from narrows.cli.options import as_json_option, console, print_json, progress


@click.command()
@as_json_option
def machines(as_json: bool) -> None:
    """The bundled machines, clusters, sites and hosts with their main figures."""
    from narrows import host as behind
    from narrows import machine as bundled
    from narrows.site import site, sites

    found = [bundled.machine(name) for name in bundled.machines()]
    groups = [bundled.cluster(name) for name in bundled.clusters()]
    hosts = [behind.host(name) for name in behind.hosts()]
    if as_json:
        print_json({"machines": [{"name": m.name, "title": m.title, "kind": m.kind, **m.figures()}
                             for m in found],
                "clusters": [{"name": c.name, "title": c.title, "machine": c.machine.name, **c.figures()}
                             for c in groups],
                "sites": [{"name": s.name, "title": s.title, "groups": {g.name: {"machine": g.machine.name, "nodes": g.nodes}
                                                                        for g in s.groups}} for s in map(site, sites())],
                "hosts": [{"name": h.name, "title": h.title, **{key: getattr(h, key) for key in behind.FIGURES}}
                          for h in hosts]})  # fmt: skip
    else:
        from narrows.report.terminal import show_machines

        screen = console()
        show_machines(found, screen)
        screen.print("clusters: " + ", ".join(c.name for c in groups))
        screen.print("sites: " + ", ".join(sites()))
        screen.print("hosts: " + ", ".join(h.name for h in hosts))


@click.command()
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
              help="What to measure: the GPU that torch finds, or one thread of the CPU.")  # fmt: skip
@click.option("--ranks", type=click.IntRange(min=2), help="Also measure the collectives of so many processes on this machine.")
@click.option("--anchors", type=click.Path(exists=True, dir_okay=False), metavar="CSV",
              help="Instead, fit --machine to measured steps: model, phase, batch, tokens, context, seconds.")  # fmt: skip
@click.option("--machine", "-m", "base", metavar="NAME|FILE", help="The machine that --anchors were measured on.")
@click.option("--out", type=click.Path(dir_okay=False), help="Write the machine here instead of keeping it as `here`.")
@as_json_option
def calibrate(device: str, ranks: int | None, anchors: str | None, base: str | None, out: str | None, as_json: bool) -> None:
    """Measure this machine (under a minute) and keep it as `here`; or fit a known one to a few steps that you measured.

    With --anchors, exit 2 where rows are wrong; the machine is fitted to the others all the same.
    """
    from narrows import calibrate as calibrating

    if (anchors is None) != (base is None):
        raise click.UsageError("--anchors and --machine need each other.")
    if anchors is not None and base is not None:
        _fit(anchors, base, out, as_json)
        return
    with progress("calibrating") as tell:
        found = calibrating.calibrate(tell, device)
        if ranks is not None:
            from narrows.ranks import linked

            found = linked(found, ranks, tell)
    file = Path(out) if out else calibrating.here_file()
    calibrating.keep(found, file)
    if as_json:
        print_json({"file": str(file), **found.figures()})
    else:
        from narrows.report.terminal import show_machines

        show_machines([found], console())
        click.echo(f"wrote {file}")


def _fit(file: str, base: str, out: str | None, as_json: bool) -> None:
    from statistics import median

    from narrows import anchors as fitting
    from narrows.calibrate import keep
    from narrows.machine import machine

    known = machine(base)
    with progress(f"fitting {known.name}") as tell:
        tell("reading anchors")
        steps, errors = fitting.anchors(Path(file), known)
        tell("each left out in turn")
        found = fitting.fit(known, steps, f"{len(steps)} steps in {Path(file).name}, narrows calibrate --anchors")
    place = Path(out or f"{known.name}-fitted.toml")
    keep(found.machine, place)
    medians = {key: median(getattr(found, key)) for key in ("before", "after", "left_out")}
    if as_json:
        rows = [{"row": a.row, "measured": a.seconds, **{key: getattr(found, key)[i] for key in medians}}
                for i, a in enumerate(steps)]  # fmt: skip
        print_json({"file": str(place), "scales": found.scales, "identified": found.identified, **medians, "rows": rows,
                    "errors": errors})  # fmt: skip
    else:
        for cause, scale in found.scales.items():
            click.echo(f"{cause:<10} x{scale:.3f}  ({found.identified[cause]:.0%} of what was unknown of it is known now)")
        click.echo(f"median error of {len(steps)} steps: {medians['before']:.1%} before, {medians['after']:.1%} fitted, "
                   f"{medians['left_out']:.1%} where the step was left out")  # fmt: skip
        click.echo(f"wrote {place}")
    for line in errors:
        click.echo(f"error: {line}", err=True)
    if errors:
        sys.exit(2)


@click.command()
@as_json_option
def doctor(as_json: bool) -> None:
    """What is installed, what is missing for which command, and known conflicts."""
    from narrows.doctor import examine

    rows = examine()
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            click.echo(f"{'ok ' if row['ok'] else '-- '} {row['what']:<14} {row['found']:<24} {row['advice']}".rstrip())
