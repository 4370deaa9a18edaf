"""The `narrows` command. Each command loads what it needs when it runs: `--help` imports neither numpy nor torch."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from narrows.errors import NarrowsError, require

if TYPE_CHECKING:
    from narrows.graph import Graph
    from narrows.machine import Machine
    from narrows.step import Step

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="narrows")
def cli() -> None:
    """Find what limits a deep network on a machine, rank the published techniques that widen it, apply them, verify the gain.

    \b
    narrows diagnose llama-3.1-70b --machine h100-sxm --devices 4 --decode --batch 16 --context 4096
    narrows prescribe smollm2-135m --machine here --decode
    narrows apply smollm2-135m --plan "bf16 + awq:group=64" --out smaller
    narrows verify smollm2-135m smaller --machine here
    """


def main() -> None:
    """Run the command line; a NarrowsError becomes one line on stderr and exit code 2."""
    try:
        cli(standalone_mode=False)
    except NarrowsError as error:
        _refuse(str(error))
    except click.ClickException as error:
        where = f" See `{error.ctx.command_path} --help`." if isinstance(error, click.UsageError) and error.ctx else ""
        _refuse(error.format_message() + where)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped; nothing was written.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)


def _refuse(message: str) -> None:
    click.echo(json.dumps({"error": message}) if "--json" in sys.argv else f"error: {message}", err=True)
    sys.exit(2)


def _options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def wrap(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return wrap


as_json_option = click.option("--json", "as_json", is_flag=True, help="Print plain data (SI units) for machines.")
machine_option = click.option("--machine", "-m", default="here", show_default=True, metavar="NAME|FILE",
                              help="A bundled machine or cluster, your own TOML file, or `here` (measured once).")  # fmt: skip
step_options = _options(
    click.option("--prefill", "phase", flag_value="prefill", help="Read a prompt of --prompt tokens."),
    click.option("--decode", "phase", flag_value="decode", help="One new token after --context tokens."),
    click.option("--train", "phase", flag_value="train", help="Forward, backward and optimizer over --prompt tokens."),
    click.option("--forward", "phase", flag_value="forward", help="One forward pass (encoders, images)."),
    click.option("--batch", "-b", default=1, show_default=True, help="Sequences or images."),
    click.option("--prompt", "-p", default=2048, show_default=True, help="New tokens of each sequence (all but decode)."),
    click.option("--context", "-c", default=2048, show_default=True, help="Tokens in the cache (decode)."),
    click.option("--source", default=0, help="Tokens that an encoder reads (encoder-decoders)."),
    click.option("--devices", "-n", default=1, show_default=True, help="Devices that share the model (tensor parallelism)."),
    click.option("--replicas", default=1, show_default=True, help="Data-parallel copies that exchange gradients (--train)."),
    click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Run it in this dtype (default: the model's own)."),
    click.option("--eager", is_flag=True, help="As plain PyTorch runs it: one kernel per operator, launched by the host."),
)


def _step(phase: str | None, batch: int, prompt: int, context: int, source: int, causal: bool = True) -> "Step":
    from narrows.step import Step

    phase = phase or ("decode" if causal else "forward")
    if phase == "decode":
        return Step.decode(batch, context, source)
    return Step(batch, prompt, 0, source, phase)


def _captured(model: str, phase: str | None, batch: int, prompt: int, context: int, source: int, dtype: str | None,
              eager: bool) -> "tuple[Graph, Step]":  # fmt: skip
    from dataclasses import replace

    from narrows.capture import capture
    from narrows.free import cast
    from narrows.graph import DTYPES

    graph = capture(model, _step(phase, batch, prompt, context, source) if ":" in model else None)
    causal = any(op.kind in ("attention", "latent_attention", "scan") and op["held"] for op in graph)
    reads_tokens = any(field.startswith(("tokens", "pairs", "context")) for field in graph.fields)
    step = _step(phase, batch, prompt if reads_tokens or ":" in model else 1, context, source, causal)
    if step.phase in ("prefill", "decode") and not causal and ":" not in model:
        raise NarrowsError(f"{graph.name} keeps no cache.", where=f"--{step.phase}", remedy="Use --forward or --train.")
    if not source and any("source" in field for field in graph.fields):
        raise NarrowsError(f"{graph.name} has an encoder.", where="--source", remedy="Give its tokens, like --source 512.")
    if dtype:
        graph = cast(graph, DTYPES[dtype])
    return (replace(graph, eager=True) if eager else graph), step


def _machine(name: str) -> "Machine":
    from narrows.machine import clusters, machine, of_cluster

    if name == "here":
        from narrows.calibrate import here

        with _progress("calibrating this machine, once") as tell:
            return here(tell)
    return of_cluster(name) if name.lower() in clusters() else machine(name)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr that tells what is going on, on a terminal only."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status(title) as status:
        yield lambda text: status.update(f"{title}: {text}")


def _print(data: Any) -> None:
    click.echo(json.dumps(data, indent=1, default=str))


def _console() -> Any:
    from rich.console import Console

    return Console()


def _write(path: str, content: str) -> None:
    """A file, whole or not at all."""
    from narrows.figures import write

    write(path, content)
    click.echo(f"wrote {path}", err=True)


@cli.command()
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
        _write(out, graph.to_json())
    if as_json:
        _print({"model": graph.name, "source": graph.source, "parameters": graph.parameters, "weight_bytes": graph.weight_bytes,
                "notes": graph.notes, "ops": json.loads(graph.to_json())["ops"]})  # fmt: skip
    elif out is None:
        show_graph(graph, _console())


@cli.command()
@click.argument("model")
@machine_option
@step_options
@click.option("--explain", "named", metavar="OP", help="Show the arithmetic behind an op: its name, the end of it, or a glob.")
@click.option("--html", type=click.Path(dir_okay=False), help="Also write a report with plots to this file.")
@as_json_option
def diagnose(model: str, machine: str, phase: str | None, batch: int, prompt: int, context: int, source: int, devices: int,
             replicas: int, dtype: str | None, eager: bool, named: str | None, html: str | None,
             as_json: bool) -> None:  # fmt: skip
    """Where the time of one step of MODEL goes on a machine, what limits it, and whether it fits."""
    from dataclasses import asdict

    from narrows import diagnose as diagnosing
    from narrows.explain import explanations, findings

    graph, step = _captured(model, phase, batch, prompt, context, source, dtype, eager)
    found = diagnosing.diagnose(graph, _machine(machine), step, devices, replicas)
    explained = explanations(found, named) if named is not None else []
    if html is not None:
        from narrows.report.html import report

        _write(html, report([found]))
    if as_json:
        more = {"explanation": explained} if named is not None else {}
        _print({**diagnosing.as_json(found), "findings": [asdict(f) for f in findings(found)], **more})
    elif explained:
        click.echo("\n\n".join(explained))
    else:
        from narrows.report.terminal import show_diagnosis

        show_diagnosis(found, _console())


@cli.command()
@click.argument("model")
@machine_option
@step_options
@click.option("--within", type=float, help="Only plans that are exact, or measured to keep quality within this ratio.")
@click.option("--html", type=click.Path(dir_okay=False), help="Also write a report with plots to this file.")
@as_json_option
def prescribe(model: str, machine: str, phase: str | None, batch: int, prompt: int, context: int, source: int, devices: int,
              replicas: int, dtype: str | None, eager: bool, within: float | None, html: str | None,
              as_json: bool) -> None:  # fmt: skip
    """Which techniques would help this step, by how much, at what price, and why not the others."""
    from narrows import prescribe as prescribing

    graph, step = _captured(model, phase, batch, prompt, context, source, dtype, eager)
    with _progress("trying techniques") as tell:
        found = prescribing.prescribe(graph, _machine(machine), step, devices, replicas, tell)
    found = found.within(within) if within else found
    if html is not None:
        from narrows.report.html import report

        _write(html, report([found.before], found))
    if as_json:
        _print(prescribing.as_json(found))
    else:
        from narrows.report.terminal import show_prescription

        show_prescription(found, _console())


@cli.command()
@click.argument("model")
@click.option("--plan", required=True, help="Techniques joined by +, with options: 'llm-drop:attention=4 + awq:group=64'.")
@click.option("--out", required=True, type=click.Path(), help="Directory to write; it appears whole or not at all.")
@click.option("--text", type=click.Path(exists=True, dir_okay=False), help="Calibration text (default: the sample text).")
@click.option("--overwrite", is_flag=True, help="Replace a directory that is there.")
@as_json_option
def apply(model: str, plan: str, out: str, text: str | None, overwrite: bool, as_json: bool) -> None:
    """Apply a plan to MODEL (a directory, .gguf or sample name) and write a directory that transformers loads."""
    require("narrows apply", "hf", "torch", "transformers", "safetensors")
    from narrows import workflow

    with _progress("applying") as tell:
        manifest = workflow.apply(model, plan, out, text, overwrite, tell)
    if as_json:
        _print(manifest)
    else:
        size = sum(f["bytes"] for f in manifest["files"].values())
        click.echo(f"wrote {out}: {manifest['plan']}, {size / 1e6:.1f} MB in {len(manifest['files'])} files")
        click.echo(f"next: narrows verify {model} {out}")


@cli.command()
@click.argument("before")
@click.argument("after")
@machine_option
@click.option("--text", type=click.Path(exists=True, dir_okay=False), help="Held-out text (default: the sample text).")
@click.option("--quality", metavar="MODULE:FUNCTION", help="Your own measure of (model, batches), larger is better.")
@click.option("--prompt", "-p", default=128, show_default=True, help="Prompt of the timed prefill.")
@click.option("--context", "-c", default=128, show_default=True, help="Context of the timed decode step.")
@click.option("--max-perplexity", default=1.10, show_default=True, help="Refuse above this ratio to the original's.")
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Interleaved timings.")
@click.option("--html", type=click.Path(dir_okay=False), help="Also write a report with plots to this file.")
@click.option("--results", type=click.Path(dir_okay=False), help="Append the measured rows to this CSV.")
@as_json_option
def verify(before: str, after: str, machine: str, text: str | None, quality: str | None, prompt: int, context: int,
           max_perplexity: float, rounds: int, html: str | None, results: str | None, as_json: bool) -> None:  # fmt: skip
    """Measure AFTER (a directory that apply wrote) beside BEFORE: quality, speed, bytes, prediction. Exit 1 if it fails."""
    require("narrows verify", "hf", "torch", "transformers", "safetensors")
    from narrows import verify as verifying
    from narrows import workflow

    target = _machine(machine)
    with _progress("verifying") as tell:
        gate = verifying.Gate(perplexity=max_perplexity)
        found, diagnoses = workflow.verify(before, after, target, text, quality, prompt, context, gate, rounds, tell)
    if html is not None:
        from narrows.report.html import report

        _write(html, report(diagnoses, None, found))
    if results:
        verifying.record(found, target.title, "narrows " + " ".join(sys.argv[1:]), Path(results))
    if as_json:
        _print(verifying.as_json(found))
    else:
        from narrows.report.terminal import show_verification

        show_verification(found, _console())
    if not found.passed:
        sys.exit(1)


def _known_family(name: str | None) -> str | None:
    from narrows.errors import closest
    from narrows.papers import papers

    known = sorted({p.family for p in papers()})
    if name is not None and name not in known:
        raise NarrowsError(f"no family is called {name!r}.", where="--family", remedy=closest(name, known))
    return name


@cli.command()
@click.option("--family", help="Only this family.")
@click.option("--status", "wanted", type=click.Choice(["described", "built", "works"]), help="Only rows of this status.")
@as_json_option
def papers(family: str | None, wanted: str | None, as_json: bool) -> None:
    """The 484 papers with their status: described, built, or works (every claim's check passes)."""
    from narrows import claims

    family = _known_family(family)
    rows = [row for row in claims.table() if family in (None, row["family"]) and wanted in (None, row["status"])]
    if as_json:
        _print(rows)
    else:
        from narrows.report.terminal import show_papers

        show_papers(rows, _console())


@cli.command()
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
    with _progress("reproducing") as tell:
        for slug in chosen:
            tell(slug)
            rows = claims.reproduce(slug, with_baseline)
            found += rows
            if record:
                claims.record(rows)
    if as_json:
        _print([{k: None if v != v else v for k, v in asdict(e).items()} for e in found])  # JSON has no NaN
    else:
        from narrows.report.terminal import show_evidence

        show_evidence(found, _console())
    if not all(e.passed for e in found):
        sys.exit(1)


@cli.command()
@as_json_option
def machines(as_json: bool) -> None:
    """The bundled machines and clusters with their main figures."""
    from narrows import machine as bundled

    found = [bundled.machine(name) for name in bundled.machines()]
    groups = [bundled.cluster(name) for name in bundled.clusters()]
    if as_json:
        _print({"machines": [{"name": m.name, "title": m.title, "kind": m.kind, **m.figures()}
                             for m in found],
                "clusters": [{"name": c.name, "title": c.title, "machine": c.machine.name, **c.figures()}
                             for c in groups]})  # fmt: skip
    else:
        from narrows.report.terminal import show_machines

        console = _console()
        show_machines(found, console)
        console.print("clusters: " + ", ".join(c.name for c in groups))


@cli.command()
@as_json_option
def models(as_json: bool) -> None:
    """The bundled models; every command takes their names."""
    from narrows.capture import bundled, capture

    graphs = [capture(name) for name in bundled()]
    rows = [{"name": g.name, "parameters": g.parameters, "weight_bytes": g.weight_bytes, "source": g.source} for g in graphs]
    if as_json:
        _print(rows)
    else:
        from narrows.report.terminal import show_models

        show_models(graphs, _console())


@cli.command()
@click.option("--out", type=click.Path(dir_okay=False), help="Write the machine here instead of keeping it as `here`.")
@as_json_option
def calibrate(out: str | None, as_json: bool) -> None:
    """Measure this CPU (one thread, about 20 s) and keep it as the machine `here`."""
    from narrows import calibrate as calibrating

    with _progress("calibrating") as tell:
        found = calibrating.calibrate(tell)
    file = out or str(calibrating.here_file())
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    found.save(file)
    if as_json:
        _print({"file": file, **found.figures()})
    else:
        from narrows.report.terminal import show_machines

        show_machines([found], _console())
        click.echo(f"wrote {file}")


@cli.command()
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

    with _progress("validating") as tell:
        found = validating.validate(Path(data) if data else validating.beside(), only, tell)
    if record:
        validating.record(found)
    if as_json:
        _print(validating.as_json(found))
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

    machine = _machine("here")
    with _progress("measuring") as tell:
        found = measuring.summary(measuring.measure(machine, tell))
    if as_json:
        _print([found])
        return
    from narrows.report.terminal import show_here

    show_here(found, _console())


@cli.command()
@as_json_option
def doctor(as_json: bool) -> None:
    """What is installed, what is missing for which command, and known conflicts."""
    from narrows.doctor import examine

    rows = examine()
    if as_json:
        _print(rows)
    else:
        for row in rows:
            click.echo(f"{'ok ' if row['ok'] else '-- '} {row['what']:<14} {row['found']:<24} {row['advice']}".rstrip())


if __name__ == "__main__":
    main()
