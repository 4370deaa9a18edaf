"""Commands that simulate: what the clients of a serving engine would see."""

import resource
import time
from typing import Any

import click

from narrows.cli.options import as_json_option, console, grouped_options, print_json, progress, target
from narrows.errors import NarrowsError


@click.group()
def simulate() -> None:
    """Play a load or a plan, event by event."""


load_options = grouped_options(
    click.option("--trace", type=click.Path(dir_okay=False), help="Azure CSV, Mooncake JSONL or vLLM requests JSONL."),
    click.option("--rate", type=float, help="Instead: requests per second; with --trace, plays that trace at this rate."),
    click.option("--requests", "count", type=int, help="At most so many (default: the whole trace, or 1000)."),
    click.option("--prompt", "-p", default=1024.0, show_default=True, help="Mean tokens of a prompt (without --trace)."),
    click.option("--output", "-o", default=256.0, show_default=True, help="Mean tokens of an answer (without --trace)."),
    click.option("--spread", default=1.0, show_default=True, help="Coefficient of variation of both (without --trace)."),
    click.option("--burst", default=1.0, show_default=True, help="Coefficient of variation of the gaps; 1 is Poisson."),
    click.option("--seed", default=0, show_default=True),
)


@simulate.command()
@click.argument("model")
@click.option("--machine", "-m", required=True, metavar="NAME|FILE", help="Of a replica.")
@click.option("--devices", "-n", default=1, show_default=True, help="Devices of a replica (tensor parallelism).")
@click.option("--replicas", "-r", default=1, show_default=True, help="Of the engine; with --prefill, of those that decode.")
@click.option("--prefill", default=0, show_default=True, help="Replicas that read prompts apart (0: together with decoding).")
@click.option("--prefill-machine", metavar="NAME|FILE", help="Of those that read prompts (default: --machine).")
@click.option("--engine", default="vllm-v1", show_default=True, help="vllm-v1, vllm-v0, sglang, trtllm or static.")
@click.option("--max-sequences", type=int, help="That run at a time (default: the engine's).")
@click.option("--max-tokens", type=int, help="Rows of a step (default: the engine's).")
@click.option("--blocks", default=0, help="Of keys and values per replica, as the engine reports them (default: what is left).")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Run it in this dtype (default: the model's own).")
@load_options
@click.option("--ttft", default=float("inf"), help="Seconds to the first token that a request must keep to count as good.")
@click.option("--tpot", default=float("inf"), help="Seconds per further token that it must keep.")
@as_json_option
def serve(model: str, machine: str, devices: int, replicas: int, prefill: int, prefill_machine: str | None, engine: str,
          max_sequences: int | None, max_tokens: int | None, blocks: int, dtype: str | None, ttft: float, tpot: float,
          as_json: bool, **load: Any) -> None:  # fmt: skip
    """What clients of MODEL would see: percentiles, goodput, and where the time of the slow requests goes."""
    from narrows.capture import capture
    from narrows.free import cast
    from narrows.graph import DTYPES
    from narrows.simulate import fleet

    started = time.process_time()
    graph = capture(model)
    graph = cast(graph, DTYPES[dtype]) if dtype else graph
    own = fleet.rules(engine, max_sequences=max_sequences, max_tokens=max_tokens)
    group = fleet.Group(graph, target(machine), own, devices, replicas, blocks)
    apart = fleet.Group(graph, target(prefill_machine or machine), own, devices, prefill, blocks) if prefill else None
    with progress("serving") as tell:
        found = fleet.serve(told(requests_of(**load), tell), group, apart, ttft=ttft, tpot=tpot)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cost = {"cpu_seconds": time.process_time() - started, "peak_rss_bytes": rss}
    if as_json:
        setting = {"model": graph.name, "machine": group.machine.name, "engine": engine, "blocks": group.room()}
        print_json({**setting, **found.as_json(), **cost})
        return
    from narrows.report.terminal import show_outcome

    place = f"{replicas} x {devices} {group.machine.name}"
    aside = f", prompts on {prefill} x {devices} {apart.machine.name}" if apart else ""
    show_outcome(found, f"{graph.name} on {place}{aside}, {engine}", console())


def requests_of(trace: str | None, rate: float | None, count: int | None, prompt: float, output: float, spread: float,
                burst: float, seed: int) -> Any:  # fmt: skip
    """The load that the options mean."""
    from narrows.simulate import workload
    from narrows.simulate.step_times import PS

    if trace:
        if rate:
            every = list(workload.first(workload.read(trace), count) if count else workload.read(trace))
            span = (every[-1].arrival - every[0].arrival) / PS
            return workload.scaled(every, rate * span / max(len(every) - 1, 1)) if span else iter(every)
        found = workload.read(trace)
        return workload.first(found, count) if count else found
    if not rate:
        raise NarrowsError("there is no load.", where="simulate serve", remedy="Give --trace FILE or --rate PER_SECOND.")
    return workload.generate(rate, count or 1000, workload.Lengths(prompt, output, spread, spread), seed, burst)


def told(requests: Any, tell: Any) -> Any:
    """Requests as they pass, with a word of progress for every thousand."""
    for i, request in enumerate(requests):
        if i % 1000 == 0:
            tell(f"request {i:,}")
        yield request
