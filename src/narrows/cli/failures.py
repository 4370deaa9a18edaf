"""`narrows simulate train`: what becomes of a planned training run when devices fail, links flap and one of them is slow."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from narrows.cli.options import as_json_option, console, print_json, write_file
from narrows.cli.planning import job_of
from narrows.cli.serving import simulate as simulate
from narrows.errors import NarrowsError

if TYPE_CHECKING:
    from narrows.layout import Layout
    from narrows.search.priced import Job
    from narrows.simulate.failures import Run


@simulate.command()
@click.argument("model", metavar="MODEL|PLAN")
@click.option("--cluster", "-c", metavar="NAME|FILE", help="A bundled cluster, or your own TOML file (default: the plan's).")
@click.option("--devices", "-n", type=int, help="How many of it (default: as many as the layout has, or all).")
@click.option("--global-batch", "-g", "batch", type=int, help="Sequences of a step (default: as many as the layout has).")
@click.option(
    "--layout", metavar="TEXT", help="Like tensor=8,pipeline=4,data=2,accumulate=16 (default: the plan's, or the fastest)."
)
@click.option("--seq", "-s", "sequence", type=int, help="Tokens of a sequence (default: the plan's, or 4096).")
@click.option(
    "--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Of activations (default: the plan's, bf16, or fp16 if it must)."
)
@click.option("--framework", type=click.Choice(["megatron", "deepspeed", "fsdp"]), help="Whose fitted constants count.")
@click.option("--days", default=30.0, show_default=True, help="That the run lasts.")
@click.option("--mtbf", metavar="TIME", help="Mean time between failures of a device (default: what Llama 3's 16,384 H100 had).")
@click.option("--host-mtbf", metavar="TIME", help="Of what all devices of a node share (default: it never fails alone).")
@click.option("--link-mtbf", metavar="TIME", help="Between flaps of a device's link, which cost a restart and no node.")
@click.option("--restart", default="10min", show_default=True, metavar="TIME", help="From a failure to the checkpoint's reading.")
@click.option("--spares", type=int, help="Devices that stand by, whole nodes (default: as many as it takes).")
@click.option("--repair", default="24h", show_default=True, metavar="TIME", help="Until a failed node is back (with --spares).")
@click.option("--shrink", is_flag=True, help="Go on with the replicas that are left rather than wait (with --spares).")
@click.option("--checkpoint", "size", metavar="SIZE", help="Of a checkpoint (default: weights and optimizer states).")
@click.option("--to", type=click.Choice(["store", "disk", "host"]), default="store", show_default=True,
              help="Where it goes: a file system that all share, disks or memory of the hosts.")  # fmt: skip
@click.option("--store", metavar="SIZE", help="Bytes a second that the store takes (default: what Llama 3's took of a device).")
@click.option("--store-room", metavar="SIZE", help="Bytes that the store has for checkpoints (default: enough).")
@click.option("--host", metavar="NAME|FILE", help="What lies behind the devices: memory, disks, link.")
@click.option("--async", "lazy", is_flag=True, help="Steps go on while a checkpoint is copied and written.")
@click.option("--interval", metavar="TIME", help="Of steps between two checkpoints (default: the best).")
@click.option("--slow", metavar="WHAT=SHARE", help="One straggler: device=0.8 (of its speed) or link=0.5 (of its bandwidth).")
@click.option("--seeds", default=20, show_default=True, help="Runs to play.")
@click.option("--timeline", type=click.Path(dir_okay=False), help="Keep the first run: a picture (.svg), or a Chrome trace.")
@as_json_option
def train(model: str, days: float, interval: str | None, seeds: int, timeline: str | None, as_json: bool, **asked: Any) -> None:
    """How much of a planned training run's time is useful steps, how often to write a checkpoint, and what is lost to what.

    MODEL with --cluster and --layout, or with --global-batch for the fastest layout, or a PLAN that `narrows plan train --out`
    kept. Exit 1 if it makes no progress.
    """
    from narrows.simulate import failures
    from narrows.units import format_bytes, parse_seconds

    plan, run, held = _planned(model=model, **asked)
    seconds = days * 86400
    found = failures.simulate(run, seconds, parse_seconds(interval, "--interval") if interval else 0.0, seeds)
    if timeline:
        from narrows.report.gantt import gantt

        first = failures.timeline(run, seconds, found.every_seconds)
        write_file(timeline, gantt(first, f"{days:g} days") if timeline.endswith(".svg") else json.dumps(first.trace()))
    if as_json:
        print_json({**plan, "checkpoint_bytes": held, **found.as_json()})
    else:
        from narrows.report.terminal import show_train_run

        where = f"{plan['model']} on {plan['machines']}"
        show_train_run(found, where, f"{format_bytes(held)} to the {asked['to']}", console())
    if found.stuck:
        sys.exit(1)


def _planned(slow: str | None, size: str | None, to: str, store: str | None, store_room: str | None, host: str | None, lazy: bool,
             restart: str, mtbf: str | None, host_mtbf: str | None, link_mtbf: str | None, spares: int | None, repair: str,
             shrink: bool, **asked: Any) -> tuple[dict[str, Any], "Run", float]:  # fmt: skip
    """What is planned, as plain data; the run that the options mean; bytes of its checkpoint."""
    from math import inf

    from narrows.host import host as find_host
    from narrows.search.priced import price
    from narrows.simulate.checkpoints import Checkpoint, checkpoint, held_bytes
    from narrows.simulate.failures import Run
    from narrows.simulate.straggler import Slow, straggled
    from narrows.units import parse_bytes, parse_seconds

    job, chosen = _laid_out(**asked)
    step = price(job, chosen)
    late = step.seconds
    if slow:
        late = sum(straggled(job.graph, job.single, chosen, job.sequence, Slow.parse(slow), job.framework).values())
    held, many = parse_bytes(size) if size else held_bytes(job.graph), chosen.devices
    behind = find_host(host) if host else None
    rate, room = parse_bytes(store) if store else 0, parse_bytes(store_room) if store_room else inf
    hidden = late - step.ledger["optimizer"] if lazy else None
    writes = Checkpoint.slowest(
        checkpoint(group, held * part / many, part, to, behind, rate * part / many, room * part / many, hidden)
        for group, part in job.parts
    )
    often = {**_rates(job, mtbf, host_mtbf, link_mtbf), **_nodes(job, chosen, spares, repair, shrink)}
    slowdown = max(1.0, late / step.seconds)
    run = Run(late, writes, parse_seconds(restart, "--restart") + writes.read_seconds, slowdown=slowdown, **often)
    machines = " and ".join(f"{part} {group.machine.name}" for group, part in job.parts)
    plan = {"model": job.graph.name, "cluster": job.site.name, "devices": many, "machines": machines, "config": str(chosen)}
    return plan, run, held


def _laid_out(model: str, cluster: str | None, devices: int | None, batch: int | None, layout: str | None, sequence: int | None,
              dtype: str | None, framework: str | None) -> "tuple[Job, Layout]":  # fmt: skip
    """The step and its layout: the one that is given, that of a plan file, or the fastest for so many sequences."""
    from narrows import layout as layouts
    from narrows.search.train import plan_train

    chosen, about = None, dict[str, Any]()
    if layout is not None:
        chosen = layouts.Layout.parse(layout)
    elif Path(model).is_file():
        chosen, about = layouts.load(Path(model).read_text(), model)
    elif batch is None:
        raise NarrowsError("there is no layout.", where="simulate train",
                           remedy="Give --layout, --global-batch to find the fastest, or a plan file for the model.")  # fmt: skip
    if not (named := cluster or about.get("cluster")):
        raise NarrowsError("there is no cluster.", where="simulate train", remedy="Give --cluster NAME.")
    if chosen:
        devices, batch = devices or chosen.devices, batch or chosen.batch
    job = job_of(about.get("model", model), named, devices, batch or 0, sequence or about.get("sequence", 4096), None,
                 dtype or about.get("dtype"), framework or about.get("framework", "megatron"))  # fmt: skip
    if chosen is None:
        best = plan_train(job, keep=1).best
        if not best:
            raise NarrowsError("no layout fits.", where="simulate train", remedy="Give more devices.")
        chosen = best[0].layout
    return job.alone(chosen.groups), chosen


def _rates(job: "Job", mtbf: str | None, host_mtbf: str | None, link_mtbf: str | None) -> dict[str, Any]:
    """Failures per second that take a node, and that take none."""
    from narrows.simulate.failures import DEVICE_MTBF_SECONDS, rate_per_s
    from narrows.units import parse_seconds

    def rate(count: int, text: str | None, default: float, where: str) -> float:
        return rate_per_s(count, parse_seconds(text, where) if text else default, where)

    devices, never = sum(part for _, part in job.parts), float("inf")
    nodes = sum(group.nodes for group, _ in job.parts)
    taking = rate(devices, mtbf, DEVICE_MTBF_SECONDS, "--mtbf") + rate(nodes, host_mtbf, never, "--host-mtbf")
    return {"failures_per_s": taking, "crashes_per_s": rate(devices, link_mtbf, never, "--link-mtbf")}


def _nodes(job: "Job", layout: "Layout", spares: int | None, repair: str, shrink: bool) -> dict[str, Any]:
    """Spare nodes, seconds of a repair, and how many equal parts the run can leave out one by one."""
    from narrows.layout import nearest
    from narrows.units import parse_seconds

    if spares is None:
        if shrink:
            raise NarrowsError("there are as many spares as it takes.", where="--shrink", remedy="Give --spares, like 0.")
        return {}
    each = max(min(group.devices_per_node, part) for group, part in job.parts)
    if spares < 0 or spares % each:
        problem = f"{spares} devices are no whole nodes of {each}."
        near = nearest("spares", spares, range(0, spares + 2 * each, each), 0)
        raise NarrowsError(problem, where="--spares", remedy=near)
    parts = layout.data // max(1, each * layout.data // layout.devices)
    if shrink and parts < 2:
        problem = f"a node of {each} devices has a part of every replica of {layout}."
        raise NarrowsError(problem, where="--shrink", remedy="Leave it out, or plan for more replicas (data=...).")
    return {"spares": spares // each, "repair_seconds": parse_seconds(repair, "--repair"), "parts": parts if shrink else 1}
