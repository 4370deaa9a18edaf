"""Commands on serving: what the clients of an engine would see, and the cheapest deployment for a load."""

import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from narrows.cli.options import (
    as_json_option,
    console,
    grouped_options,
    interruptible,
    print_json,
    progress,
    target,
    write_file,
)
from narrows.cli.planning import plan
from narrows.errors import NarrowsError

if TYPE_CHECKING:
    from narrows.search.deployments import Kind
    from narrows.simulate.fleet import Group
    from narrows.simulate.speculation import Speculation

KEPT = 1000  # requests in a trace of their times: more cannot be told apart in a picture


@click.group()
def simulate() -> None:
    """Play a load or a plan, event by event."""


load_options = grouped_options(
    click.option("--trace", type=click.Path(dir_okay=False), help="Azure CSV, Mooncake JSONL or vLLM requests JSONL."),
    click.option("--load", "named", metavar="NAME", help="Like a recorded one: azure-2023-conv, azure-2023-code, mooncake-..."),
    click.option("--rate", type=float, help="Requests per second: alone, or instead of that of a trace or load."),
    click.option("--requests", "count", type=int, help="At most so many (default: as many as there are, or 1000)."),
    click.option("--hours", type=float, help="As many as come in so long, instead of --requests (with --load or --rate)."),
    click.option("--swing", default=0.0, show_default=True, help="Share by which the rate swings up and down over a day."),
    click.option("--ramp", default=1.0, show_default=True, help="The rate grows evenly to so many times what it begins with."),
    click.option("--prompt", "-p", default=1024.0, show_default=True, help="Mean tokens of a prompt (with --rate alone)."),
    click.option("--output", "-o", default=256.0, show_default=True, help="Mean tokens of an answer (with --rate alone)."),
    click.option("--spread", default=1.0, show_default=True, help="Coefficient of variation of both (with --rate alone)."),
    click.option("--burst", default=1.0, show_default=True, help="The same of the gaps; 1 is Poisson (with --rate alone)."),
    click.option("--seed", default=0, show_default=True),
)


speculation_options = grouped_options(
    click.option(
        "--draft", metavar="MODEL", help="That proposes tokens which MODEL checks; `ngram`: text that repeats proposes."
    ),
    click.option(
        "--acceptance", type=float, help="Share of the proposed tokens that are kept, as you measured it (with --draft)."
    ),
    click.option("--ahead", multiple=True, type=int, help="Tokens proposed at a time (default: 3; a plan tries all you give)."),
)
context_option = click.option(
    "--context", type=int, help="Tokens that a request may have, longer ones are rejected (default: the model's own)."
)


replica_options = grouped_options(
    click.option("--autoscale", type=click.Choice(["disk", "host", "peer"]),
                 help="Replicas come and go with the load, --replicas at the most; new ones load their weights from there."),
    click.option("--least", default=1, show_default=True, help="Replicas that are always there (with --autoscale)."),
    click.option("--power-cap", default=0.0, help="Watts of a device, under which its clock falls (default: no cap)."),
    click.option("--host-cache", default=0.0, help="GB of a replica's host for prompts that were read (of a trace with hashes)."),
    click.option("--disk-cache", default=0.0, help="GB of its disk for those that the host has no room for."),
    click.option("--swap", is_flag=True, help="Evicted sequences wait in the host (--host-cache) instead of being read again."),
)  # fmt: skip


talk_options = grouped_options(
    click.option("--turns", default=1.0, show_default=True, help="Mean turns of a session: then requests are first turns."),
    click.option("--think", type=float, help="Mean seconds from an answer to the next turn (default: as in Mooncake's trace)."),
    click.option("--words", type=float, help="Mean new tokens of a further turn (default: as in Mooncake's trace)."),
    click.option("--answers", default=1, show_default=True, help="To each prompt, which is read once."),
)
fleet_options = grouped_options(
    click.option("--also", multiple=True, metavar="MACHINE[:OPTION=VALUE,...]",
                 help="Further replicas, that are unlike: a100-80gb:replicas=4,devices=2,weights=int8; a100-80gb:4 for short."),
    click.option("--prefill-also", multiple=True, metavar="MACHINE[:...]", help="The same of those that read prompts."),
    click.option("--route", type=click.Choice(["fewest", "in-turn", "sticky", "least-work"]), default="fewest", show_default=True,
                 help="Which replica gets a request: fewest inside, in turn, where its talk is, least work in its own seconds."),
)  # fmt: skip
FURTHER = ("replicas", "devices", "weights", "cache", "blocks", "max_sequences", "max_tokens")  # of what --also says


@simulate.command()
@click.argument("model")
@click.option("--machine", "-m", required=True, metavar="NAME|FILE", help="Of a replica.")
@click.option("--devices", "-n", default=1, show_default=True, help="Devices of a replica (tensor parallelism).")
@click.option("--pipeline", default=1, show_default=True, help="Stages that share the layers, of --devices each.")
@click.option("--experts", default=1, show_default=True, help="Devices (times --devices) that share the experts of a mixture.")
@click.option("--replicas", "-r", default=1, show_default=True, help="Of the engine; with --prefill, of those that decode.")
@click.option("--prefill", default=0, show_default=True, help="Replicas that read prompts apart (0: together with decoding).")
@click.option("--prefill-machine", metavar="NAME|FILE", help="Of those that read prompts (default: --machine).")
@click.option("--engine", default="vllm-v1", show_default=True, help="vllm-v1, vllm-v0, sglang, trtllm or static.")
@click.option("--max-sequences", type=int, help="That run at a time (default: the engine's).")
@click.option("--max-tokens", type=int, help="Rows of a step (default: the engine's).")
@click.option("--blocks", default=0, help="Of keys and values per replica, as the engine reports them (default: what is left).")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Run it in this dtype (default: the model's own).")
@context_option
@replica_options
@fleet_options
@speculation_options
@load_options
@talk_options
@click.option("--clients", type=int, help="So many who each send their next request when the last is answered.")
@click.option("--seeds", default=1, show_default=True, help="Play so many loads (at least 3) of other seeds: 95 % intervals.")
@click.option("--ttft", default=float("inf"), help="Seconds to the first token that a request must keep to count as good.")
@click.option("--tpot", default=float("inf"), help="Seconds per further token that it must keep.")
@click.option("--policy", metavar="SLUG[:OPTION=VALUE]", help="Serve as a paper does: sarathi-serve, distserve, nanoflow, ...")
@click.option("--tbt", default=float("inf"), help="With --policy: seconds between two tokens that 99 % of them must keep.")
@click.option("--saturation", "flood", is_flag=True, help="Also the rate of requests beyond which they pile up.")
@click.option("--what-if", "what_ifs", is_flag=True, help="Also what 10 % more compute, bandwidth and link would give.")
@click.option("--chrome", type=click.Path(dir_okay=False), help="Keep the first 1000 requests as a Chrome (Perfetto) trace.")
@click.option("--html", type=click.Path(dir_okay=False), help="Also write a report with plots to this file.")
@as_json_option
def serve(model: str, machine: str, devices: int, pipeline: int, experts: int, replicas: int, prefill: int,
          prefill_machine: str | None, engine: str, max_sequences: int | None, max_tokens: int | None, blocks: int,
          dtype: str | None, context: int | None, autoscale: str | None, least: int, power_cap: float, host_cache: float,
          disk_cache: float, swap: bool, also: tuple[str, ...], prefill_also: tuple[str, ...], route: str, draft: str | None,
          acceptance: float | None, ahead: tuple[int, ...], clients: int | None,
          seeds: int, ttft: float, tpot: float, policy: str | None, tbt: float, flood: bool, what_ifs: bool,
          chrome: str | None, html: str | None, as_json: bool, **load: Any) -> None:  # fmt: skip
    """What clients of MODEL would see: percentiles, goodput, and where the time of the slow requests goes.

    Ctrl-C ends the load: the requests so far are answered, and what they saw is printed.
    """
    from narrows.capture import capture
    from narrows.capture.config import longest
    from narrows.free import cast
    from narrows.graph import DTYPES
    from narrows.simulate import asked, fleet
    from narrows.simulate.scaling import Scaling, start_seconds
    from narrows.simulate.steady import Steady
    from narrows.simulate.traffic import ROUTES
    from narrows.simulate.watch import Watch

    started = time.process_time()
    graph = capture(model)
    graph = cast(graph, DTYPES[dtype]) if dtype else graph
    own = fleet.rules(engine, max_sequences=max_sequences, max_tokens=max_tokens, swap=swap or None)
    most = longest(model) if context is None else context
    proposed = _speculations(draft, acceptance, ahead)
    group = fleet.Group(graph, target(machine), own, devices, replicas, blocks, context=most, pipeline=pipeline, experts=experts,
                        speculation=proposed[0] if proposed else None)  # fmt: skip
    apart = fleet.Group(graph, target(prefill_machine or machine), own, devices, prefill, blocks) if prefill else None
    if autoscale:
        group = replace(group, scaling=Scaling(least, start_seconds=start_seconds(graph, group.machine, devices, autoscale)))

    def equipped(one: fleet.Group) -> fleet.Group:
        return replace(one, cap_watts=power_cap, host_bytes=host_cache * 1e9, disk_bytes=disk_cache * 1e9)

    group, apart = equipped(group), apart and equipped(apart)
    if prefill_also and not apart:
        raise NarrowsError("no replicas read prompts apart.", where="--prefill-also", remedy="Give --prefill.")
    if seeds > 1 and (seeds < 3 or load["trace"]):
        raise NarrowsError("a trace has no seed, and 2 loads are too few for an interval.", where="--seeds",
                           remedy="Give 3 or more, with --load or --rate.")  # fmt: skip
    if clients is not None and (clients < 1 or policy or flood or what_ifs or seeds > 1):
        raise NarrowsError("clients who wait for their answers set the rate themselves, once.", where="--clients",
                           remedy="Give 1 or more, without --policy, --saturation, --what-if and --seeds.")  # fmt: skip
    if clients and not load["trace"] and not load["named"]:
        load["rate"] = load["rate"] or 1.0  # lengths are what counts
    if policy and (apart or also):
        raise NarrowsError("a policy says itself where requests go.", where="--policy", remedy="Leave --prefill and --also out.")
    if policy:
        engine = f"{engine}, {policy}"
        group, apart = _as_published(policy, group, list(requests_of(**load)), (("ttft", ttft), ("tpot", tpot), ("tbt", tbt)))
    groups = (group, *(_further(text, group) for text in also))
    readers = (apart, *(_further(text, apart) for text in prefill_also)) if apart else None
    kept: list[Any] = []
    steady, watch = Steady(), Watch()

    def keep(answer: Any) -> None:
        steady.add(answer)
        if html:
            watch.add(answer)
        if chrome and len(kept) < KEPT:
            kept.append(answer)

    with progress("serving") as tell, interruptible() as stopped:
        asked_for = told(requests_of(**load), tell, stopped)
        if clients:
            found = fleet.clients(asked_for, groups, clients, ttft, tpot, keep, readers, ROUTES[route])
        else:
            found = fleet.serve(asked_for, groups, readers, ROUTES[route], ttft, tpot, keep)
        seeded = (requests_of(**load | {"seed": load["seed"] + i}) for i in range(1, seeds))
        others = [fleet.serve(told(one, tell, stopped), groups, readers, ROUTES[route]) for one in seeded if not stopped()]
    more: dict[str, Any] = {"interrupted": True} if stopped() else {}
    more["steady"] = steady.as_json()
    if seeds > 1 and not stopped():
        more["over_seeds"] = _over_seeds([found, *others])
    if flood:
        more["saturation_requests_per_s"] = asked.saturation(requests_of(**load), groups, readers)
    if what_ifs:
        more["what_if"] = asked.what_if(
            lambda one, other: fleet.serve(requests_of(**load), one, other, ROUTES[route]), groups, readers
        )
    if chrome:
        asked.timeline(kept).save_trace(Path(chrome))
        click.echo(f"wrote {chrome}", err=True)
    if html or not as_json:
        from narrows.report.serving import load_notes, place

        title, notes = place(graph.name, groups, readers, engine), load_notes(found, group, more)
    if html:
        from narrows.report.served import served

        write_file(html, served(found, watch, title, notes))
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cost = {"cpu_seconds": time.process_time() - started, "peak_rss_bytes": rss}
    if as_json:
        setting = {"model": graph.name, "machine": group.machine.name, "engine": engine, "blocks": group.room()}
        print_json({**setting, **found.as_json(), **more, **cost})
    else:
        from narrows.report.terminal import show_outcome

        show_outcome(found, title, console(), notes)
    if stopped():
        click.echo(f"Interrupted after {found.requests + found.rejected:,} requests; these were answered.", err=True)
        sys.exit(130)


def _speculations(draft: str | None, acceptance: float | None, ahead: tuple[int, ...]) -> "tuple[Speculation, ...]":
    """Every number of tokens ahead with a draft; nothing without one."""
    from narrows.capture import capture
    from narrows.simulate.speculation import Speculation

    if (draft is None) != (acceptance is None) or (ahead and not draft):
        raise NarrowsError("they go together.", where="--draft, --acceptance, --ahead",
                           remedy="Give a draft, and the share of its tokens that are kept.")  # fmt: skip
    if draft is None or acceptance is None:
        return ()
    graph = None if draft == "ngram" else capture(draft)
    return tuple(Speculation(many, acceptance, graph) for many in ahead or (3,))


def _further(text: str, like: "Group") -> "Group":
    """A group beside another one and like it, but for the machine and the options that a text names."""
    from narrows.search.deployments import OWN, served

    name, _, rest = text.partition(":")
    given = dict(option.partition("=")[::2] for option in (f"replicas={rest}" if rest.isdigit() else rest).split(",") if option)
    own = target(name)
    formats = {key: given.pop(key, OWN) for key in ("weights", "cache")}
    for key, value in given.items():
        if key not in FURTHER or not value.isdigit() or int(value) < 1:
            raise NarrowsError(f"{key}={value}.", where=f"--also {text}",
                               remedy=f"Give whole numbers from 1, or formats, for {', '.join(FURTHER)}.")  # fmt: skip
    sizes, rules = {key: int(value) for key, value in given.items()}, like.rules
    rules = replace(rules, max_sequences=sizes.pop("max_sequences", rules.max_sequences),
                    max_tokens=sizes.pop("max_tokens", rules.max_tokens))  # fmt: skip
    graph = served(like.graph, formats["weights"], formats["cache"], own)
    return replace(like, graph=graph, machine=own, rules=rules, **({"replicas": 1, "blocks": 0} | sizes))  # type: ignore[arg-type]


def _over_seeds(outcomes: list[Any]) -> dict[str, Any]:
    """95 % intervals of the means and the 99th percentiles over loads that differ in their seed alone."""
    from narrows.simulate.steady import student

    return {"seeds": len(outcomes)} | {
        f"{name}_s": {key: student([getattr(o, name).as_json()[key] for o in outcomes]) for key in ("mean", "p99")}
        for name in ("ttft", "tpot", "e2e")
    }


def _as_published(policy: str, group: Any, requests: list[Any], limits: tuple[tuple[str, float], ...]) -> tuple[Any, Any]:
    """The replicas, and those that read prompts apart, that a policy runs in place of a group; raises with its refusal."""
    from math import isfinite

    from narrows.plan import parse
    from narrows.simulate.demand import Demand, Objective
    from narrows.technique import No, Serves

    found = parse(policy)
    if not isinstance(found, Serves):
        raise NarrowsError(f"{policy} is no policy of serving.", where="--policy", remedy="`narrows papers` tells the faces.")
    kept = tuple(Objective(name, 0.99 if name == "tbt" else 0.9, s) for name, s in limits if isfinite(s))
    demand = Demand(group, tuple(requests), kept)
    if isinstance(verdict := found.check(demand), No):
        raise NarrowsError(f"{verdict.reason}.", where=policy, remedy="Change the load, the limits or the devices.")
    deployed = found.deploy(demand)
    return deployed.group, deployed.prefill


def requests_of(swing: float, ramp: float, turns: float = 1.0, think: float | None = None, words: float | None = None,
                **load: Any) -> Any:  # fmt: skip
    """The load that the options mean."""
    from narrows.simulate import sessions, workload

    if (turns != 1.0 or load.get("answers", 1) != 1) and load["trace"]:
        raise NarrowsError("a trace says itself how many turns and answers there are.", where="--turns, --answers",
                           remedy="Write session, turn, think and n in its rows, or give --load or --rate.")  # fmt: skip
    found = _even(**load) if ramp == 1.0 else workload.ramped(_even(**load), ramp)
    found = workload.swung(found, swing) if swing else found
    if turns == 1.0:
        return found
    like = sessions.Talks.like("mooncake-conversation")
    think, words = like.think if think is None else think, like.lengths.prompt if words is None else words
    lengths = replace(like.lengths, prompt=words) if load["named"] else workload.Lengths(
        words, load["output"], like.lengths.prompt_spread, load["spread"])  # fmt: skip
    return sessions.in_turns(found, sessions.Talks(turns, think, like.think_spread, lengths), load["seed"])


def _even(trace: str | None, named: str | None, rate: float | None, count: int | None, hours: float | None, prompt: float,
          output: float, spread: float, burst: float, seed: int, answers: int = 1) -> Any:  # fmt: skip
    from narrows.simulate import workload
    from narrows.simulate.step_times import PS

    if hours is not None and (trace or count):
        raise NarrowsError(
            "how many requests there are is known.", where="--hours", remedy="Give it with --load or --rate alone."
        )
    if hours is not None:
        count = max(round(hours * 3600 * (rate or (workload.mean_rate(named) if named else 0.0))), 1)
    if trace:
        if rate:
            every = list(workload.first(workload.read(trace), count) if count else workload.read(trace))
            span = (every[-1].arrival - every[0].arrival) / PS
            return workload.scaled(every, rate * span / max(len(every) - 1, 1)) if span else iter(every)
        found = workload.read(trace)
        return workload.first(found, count) if count else found
    if named:
        return workload.like(named, count or 0, rate or 0.0, seed, answers)
    if not rate:
        raise NarrowsError("there is no load.", where="simulate serve", remedy="Give --trace FILE, --load NAME or --rate NUMBER.")
    return workload.generate(rate, count or 1000, workload.Lengths(prompt, output, spread, spread), seed, burst, answers)


def told(requests: Any, tell: Any, stopped: Any = lambda: False) -> Any:
    """Requests as they pass until someone wants to stop, with a word of progress for every thousand."""
    for i, request in enumerate(requests):
        if stopped():
            return
        if i % 1000 == 0:
            tell(f"request {i:,}")
        yield request


FEWEST, MOST, LASTS = 1000, 4000, 30.0  # requests that a plan plays, and seconds that they should last
FORMATS = ["own", "fp8", "int8", "int4"]


@plan.command("serve")
@click.argument("model")
@click.option("--machines", "-m", multiple=True, required=True, metavar="NAME[:COUNT]",
              help="A machine with how many there are (default: 8), or a cluster; again for another kind.")  # fmt: skip
@load_options
@click.option("--ttft", default=float("inf"), help="Seconds to the first token that a request must keep.")
@click.option("--tpot", default=float("inf"), help="Seconds per further token that it must keep.")
@click.option("--share", default=0.9, show_default=True, help="Of the requests that must keep both.")
@click.option("--engine", default="vllm-v1", show_default=True, help="vllm-v1, vllm-v0, sglang or trtllm.")
@context_option
@click.option("--weights", multiple=True, type=click.Choice(FORMATS), help="Formats of weights to try (default: all).")
@click.option("--cache", multiple=True, type=click.Choice(FORMATS[:2]), help="Formats of keys and values to try (default: all).")
@speculation_options
@click.option("--split", type=click.Choice(["together", "apart", "both"]), default="both", show_default=True,
              help="Prompts are read beside decoding, apart from it, or try both.")  # fmt: skip
@click.option("--top", default=5, show_default=True, type=click.IntRange(min=1), help="How many to show.")
@click.option("--confirm", default=12, show_default=True, type=click.IntRange(min=0), help="How many to simulate.")
@click.option("--emit", "emitted", metavar="ENGINE", help="Print launch commands of the best: vllm or sglang.")
@click.option("--out", type=click.Path(dir_okay=False), help="Write the launch commands to a file (with --emit).")
@as_json_option
def plan_serve(model: str, machines: tuple[str, ...], ttft: float, tpot: float, share: float, engine: str,
               context: int | None, weights: tuple[str, ...], cache: tuple[str, ...], draft: str | None,
               acceptance: float | None, ahead: tuple[int, ...], split: str, top: int, confirm: int,
               emitted: str | None, out: str | None, as_json: bool, **load: Any) -> None:  # fmt: skip
    """The cheapest deployment of MODEL that serves a load within its limits, and why not others. Exit 1 if none does.

    The load is --trace or --rate; without --requests 1,000 are played, or half a minute of --rate up to 4,000. Ctrl-C
    shows what is known so far.
    """
    from narrows.capture import capture
    from narrows.capture.config import longest
    from narrows.search import serve as search
    from narrows.search.deployments import EVERY, Job, Space

    if not load["hours"]:
        load["count"] = load["count"] or max(FEWEST, min(round(LASTS * (load["rate"] or 0.0)), MOST))
    kinds, most = tuple(_kind(text) for text in machines), longest(model) if context is None else context
    requests = tuple(requests_of(**load))
    if any(request.then or request.also for request in requests):
        raise NarrowsError("sessions and several answers are not planned for.", where="plan serve",
                           remedy="Give single requests; play the best deployment with `narrows simulate serve`.")  # fmt: skip
    job = Job(capture(model), kinds, requests, ttft, tpot, share, engine, most,
              _speculations(draft, acceptance, ahead))  # fmt: skip
    space = Space(
        precision=weights or EVERY.precision,
        cache=cache or EVERY.cache,
        apart={"together": (False,), "apart": (True,), "both": EVERY.apart}[split],
    )
    with interruptible() as stopped:
        found = search.plan_serve(job, space, top, confirm, stopped)
    settings = None
    if emitted:
        from narrows.emit import emit_server

        if not found.best:
            raise NarrowsError("no deployment fits.", where="plan serve", remedy="Give more or larger devices.")
        settings = emit_server(emitted, found.best[0].config, model, context or 0)
    if settings and out:
        write_file(out, settings)
    if as_json:
        print_json({**search.as_json(found), **({"settings": settings} if settings else {})})
    elif settings and not out:
        click.echo(settings, nl=False)
    else:
        from narrows.report.terminal import show_serve_plan

        show_serve_plan(found, console())
    if stopped():
        sys.exit(130)
    if not any(choice.keeps for choice in found.best):
        sys.exit(1)


def _kind(text: str) -> "Kind":
    """Devices by name and number; a cluster has its own number of them, joined inside a node by its link."""
    from narrows.machine import HOST_LINKS, cluster, clusters, machine
    from narrows.search.deployments import Kind

    name, _, many = text.rpartition(":") if text.rpartition(":")[2].isdigit() else (text, "", "")
    if name.lower() in clusters():
        group = cluster(name)
        host = (way for way in group.machine.links if way.name in HOST_LINKS and way.name != group.scale_up.name)
        joined = replace(group.machine, links=(group.scale_up, *host), sources={})
        return Kind(joined, int(many or group.devices), group.devices_per_node)
    return Kind(machine(name), int(many or 8))
