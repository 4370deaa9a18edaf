"""Commands that plan: the fastest layout of a training step on a cluster, and the settings that launch it."""

import json
import sys
from typing import TYPE_CHECKING

import click

from narrows.cli.options import as_json_option, console, print_json, write_file
from narrows.errors import NarrowsError

if TYPE_CHECKING:
    from narrows.search.priced import Job


@click.group()
def plan() -> None:
    """Search for the best way to do something."""


@plan.command()
@click.argument("model")
@click.option("--cluster", "-c", required=True, metavar="NAME|FILE", help="A bundled cluster or site, or your own TOML file.")
@click.option("--devices", "-n", type=int, help="How many of it (default: all); whole nodes, and whole groups of a site.")
@click.option("--global-batch", "-g", "batch", type=int, required=True, help="Sequences of a step.")
@click.option("--seq", "-s", "sequence", type=int, default=4096, show_default=True, help="Tokens of a sequence.")
@click.option("--memory", metavar="SIZE", help="What a device may hold, like 70GB (default: all of its memory).")
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Of activations (default: bf16, or fp16 if it must).")
@click.option("--framework", type=click.Choice(["megatron", "deepspeed", "fsdp"]), default="megatron", show_default=True,
              help="Whose fitted constants count.")  # fmt: skip
@click.option("--schedule", "schedules", multiple=True, metavar="NAME", help="Pipeline schedules to try (default: 1f1b).")
@click.option("--offload", "offloads", multiple=True, metavar="WHAT", help="Offloads to try: none, optimizer, activations, both.")
@click.option("--layout", metavar="TEXT", help="Price this layout instead of searching, like tensor=8,pipeline=4,data=2.")
@click.option("--top", default=5, show_default=True, type=click.IntRange(min=1), help="How many to show.")
@click.option("--pareto", is_flag=True, help="Also all that nothing beats in time, memory, devices, energy and price.")
@click.option("--emit", "target", metavar="FRAMEWORK", help="Print launch settings: megatron, deepspeed, torchtitan, accelerate.")
@click.option("--out", type=click.Path(dir_okay=False), help="Keep the best layout as a plan file (with --emit: the settings).")
@click.option("--timeline", type=click.Path(dir_okay=False),
              help="Keep the best one's pipeline, pass by pass: a picture (.svg), or a Chrome (Perfetto) trace.")  # fmt: skip
@as_json_option
def train(model: str, cluster: str, devices: int | None, batch: int, sequence: int, memory: str | None, dtype: str | None,
          framework: str, schedules: tuple[str, ...], offloads: tuple[str, ...], layout: str | None, top: int, pareto: bool,
          target: str | None, out: str | None, timeline: str | None, as_json: bool) -> None:  # fmt: skip
    """The fastest layout of a training step of MODEL that fits, why it is fastest, and what limits it. Exit 1 if none fits."""
    from narrows import layout as layouts
    from narrows.search import train as search
    from narrows.search.priced import price

    job = job_of(model, cluster, devices, batch, sequence, memory, dtype, framework)
    if layout is not None:
        found = search.TrainPlan(job, 1, 0.0, (price(job, layouts.Layout.parse(layout)),), ())
    else:
        space = search.Space(schedule=schedules or ("1f1b",), offload=offloads or ("none",))
        found = search.plan_train(job, space, top, pareto)
    settings = None
    if target or out or timeline:
        if not found.best:
            raise NarrowsError("no layout fits.", where="plan train", remedy="Give more devices or memory.")
        best = found.best[0].layout
        about = {"model": model, "cluster": cluster, "sequence": sequence, "dtype": job.graph.ops[0].act.name,
                 "framework": framework, "step_seconds": found.best[0].seconds}  # fmt: skip
        settings = layouts.dump(best, **about)
        if target:
            from narrows.emit import emit

            settings = emit(target, best, job.graph, sequence, job.alone(best.groups).single.devices_per_node)
        if timeline:
            from narrows.report.gantt import gantt
            from narrows.simulate.played import played

            step = played(job.graph, job.cluster, best, sequence, framework)[0]
            write_file(timeline, gantt(step, str(best)) if timeline.endswith(".svg") else json.dumps(step.trace()))
    if settings and out:
        write_file(out, settings)
    if as_json:
        print_json({**search.as_json(found), **({"settings": settings} if target else {})})
    elif target and not out:
        click.echo(settings, nl=False)
    else:
        from narrows.report.terminal import show_train_plan

        show_train_plan(found, console())
    if not found.best:
        sys.exit(1)


def job_of(model: str, cluster: str, devices: int | None, batch: int, sequence: int, memory: str | None, dtype: str | None,
           framework: str) -> "Job":  # fmt: skip
    """The step that the options mean, on all of a cluster's devices unless told how many."""
    from narrows.capture import capture
    from narrows.free import cast
    from narrows.graph import DTYPES
    from narrows.search.priced import Job
    from narrows.site import site
    from narrows.units import parse_bytes

    group = site(cluster)
    able = all(one.machine.computes_in("bf16") == "bf16" for one in group.groups)
    chosen = dtype or ("bf16" if able else "fp16")
    graph, room = cast(capture(model), DTYPES[chosen]), parse_bytes(memory) if memory else 0
    return Job(graph, group, group.devices if devices is None else devices, batch, sequence, room, framework)
