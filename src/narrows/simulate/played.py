"""A training layout played pass by pass on the schedule engine: what each stage runs when, and what it holds meanwhile."""

from collections.abc import Callable

from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.layout import RECOMPUTE, SCHEDULES, Layout
from narrows.machine import Cluster
from narrows.simulate.memory import constants as memory_constants
from narrows.simulate.memory import memory
from narrows.simulate.network import NONE, Axes, Network, Part, Place, constants, network
from narrows.simulate.orders import gpipe, interleaved
from narrows.simulate.pipeline import Order, Pass, Work
from narrows.simulate.planned import v_shaped, zero_bubble
from narrows.simulate.timeline import Timeline
from narrows.simulate.training import message_seconds, spent
from narrows.site import Site

V_SHAPED = {"zb-v": "zero", "v-half": "half", "v-min": "min"}


def stages_of(layout: Layout) -> int:
    """Stages of the model, of which a V puts two on each rank, and interleaving several."""
    return layout.pipeline * (2 if layout.schedule in V_SHAPED else layout.chunks)


def rank_of(layout: Layout, stage: int) -> int:
    """Which rank of the pipeline has a stage of the model: they go round, or to and fro in a V."""
    back = layout.schedule in V_SHAPED and stage >= layout.pipeline
    return 2 * layout.pipeline - 1 - stage if back else stage % layout.pipeline


def layers_of(layout: Layout, layers: int) -> list[float]:
    """How many of its layers each stage of a model has; where embedding and output count as a layer each, the ends have fewer."""
    parts, counted = stages_of(layout), int(layout.balance == "layers")
    if layout.layers:
        return [layout.split[rank_of(layout, at)] * layout.pipeline / parts for at in range(parts)]
    return [(layers + 2 * counted) / parts - counted * ((at == 0) + (at == parts - 1)) for at in range(parts)]


def work(net: Network, layout: Layout, framework: str = "") -> Work:
    """What one step asks of the pipeline: seconds and bytes of a microbatch in each of its parts, first to last.

    Collectives and the host's launches are shared between forward and backward pass as the ledger's causes say: half of
    what is sent, and a third of the launches, belong to the forward pass. Raises NarrowsError for `Layout.shares`.
    """
    if layout.shares:
        raise NarrowsError(
            "replicas of one stage are not alike.", where="layout: shares", remedy="Play a pipeline, or no shares."
        )
    axes, parts = Axes.of(layout), stages_of(layout)
    sustained, redo = constants(framework)["sustained"], RECOMPUTE.index(layout.recompute)

    def seconds(name: str, stage: int, layers: float) -> tuple[float, float, float]:
        """Forward, inputs, weights of so many layers, or of an end, on the slowest devices of a stage."""
        places = [place for place in net.places if rank_of(layout, stage) in place.stages]
        return max((there(place, getattr(place, name), layers) for place in places), key=sum)

    def there(place: Place, part: Part, layers: float) -> tuple[float, float, float]:
        causes = spent(part, place.cluster, layout, axes, framework, place.layers).causes
        sent = causes["tensor"] + causes["context"] + causes["expert"]
        forward = causes["forward"] + sent / 2 + causes["launch"] / 3
        weights = part.weights[0] * sustained
        inputs = causes["backward"] - weights + causes["recompute"] + sent / 2 + causes["launch"] * 2 / 3
        return layers * float(forward), layers * float(inputs), layers * float(weights)

    deep = layers_of(layout, net.layers)
    rows = [seconds("layer", stage, layers) for stage, layers in enumerate(deep)]
    held = [layers * float(net.layer.saved[redo, 0]) for layers in deep]
    for name, at in (("first", 0), ("last", parts - 1)):
        shared = range(parts) if layout.balance == "vocabulary" else [at]
        for place in shared:
            more = seconds(name, place, 1 / len(shared))
            rows[place] = tuple(a + b for a, b in zip(rows[place], more, strict=True))  # type: ignore[assignment]
            held[place] += float(getattr(net, name).saved[NONE, 0]) / len(shared)
    forward, inputs, weights = zip(*rows, strict=True)
    message = max((float(message_seconds(net, on, layout, axes, framework)) for on, _ in net.hops), default=0.0)
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


def played(
    graph: Graph, cluster: Cluster | Site, layout: Layout, sequence: int, framework: str = ""
) -> tuple[Timeline, Order, Work]:
    """The pipeline of one replica as it runs, one lane for each stage's devices, with its order and its work."""
    asked = work(network(graph, cluster, layout, sequence, framework=framework), layout, framework)
    chosen = order(layout, asked)
    return chosen.play(asked), chosen, asked


def held_over_time(
    graph: Graph, cluster: Cluster | Site, layout: Layout, sequence: int, framework: str = ""
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
