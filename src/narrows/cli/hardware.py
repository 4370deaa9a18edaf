"""Commands on machines: which are known, measuring this one, what is installed."""

from pathlib import Path

import click

from narrows.cli.options import as_json_option, console, print_json, progress


@click.command()
@as_json_option
def machines(as_json: bool) -> None:
    """The bundled machines and clusters with their main figures."""
    from narrows import machine as bundled

    found = [bundled.machine(name) for name in bundled.machines()]
    groups = [bundled.cluster(name) for name in bundled.clusters()]
    if as_json:
        print_json({"machines": [{"name": m.name, "title": m.title, "kind": m.kind, **m.figures()}
                             for m in found],
                "clusters": [{"name": c.name, "title": c.title, "machine": c.machine.name, **c.figures()}
                             for c in groups]})  # fmt: skip
    else:
        from narrows.report.terminal import show_machines

        screen = console()
        show_machines(found, screen)
        screen.print("clusters: " + ", ".join(c.name for c in groups))


@click.command()
@click.option("--out", type=click.Path(dir_okay=False), help="Write the machine here instead of keeping it as `here`.")
@as_json_option
def calibrate(out: str | None, as_json: bool) -> None:
    """Measure this CPU (one thread, about 20 s) and keep it as the machine `here`."""
    from narrows import calibrate as calibrating

    with progress("calibrating") as tell:
        found = calibrating.calibrate(tell)
    file = out or str(calibrating.here_file())
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    found.save(file)
    if as_json:
        print_json({"file": file, **found.figures()})
    else:
        from narrows.report.terminal import show_machines

        show_machines([found], console())
        click.echo(f"wrote {file}")


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
