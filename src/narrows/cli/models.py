"""Commands on a model: capture, diagnose, prescribe, apply, verify."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from narrows.cli.options import (
    as_json_option,
    captured,
    console,
    machine_option,
    print_json,
    progress,
    step_options,
    target,
    write_file,
)
from narrows.errors import NarrowsError, require


@click.command()
@click.argument("model")
@click.option("--out", type=click.Path(dir_okay=False), help="Keep the graph as a file that every command takes as MODEL.")
@click.option("--dim", "dims", multiple=True, metavar="NAME=VALUE", help="A dim of an ONNX file: a number, batch or sequence.")
@as_json_option
def capture(model: str, out: str | None, dims: tuple[str, ...], as_json: bool) -> None:
    """Read MODEL into a graph: a bundled name, config.json, directory, .onnx, graph file, or package.module:factory."""
    from narrows.capture import capture as read
    from narrows.report.terminal import show_graph

    pairs = [dim.partition("=") for dim in dims]
    if any(not (name and value) for name, _, value in pairs):
        raise NarrowsError("it is not NAME=VALUE.", where="--dim", remedy="Write it like --dim height=224.")
    graph = read(model, dims={name: int(value) if value.isdecimal() else value for name, _, value in pairs})
    if out is not None:
        write_file(out, graph.to_json())
    if as_json:
        own = {"model": graph.name, "source": graph.source, "parameters": graph.parameters, "weight_bytes": graph.weight_bytes}
        print_json({**own, "notes": graph.notes, "ops": json.loads(graph.to_json())["ops"]})
    elif out is None:
        show_graph(graph, console())


@click.command()
@click.argument("model")
@machine_option
@step_options
@click.option("--explain", "named", metavar="OP", help="Show the arithmetic behind an op: its name, the end of it, or a glob.")
@click.option("--html", type=click.Path(dir_okay=False), help="Also write a report with plots to this file.")
@as_json_option
def diagnose(
    model: str, machine: str, devices: int, replicas: int, named: str | None, html: str | None, as_json: bool, **size: Any
) -> None:
    """Where the time of one step of MODEL goes on a machine, what limits it, and whether it fits."""
    from narrows import diagnose as diagnosing
    from narrows.explain import explanations, findings

    graph, step = captured(model, **size)
    found = diagnosing.diagnose(graph, target(machine), step, devices, replicas)
    explained = explanations(found, named) if named is not None else []
    if html is not None:
        from narrows.report.html import report

        write_file(html, report([found]))
    if as_json:
        more = {"explanation": explained} if named is not None else {}
        print_json({**diagnosing.as_json(found), "findings": [asdict(f) for f in findings(found)], **more})
    elif explained:
        click.echo("\n\n".join(explained))
    else:
        from narrows.report.terminal import show_diagnosis

        show_diagnosis(found, console())


@click.command()
@click.argument("model")
@machine_option
@step_options
@click.option("--within", type=float, help="Only plans that are exact, or measured to keep quality within this ratio.")
@click.option("--html", type=click.Path(dir_okay=False), help="Also write a report with plots to this file.")
@as_json_option
def prescribe(
    model: str, machine: str, devices: int, replicas: int, within: float | None, html: str | None, as_json: bool, **size: Any
) -> None:
    """Which techniques would help this step, by how much, at what price, and why not the others."""
    from narrows import prescribe as prescribing

    graph, step = captured(model, **size)
    with progress("trying techniques") as tell:
        found = prescribing.prescribe(graph, target(machine), step, devices, replicas, tell)
    found = found.within(within) if within else found
    if html is not None:
        from narrows.report.html import report

        write_file(html, report([found.before], found))
    if as_json:
        print_json(prescribing.as_json(found))
    else:
        from narrows.report.terminal import show_prescription

        show_prescription(found, console())


@click.command()
@click.argument("analysis")
@click.argument("model")
@machine_option
@step_options
@as_json_option
def measure(analysis: str, model: str, machine: str, devices: int, replicas: int, as_json: bool, **size: Any) -> None:
    """What a published ANALYSIS, like `ai-and-memory-wall`, says of MODEL on a machine; options as in `slug:name=value`."""
    from narrows.plan import parse
    from narrows.technique import Measures

    chosen = parse(analysis)
    if not isinstance(chosen, Measures):
        raise NarrowsError(f"{analysis} is no analysis.", where="measure", remedy="`narrows papers` names the face of each.")
    if devices > 1 or replicas > 1:
        raise NarrowsError("an analysis looks at one device.", where="measure", remedy="Leave --devices and --replicas at 1.")
    graph, step = captured(model, **size)
    found = chosen.measure(graph, target(machine), step)
    if as_json:
        print_json({"values": dict(found.values), "units": dict(found.units), "rows": [dict(row) for row in found.rows]})
    else:
        from narrows.report.terminal import show_reading

        show_reading(f"{chosen.paper.name}: {graph.name}", found, console())


@click.command()
@click.argument("model")
@click.option("--plan", help="Techniques joined by +, with options: 'llm-drop:attention=4 + awq:group=64'.")
@click.option(
    "--budget", metavar="TEXT", help="Instead: the formats of layers that keep 'size<=60%, decode>=1.3x, perplexity<=+3%'."
)
@click.option("--out", required=True, type=click.Path(), help="Directory or .gguf file to write; it appears whole or not at all.")
@click.option("--text", type=click.Path(exists=True, dir_okay=False), help="Calibration text (default: the sample text).")
@click.option("--overwrite", is_flag=True, help="Replace a directory that is there.")
@click.option("--max-perplexity", type=float, help="Measure on held-out text; write nothing above this ratio to the original's.")
@click.option("--keep", is_flag=True, help="Write it even if --max-perplexity refuses it; the exit code stays 1.")
@click.option("--stream", is_flag=True, help="One block at a time, as models too large for the memory are always applied.")
@as_json_option
def apply(model: str, plan: str | None, budget: str | None, out: str, text: str | None, overwrite: bool,
          max_perplexity: float | None, keep: bool, stream: bool, as_json: bool) -> None:  # fmt: skip
    """Apply a plan to MODEL (a directory, .gguf or sample name) and write a directory that transformers loads.

    With --budget the formats are searched and measured on this machine; exit 1, and nothing written, where none keeps it.
    """
    require("narrows apply", "hf", "torch", "transformers", "safetensors")
    from narrows import verify as verifying
    from narrows import workflow

    if (plan is None) == (budget is None):
        raise NarrowsError("it needs a plan or a budget.", where="apply", remedy="Give --plan or --budget.")
    if keep and max_perplexity is None:
        raise NarrowsError("nothing would be refused.", where="--keep", remedy="Give --max-perplexity, too.")
    if budget is not None and (max_perplexity is not None or stream):
        remedy = "Write perplexity into the budget, and leave --stream out."
        raise NarrowsError("a budget is searched in memory, with limits of its own.", where="apply", remedy=remedy)
    found, quality, manifest = None, None, None
    with progress("applying") as tell:
        if budget is not None:
            found, manifest = workflow.apply_within(model, budget, out, text, overwrite, tell)
        elif plan is not None:
            gate = verifying.Gate(perplexity=max_perplexity) if max_perplexity is not None else None
            quality, manifest = workflow.apply(model, plan, out, text, overwrite, tell, gate, keep, stream)
    failed = quality.failure if quality else ""
    if found is not None:
        from narrows.report.terminal import show_budget
        from narrows.search import budget as budgets

        print_json({**budgets.as_json(found), "manifest": manifest}) if as_json else show_budget(found, console())
    elif as_json:
        print_json({**(manifest or {}), **({"quality": asdict(quality)} if quality else {})})
    if manifest is not None and not as_json:
        size = sum(f["bytes"] for f in manifest["files"].values())
        click.echo(f"wrote {out}: {manifest['plan']}, {size / 1e6:.1f} MB in {len(manifest['files'])} files")
        if len(manifest["readers"]) == 1:
            click.echo("read by: narrows alone; no other program has a layout for it")
        elif manifest["beside_weights"]:
            click.echo(f"read by others without {' and '.join(manifest['beside_weights'])}: that is not in the weights")
        if manifest["moved"]:
            click.echo(f"order: {manifest['moved']}")
        if not out.endswith(".gguf"):
            click.echo(f"next: narrows verify {model} {out}")
    if failed:
        click.echo(f"refused: {failed}", err=True)
    if manifest is None or failed:
        sys.exit(1)


@click.command()
@click.argument("before")
@click.argument("after")
@machine_option
@click.option("--text", type=click.Path(exists=True, dir_okay=False), help="Held-out text (default: the sample text).")
@click.option("--quality", metavar="MODULE:FUNCTION", help="Your own measure of (model, batches), larger is better.")
@click.option("--prompt", "-p", default=128, show_default=True, help="Prompt of the timed prefill.")
@click.option("--context", "-c", default=128, show_default=True, help="Context of the timed decode step.")
@click.option("--max-perplexity", default=1.10, show_default=True, help="Refuse above this ratio to the original's.")
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Interleaved timings.")
@click.option("--ablation", is_flag=True, help="Also measure each step of the plan alone, and the plan up to each step.")
@click.option("--html", type=click.Path(dir_okay=False), help="Also write a report with plots to this file.")
@click.option("--results", type=click.Path(dir_okay=False), help="Append the measured rows to this CSV.")
@as_json_option
def verify(before: str, after: str, machine: str, text: str | None, quality: str | None, prompt: int, context: int,
           max_perplexity: float, rounds: int, ablation: bool, html: str | None, results: str | None,
           as_json: bool) -> None:  # fmt: skip
    """Measure AFTER (a directory that apply wrote) beside BEFORE: quality, speed, bytes, prediction. Exit 1 if it fails."""
    require("narrows verify", "hf", "torch", "transformers", "safetensors")
    from narrows import ablation as ablations
    from narrows import verify as verifying
    from narrows import workflow

    place = target(machine)
    with progress("verifying") as tell:
        gate = verifying.Gate(perplexity=max_perplexity)
        found, diagnoses = workflow.verify(before, after, place, text, quality, prompt, context, gate, rounds, tell)
        parts = workflow.ablate(before, after, place, text, prompt, context, rounds, tell) if ablation else None
    if html is not None:
        from narrows.report.html import report

        write_file(html, report(diagnoses, None, found))
    if results:
        verifying.record(found, place.title, "narrows " + " ".join(sys.argv[1:]), Path(results))
    if as_json:
        print_json({**verifying.as_json(found), **({"ablation": ablations.as_json(parts)} if parts else {})})
    else:
        from narrows.report.terminal import show_ablation, show_verification

        show_verification(found, console())
        if parts:
            show_ablation(parts, console())
    if not found.passed:
        sys.exit(1)


@click.command()
@as_json_option
def models(as_json: bool) -> None:
    """The bundled models; every command takes their names."""
    from narrows.capture import bundled, capture

    graphs = [capture(name) for name in bundled()]
    rows = [{"name": g.name, "parameters": g.parameters, "weight_bytes": g.weight_bytes, "source": g.source} for g in graphs]
    if as_json:
        print_json(rows)
    else:
        from narrows.report.terminal import show_models

        show_models(graphs, console())
