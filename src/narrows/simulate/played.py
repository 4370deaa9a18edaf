"""A training layout played pass by pass on the schedule engine: what each stage runs when, and what it holds meanwhile."""

from collections.abc import Callable

from narrows.graph import Graph
from narrows.layout import RECOMPUTE, SCHEDULES, Layout
from narrows.machine import Cluster
from narrows.simulate.memory import NONE, memory
from narrows.simulate.memory import constants as memory_constants
from narrows.simulate.orders import gpipe, interleaved
from narrows.simulate.pipeline import Order, Pass, Work
from narrows.simulate.planned import v_shaped, zero_bubble
from narrows.simulate.timeline import Timeline
from narrows.simulate.training import Axes, Network, Part, constants, message_seconds, network, spent

V_SHAPED = {"zb-v": "zero", "v-half": "half", "v-min": "min"}


def work(net: Network, cluster: Cluster, layout: Layout, framework: str = "") -> Work:
    """What one step asks of the pipeline: seconds and bytes of a microbatch in each of its parts, first to last.

    Collectives and the host's launches are shared between forward and backward pass as the ledger's causes say: half of
    what is sent, and a third of the launches, belong to the forward pass.
    """
    axes, parts = Axes.of(layout), layout.pipeline * (2 if layout.schedule in V_SHAPED else layout.chunks)
    sustained, redo = constants(framework)["sustained"], RECOMPUTE.index(layout.recompute)

    def seconds(part: Part, layers: float) -> tuple[float, float, float]:
        causes = spent(part, cluster, layout, axes, framework, net.layers / layout.pipeline).causes
        sent = causes["tensor"] + causes["context"] + causes["expert"]
        forward = causes["forward"] + sent / 2 + causes["launch"] / 3
        weights = part.weights[0] * sustained
        inputs = causes["backward"] - weights + causes["recompute"] + sent / 2 + causes["launch"] * 2 / 3
        return layers * float(forward), layers * float(inputs), layers * float(weights)

    deep = [net.layers / parts] * parts
    if layout.balance == "layers":
        deep = [(net.layers + 2) / parts - (at == 0) - (at == parts - 1) for at in range(parts)]
    rows = [seconds(net.layer, layers) for layers in deep]
    held = [layers * float(net.layer.saved[redo, 0]) for layers in deep]
    for part, at in ((net.first, 0), (net.last, parts - 1)):
        shared = range(parts) if layout.balance == "vocabulary" else [at]
        for place in shared:
            more = seconds(part, 1 / len(shared))
            rows[place] = tuple(a + b for a, b in zip(rows[place], more, strict=True))  # type: ignore[assignment]
            held[place] += float(part.saved[NONE, 0]) / len(shared)
    forward, inputs, weights = zip(*rows, strict=True)
    message = float(message_seconds(net, cluster, layout, axes, framework))
    return Work.of(parts, layout.accumulate, forward, inputs, weights, message, held)


def order(layout: Layout, asked: Work) -> Order:
    """The order of a layout's schedule; zero-bubble orders are planned for the work within the memory they are known for."""
    ranks, many = layout.pipeline, layout.accumulate
    fixed: dict[str, Callable[[], Order]] = {
        "1f1b": lambda: interleaved(ranks, many, layout.chunks),
        "gpipe": lambda: gpipe(ranks, many),
    }
    if layout.schedule in fixed:
        return fixed[layout.schedule]()
    if layout.schedule in V_SHAPED:
        return v_shaped(asked, shape=V_SHAPED[layout.schedule])
    return zero_bubble(asked, max(asked.held_bytes[:-1] or asked.held_bytes) * SCHEDULES[layout.schedule].held(ranks, 1, many, 0))


def played(graph: Graph, cluster: Cluster, layout: Layout, sequence: int, framework: str = "") -> tuple[Timeline, Order, Work]:
    """The pipeline of one replica as it runs, one lane for each stage's devices, with its order and its work."""
    asked = work(network(graph, cluster, layout, sequence, framework=framework), cluster, layout, framework)
    chosen = order(layout, asked)
    return chosen.play(asked), chosen, asked


def held_over_time(
    graph: Graph, cluster: Cluster, layout: Layout, sequence: int, framework: str = ""
) -> dict[int, list[tuple[float, float]]]:
    """For each stage the bytes of one of its devices as they change over a step: (seconds, bytes from then on).

    Weights, gradients, optimizer states, buffers and the runtime's own are there throughout; activations come and go with
    the passes, and each backward pass works in as much again as `Memory.working` says.
    """
    timeline, chosen, asked = played(graph, cluster, layout, sequence, framework)
    net, axes, place = network(graph, cluster, layout, sequence, framework=framework), Axes.of(layout), chosen.placement
    found: dict[int, list[tuple[float, float]]] = {}
    for rank in range(layout.pipeline):
        parts = memory(net, layout, axes, rank, framework)
        lost = 1 + memory_constants(framework)["margin"]
        level = float(parts.weights + parts.gradients + parts.optimizer + parts.buffers) * lost + float(parts.runtime)
        changes: list[tuple[float, float]] = []
        for span in timeline.spans:
            one = span.name
            if isinstance(one, Pass) and place[one.stage] == rank:
                takes, frees = asked.changes_bytes(one.kind, one.stage)
                working = float(parts.working) * (one.kind in "BI")
                changes += [(span.start, (takes + working) * lost), (span.end, -(frees + working) * lost)]
        levels = [(0.0, level)]
        for at, change in sorted(changes):  # at one moment, what is freed goes first
            level += change
            levels.append((at, level))
        found[rank] = levels
    return found
