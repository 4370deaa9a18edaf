"""What commands share: their common options, and how those become a graph, a step, a machine and an output."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from narrows.errors import NarrowsError
from narrows.progress import Tell, silent

if TYPE_CHECKING:
    from narrows.graph import Graph
    from narrows.machine import Machine
    from narrows.step import Step


def grouped_options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def wrap(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return wrap


as_json_option = click.option("--json", "as_json", is_flag=True, help="Print plain data (SI units) for machines.")
machine_option = click.option("--machine", "-m", default="here", show_default=True, metavar="NAME|FILE",
                              help="A bundled machine or cluster, your own TOML file, or `here` (measured once).")  # fmt: skip
step_options = grouped_options(
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


def step_of(phase: str | None, batch: int, prompt: int, context: int, source: int, causal: bool = True) -> "Step":
    from narrows.step import Step

    phase = phase or ("decode" if causal else "forward")
    if phase == "decode":
        return Step.decode(batch, context, source)
    return Step(batch, prompt, 0, source, phase)


def captured(model: str, phase: str | None, batch: int, prompt: int, context: int, source: int, dtype: str | None,
              eager: bool) -> "tuple[Graph, Step]":  # fmt: skip
    from dataclasses import replace

    from narrows.capture import capture
    from narrows.free import cast
    from narrows.graph import DTYPES

    graph = capture(model, step_of(phase, batch, prompt, context, source) if ":" in model else None)
    causal = any(op.kind in ("attention", "latent_attention", "scan") and op["held"] for op in graph)
    reads_tokens = any(field.startswith(("tokens", "pairs", "context")) for field in graph.fields)
    step = step_of(phase, batch, prompt if reads_tokens or ":" in model else 1, context, source, causal)
    if step.phase in ("prefill", "decode") and not causal and ":" not in model:
        raise NarrowsError(f"{graph.name} keeps no cache.", where=f"--{step.phase}", remedy="Use --forward or --train.")
    if not source and any("source" in field for field in graph.fields):
        raise NarrowsError(f"{graph.name} has an encoder.", where="--source", remedy="Give its tokens, like --source 512.")
    if dtype:
        graph = cast(graph, DTYPES[dtype])
    return (replace(graph, eager=True) if eager else graph), step


def target(name: str) -> "Machine":
    from narrows.machine import clusters, machine, of_cluster

    if name == "here":
        from narrows.calibrate import here

        with progress("calibrating this machine, once") as tell:
            return here(tell)
    return of_cluster(name) if name.lower() in clusters() else machine(name)


@contextmanager
def progress(title: str) -> Iterator[Tell]:
    """A line on stderr that tells what is going on, with a bar where the end is known; on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    screen = Console(stderr=True)
    if not screen.is_terminal:
        yield silent
        return
    ends = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), *ends, console=screen, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def tell(what: str, done: int = 0, of: int = 0) -> None:
            bar.update(task, description=f"{title}: {what}", completed=done, total=of or None)

        yield tell


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed: the first time the command may end in good order, the second time it stops at once."""
    import signal

    pressed: list[int] = []

    def note(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        click.echo("stopping: what is known so far follows.", err=True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=1, default=str))


def console() -> Any:
    from rich.console import Console

    return Console()


def write_file(path: str, content: str) -> None:
    """A file, whole or not at all."""
    from narrows.figures import write

    write(path, content)
    click.echo(f"wrote {path}", err=True)
