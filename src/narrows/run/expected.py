"""What a run is expected to do: its order of passes, the bytes that all ranks send, and the seconds of a step on this machine."""

from collections import defaultdict
from dataclasses import dataclass, replace

from narrows.backward import training
from narrows.capture.config import from_config
from narrows.cost import cost
from narrows.costmodel import op_time
from narrows.free import cast
from narrows.graph import DTYPES, Graph, Op
from narrows.kinds import COLLECTIVES
from narrows.layout import Layout
from narrows.machine import Machine
from narrows.parallel import boxing, context_parallel, expert_parallel, is_layer, layer_count, over, tensor_parallel
from narrows.run.job import Run
from narrows.simulate.network import WEIGHT_SHARE
from narrows.simulate.pipeline import Order, Work
from narrows.simulate.played import V_SHAPED, layers_of, stages_of
from narrows.simulate.played import order as planned
from narrows.step import Step


def order_of(layout: Layout) -> Order:
    """Which passes each rank runs, in turn, where all stages are equal and a backward pass takes twice a forward pass."""
    return planned(layout, Work.of(stages_of(layout), layout.accumulate))


def graph_of(run: Run) -> Graph:
    """What one device does in a step, all of its pipeline's stages together, and all that it sends.

    Ops of phase `update` are there once a step, the others once a microbatch. FSDP gathers weights forward (and backward,
    with shard 3) and scatters gradients, a microbatch; a pipeline's runtime does so once a step.
    """
    layout = run.layout
    whole = expert_parallel(cast(from_config(run.model, "run"), DTYPES[run.dtype]), layout.expert)
    graph = training(tensor_parallel(whole, layout.tensor, layout.sequence))
    graph = context_parallel(graph, layout.context, layout.context_by)
    own = [*_once_more(graph, layout), *_exchanged(graph, layout), *_handed_on(graph, run)]
    share = 1 / layout.data if layout.shard else 1  # of the parameters that this device updates
    held = [op.but(elements=op["elements"] * share) if op.kind == "optimizer" else op for op in graph]
    return replace(graph, ops=(*held, *own), eager=True)


def step_of(run: Run) -> Step:
    """The part of a microbatch that one device has: of a ring, its average member, which meets half of the others' keys."""
    ways = run.layout.context
    return Step(run.layout.microbatch, run.sequence // ways, (ways - 1) * run.sequence // (2 * ways), phase="train")


def _once_more(graph: Graph, layout: Layout) -> list[Op]:
    """What the backward pass computes, and sends, again."""
    deep = layer_count(graph)
    layers = [int(layers) for layers in layers_of(layout, deep)]
    again = sum(min(layout.recompute_layers or many, many) for many in layers)
    summed = [op.name for op in graph.forward if op.kind in COLLECTIVES and is_layer(op) and over(op) == "tensor"]
    if layout.recompute == "full":  # a layer stops before the sum at its end: nothing behind it was kept
        found = [op for op in graph.forward if is_layer(op) and op.name not in summed[-1:]]
        return [replace(op, phase="recompute", repeat=op.repeat * again // deep) for op in found]
    return [replace(op, phase="recompute") for op in graph.find("attention") if layout.recompute == "selective"]


def _exchanged(graph: Graph, layout: Layout) -> list[Op]:
    """The sums of gradients of what ranks hold alike, or FSDP's gathering of weights and scattering of gradients."""
    replicas, found = layout.data * layout.context, list[Op]()
    experts = sum(op.parameters for op in graph.forward if op.kind == "expert")
    dense = sum(op.parameters for op in graph.forward) - experts
    for what, count, ranks in (("gradients", dense, replicas), ("experts' gradients", experts, replicas // layout.expert)):
        if count and ranks > 1 and not layout.shard:  # one sum of all gradients, which are copied together and apart again
            found += [_exchange(what, boxing("partial", "whole"), graph, count, ranks), _copy(graph, count, 2)]
    if layout.shard:
        parts, often = layer_count(graph) + 1, layout.accumulate if layout.pipeline == 1 else 1
        gathers = often * (2 if layout.shard == 3 and layout.pipeline == 1 else 1)
        for what, kind, times in (("weights", boxing("rows", "whole"), gathers), ("gradients", boxing("partial", "rows"), often)):
            found += [_exchange(what, kind, graph, dense / parts, layout.data, times * parts), _copy(graph, dense, times)]
    return found


def _handed_on(graph: Graph, run: Run) -> list[Op]:
    """The messages from stage to stage of a step, forward and backward."""
    layout = run.layout
    hops = stages_of(layout) - 1 - (layout.schedule in V_SHAPED)  # at the foot of a V a rank hands on to itself
    stream = layout.microbatch * run.sequence // layout.context * run.model["hidden_size"]
    share = layout.tensor if layout.sequence else 1
    return [_exchange("stream", "send", graph, stream / share, 2, 2 * hops * layout.accumulate)] if hops > 0 else []


def _exchange(what: str, kind: str, graph: Graph, elements: float, ranks: int, times: int = 1) -> Op:
    return Op(what, kind, {"elements": elements, "ranks": ranks}, act=graph.ops[0].act, phase="update", repeat=times)


def _copy(graph: Graph, elements: float, times: int) -> Op:
    dims = {"elements": elements, "reads": elements, "flop_per_element": 0, "weights": 0}
    return Op("copies", "elementwise", dims, act=graph.ops[0].act, phase="update", repeat=times)


def predicted_bytes(run: Run) -> dict[str, float]:
    """Bytes that all ranks together send in a step, by kind of collective, as the graph says."""
    layout, step, found = run.layout, step_of(run), defaultdict[str, float](float)
    lines = layout.devices // layout.pipeline  # that hold the whole model together
    for op in graph_of(run):
        if op.kind in COLLECTIVES:
            often = 1 if op.phase == "update" else layout.accumulate
            found[op.kind] += float(cost(op, step).link_bytes) * often * lines
    return dict(found)


@dataclass(frozen=True)
class Seconds:
    """A step, and of it what the busiest rank computes and waits for a core; in the rest it exchanges and waits for others."""

    step: float
    busy: float
    queued: float

    @property
    def exchange(self) -> float:
        return self.step - self.busy - self.queued


@dataclass(frozen=True)
class Forecast:
    """A step of a layout on a machine: seconds, and both ends of their 80 % interval."""

    median: Seconds
    low: Seconds
    high: Seconds


def forecast(run: Run, machine: Machine, cores: int, host: float = 0.0) -> Forecast:
    """The step of a run whose ranks are `cores` threads of a machine like this one, and meet over its link.

    The order of passes is played with the seconds of the graph's ops; a processor computes, sends and updates one after
    the other. Where there are more ranks than cores, no step is shorter than what all of them compute, spread over the cores.
    `host` is what the runtime adds to each rank's step, in seconds, whatever its sizes are.
    """
    graph, step = graph_of(run), step_of(run)
    timed = [(op, op_time(op, step, machine, eager=True)) for op in graph]
    return Forecast(*(
        _played(run, cores, host, [(op, float(getattr(time, end))) for op, time in timed]) for end in ("seconds", "low", "high")
    ))  # fmt: skip


def _played(run: Run, cores: int, host: float, times: list[tuple[Op, float]]) -> Seconds:
    layout = run.layout
    parts, deep = stages_of(layout), layers_of(layout, run.model["num_hidden_layers"])
    first = next(i for i, (op, _) in enumerate(times) if is_layer(op))
    ahead = {op.name for op, _ in times[:first]}
    shares = [[layers / sum(deep) for layers in deep], [float(at == 0) for at in range(parts)],
              [float(at == parts - 1) for at in range(parts)]]  # fmt: skip
    added = host * layout.pipeline / parts / layout.accumulate  # to one microbatch in one part; a third of it forward
    seconds = {"F": [added / 3] * parts, "I": [added * 2 / 3] * parts, "W": [0.0] * parts}
    computed = [added] * parts
    ending = ending_busy = exchanged = message = 0.0
    for op, whole in times:
        exchange, once = op.kind in COLLECTIVES, op.phase == "update"
        exchanged += exchange * whole * (1 if once else layout.accumulate) / layout.pipeline
        if op.kind == "send" and once:
            message = whole / op.repeat
        elif once:
            ending += whole / layout.pipeline
            ending_busy += whole / layout.pipeline * (not exchange)
        else:
            weights = whole * WEIGHT_SHARE if op.phase == "backward" and op.weight is not None and op.spec.matmul else 0.0
            for at, share in enumerate(shares[0 if is_layer(op) else 1 if op.name in ahead else 2]):
                seconds["F" if op.phase == "forward" else "I"][at] += share * (whole - weights)
                seconds["W"][at] += share * weights
                computed[at] += share * whole * (not exchange)
    order = order_of(layout)
    busy = [ending_busy] * layout.pipeline
    for at, own in enumerate(computed):
        busy[order.placement[at]] += own * layout.accumulate
    work = Work.of(parts, layout.accumulate, seconds["F"], seconds["I"], seconds["W"], message)
    free = order.play(work).seconds + ending  # where each rank has a core to itself
    crowded = sum(busy) * (layout.devices // layout.pipeline) / cores + exchanged if layout.devices > cores else 0.0
    return Seconds(max(free, crowded), max(busy), max(0.0, crowded - free))
