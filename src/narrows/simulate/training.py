"""One step of training a graph on many devices, in closed form, split into causes that add up to it.

    step = microbatches x slowest stage + bubble + pipeline messages + exchange of gradients and weights + optimizer + host

A stage takes what its layers take forward, backward and, where activations are recomputed, forward again, with the
collectives of its tensor, context and expert groups; the device waits where the host launches more slowly than it
computes. What a layout leaves equal (`Network`) is found once; the rest works on numbers and on arrays (`Axes`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np

from narrows.backward import training
from narrows.costmodel import ATTENTION, achieved, fitted, op_seconds
from narrows.errors import NarrowsError
from narrows.graph import DType, Graph, Op, at
from narrows.kinds import COLLECTIVES
from narrows.layout import RECOMPUTE, SCHEDULES, Layout
from narrows.machine import HOST_LINKS, Cluster, Link, Machine
from narrows.parallel import boxing, context_parallel, expert_parallel, is_layer, layer_count, over, tensor_parallel
from narrows.step import Step

# Of a logit, beside its probability in fp32: itself in 16 bits, and in fp32 less the largest and as an exponential, as
# Megatron-LM's and DeepSpeed's cross entropy hold them at once.
LOSS_BYTES = 10
WEIGHT_SHARE = 0.5  # of a product's backward pass: gradients of weights and of inputs are one product of the same size each
STATES = 3  # numbers of 4 bytes that the optimizer keeps for a parameter: master copy and two moments


@dataclass(frozen=True, slots=True)
class Part:
    """What the average layer, or an end of the network, needs of one device for one microbatch; arrays over its sizes.

    forward, backward   seconds of kernels, K;  weights   of the backward ones, what gradients of weights take, K
    again               seconds of the forward pass that is redone, with its collectives that show, RECOMPUTE x K
    wire                seconds of collectives both ways that show, by dimension, K;  hidden   of those behind attention, K
    launches            of the host, RECOMPUTE;  saved   bytes kept for the backward pass, RECOMPUTE x K
    largest             bytes that the op with most of them reads and writes, K
    owned, experts      parameters outside of experts and of experts;  tied   those that belong to another part
    """

    forward: Any
    backward: Any
    weights: Any
    again: Any
    wire: dict[str, Any]
    hidden: Any
    launches: Any
    saved: Any
    largest: Any
    owned: float
    experts: float
    tied: float


@dataclass(frozen=True, slots=True)
class Network:
    """A graph cut for one device: its average layer and what comes before and after, for each of K sizes of a microbatch.

    stream   bytes of the residual stream that one stage hands to the next, K
    """

    layer: Part
    first: Part
    last: Part
    layers: int
    stream: Any
    dtype: DType


@dataclass(frozen=True, slots=True)
class Axes:
    """What a layout leaves open for arrays: places in a Network's microbatch sizes, their number a step, and the like."""

    size: Any
    accumulate: Any
    chunks: Any
    shard: Any
    redo: Any

    @classmethod
    def of(cls, layout: Layout) -> "Axes":
        """Those of one layout, whose network has one size of microbatch."""
        return cls(0, layout.accumulate, layout.chunks, layout.shard, RECOMPUTE.index(layout.recompute))

    def at(self, chosen: Any) -> "Axes":
        """Those at the chosen places."""
        return Axes(*(getattr(self, f.name)[chosen] for f in fields(self)))


def constants(framework: str = "") -> dict[str, float]:
    """The fitted constants of training, with those of a framework (`deepspeed`, `fsdp`) in their place where it has its own.

    sustained   factor on a device's time over a step, against kernels timed alone
    launch      host time of an operator, in launches of the machine;  norm  how sharply the slower of host and device wins
    network     share of the bandwidth between nodes;  pipeline  share of a stage's messages that is not hidden
    message_us  host time of a message;  step_ms  of a step
    exposed     share of an exchange beside the computation by which the two slow each other
    """
    tables = (fitted()["training"], fitted().get(f"training-{framework}", {}))
    return {name: entry["median"] for table in tables for name, entry in table.items()}


def network(
    graph: Graph, cluster: Cluster, layout: Layout, sequence: int, microbatches: Iterable[int] = (), framework: str = ""
) -> Network:
    """The graph as one device of a layout sees it, for these sizes of a microbatch (default: the layout's own)."""
    share, stride = constants(framework)["network"], layout.tensor * layout.context
    groups = {"tensor": (1, layout.tensor), "context": (layout.tensor, layout.context), "expert": (stride, layout.expert)}
    wires = tuple((name, wire(cluster, *group, share)) for name, group in groups.items())
    cut = (layout.tensor, layout.sequence, layout.context, layout.context_by, layout.expert)
    return _parts(graph, cluster.machine, wires, cut, tuple(microbatches) or (layout.microbatch,), sequence)


@lru_cache(maxsize=4096)
def _parts(
    graph: Graph,
    machine: Machine,
    wires: tuple[tuple[str, Machine], ...],
    cut: tuple[int, bool, int, str, int],
    microbatches: tuple[int, ...],
    sequence: int,
) -> Network:
    tensor, by_tokens, context, by, expert = cut
    whole = context_parallel(training(expert_parallel(tensor_parallel(graph, tensor, by_tokens), expert)), context, by)
    # the average member of a ring has its share of the queries, and meets half of the keys of the others
    many = np.array(microbatches, dtype=np.float64)[:, None]
    step = Step(many, sequence // context, (context - 1) * sequence // (2 * context), phase="train")
    inside = [op for op in graph.forward if is_layer(op)]
    deep = layer_count(graph) or 1
    ahead = {op.name for op in graph.forward[: graph.forward.index(inside[0])]} if inside else set()
    ops: dict[str, list[Op]] = {"layer": [], "first": [], "last": []}
    for op in whole:
        if op.kind != "checkpoint" and op.phase != "update":
            own = op.name.partition(" ")[0]
            ops["layer" if is_layer(op) else "first" if own in ahead else "last"].append(op)
    on = dict(wires)
    width = inside[0].spec.reads(inside[0].sized(step)) if inside else step["tokens"]
    stream = np.broadcast_to(width * graph.ops[0].act.bits / 8, many.shape[:1])
    parts = {name: _part(some, machine, on, step, deep if name == "layer" else 1) for name, some in ops.items()}
    kept = stream / (tensor if by_tokens else 1)
    parts["layer"].saved[RECOMPUTE.index("full")] = kept if inside else 0.0
    return Network(parts["layer"], parts["first"], parts["last"], deep, stream, graph.ops[0].act)


def _part(ops: list[Op], machine: Machine, wires: dict[str, Machine], step: Step, layers: int) -> Part:
    many = np.size(step["tokens"])
    zero = np.zeros(many)
    forward, backward, weights, largest = (zero.copy() for _ in range(4))
    again, saved = np.zeros((3, many)), np.zeros((3, many))
    wire, launches = {name: zero.copy() for name in wires}, np.zeros(3)
    sends, covers = {"forward": zero.copy(), "backward": zero.copy()}, {"forward": zero.copy(), "backward": zero.copy()}
    core = {op.name for op in ops if op.kind in ATTENTION or (op.kind == "matmul" and op.split == "heads")}
    owned = experts = tied = 0.0
    for op in ops:
        exchange, back = op.kind in COLLECTIVES, op.phase != "forward"
        seconds = op_seconds(op, step, wires[over(op)] if exchange else machine) / layers
        count = op.repeat / layers
        if exchange:
            wire[over(op)] += seconds
        elif back:
            backward += seconds
            weights += seconds * WEIGHT_SHARE * (op.weight is not None and op.spec.matmul)
        else:
            forward += seconds
        if op.kind == "send":
            sends[op.phase] += seconds
        elif op.kind in ATTENTION:
            covers[op.phase] += seconds
        launches += count * (2 if back else 1)
        if back:
            continue
        inner = op.name in core or op.name.rpartition(".")[0] in core
        redone = np.array([False, inner and not exchange, True])
        launches += count * redone
        again += redone[:, None] * seconds
        kept = np.array([1, not (inner and op.kind == "elementwise"), 0])
        saved += kept[:, None] * at(op.saved, step) * (op.act.bits / 8 * count)
        dims = op.sized(step)
        touched = (
            op.spec.reads(dims) * LOSS_BYTES
            if op.name == "loss"
            else (op.spec.reads(dims) + op.spec.writes(dims)) * (op.act.bits / 8)
        )
        largest = np.maximum(largest, touched)
        owned += op.parameters / layers * (op.kind != "expert")
        experts += op.parameters / layers * (op.kind == "expert")
        tied += op.spec.parameters(dict(op.dims)) * count * bool(op.tied)
    behind = {phase: np.minimum(sends[phase], covers[phase]) for phase in sends}
    hidden = sum(behind.values(), zero)
    wire["context"] = wire["context"] - hidden
    again[RECOMPUTE.index("full")] -= behind["forward"]
    return Part(forward, backward, weights, again, wire, hidden, launches, saved, largest, owned, experts, tied)


def wire(cluster: Cluster, stride: int, ranks: int, share: float = 1.0, members: int = 0) -> Machine:
    """The machine as a group of `ranks` sees it whose members lie `stride` devices apart.

    Between nodes, each member of the group in a node brings one network card (`members`, where it is not all of them).
    """
    link, out = cluster.scale_up, cluster.scale_out
    if stride * ranks > cluster.devices_per_node:
        if out is None:
            problem = f"{stride * ranks} devices do not fit a node of {cluster.devices_per_node}, and no link joins nodes."
            raise NarrowsError(problem, where=f"{cluster.name}: scale_out", remedy="Give the cluster a scale_out link.")
        members = members or max(1, cluster.devices_per_node // stride)
        speed = min(link.bandwidth_bytes_per_s, out.bandwidth_bytes_per_s * share * members)
        link = Link(out.name, speed, out.latency_seconds)
    machine = cluster.machine
    if machine.links[:1] == (link,):
        return machine
    rest = tuple(way for way in machine.links if way.name in HOST_LINKS and way.name != link.name)
    return replace(machine, links=(link, *rest), sources={})


def _seconds(kind: str, elements: float, ranks: int, dtype: DType, on: Machine) -> float:
    if ranks == 1:
        return 0.0
    return float(op_seconds(Op(kind, kind, {"elements": elements, "ranks": ranks}, act=dtype), Step.train(1, 1), on))


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of a part of the network for the chosen sizes: by cause, and the whole with what the host adds."""

    causes: dict[str, Any]
    whole: Any


def spent(part: Part, cluster: Cluster, layout: Layout, axes: Axes, framework: str = "", deep: float = 1.0) -> Spent:
    """What a part takes for one microbatch; `deep` layers of its kind make a stage, of which some may be recomputed."""
    c, machine = constants(framework), cluster.machine
    redone = min(1.0, layout.recompute_layers / deep) if layout.recompute_layers else 1.0
    causes = {"forward": part.forward[axes.size], "backward": part.backward[axes.size],
              "recompute": part.again[axes.redo, axes.size] * redone,
              **{name: seconds[axes.size] for name, seconds in part.wire.items()}}  # fmt: skip
    causes["context"] = causes["context"] + c["exposed"] * part.hidden[axes.size]
    causes = {name: seconds * c["sustained"] for name, seconds in causes.items()}
    device = sum(causes.values())
    host = part.launches[axes.redo] * machine.launch_seconds * achieved(machine, "launch").median * c["launch"]
    whole = (device ** c["norm"] + host ** c["norm"]) ** (1 / c["norm"])
    return Spent({**causes, "launch": whole - device}, whole)


def hidden_behind(exchange: Any, busy: Any, exposed: float) -> Any:
    """What shows of an exchange beside a computation: what is longer, and of the rest the share by which the two interfere."""
    return np.maximum(exchange - busy, 0.0) + exposed * np.minimum(exchange, busy)


def ledger(net: Network, cluster: Cluster, layout: Layout, axes: Axes, framework: str = "") -> dict[str, Any]:
    """Seconds of a step by cause, each a number or an array over `axes`; their sum is the step.

    forward, backward, recompute, launch (the device waits for the host), tensor, context, expert (collectives that
    show), of the slowest stage; ends (what embedding and output add to it), bubble, pipeline (messages), gradients
    (exchange of gradients and weights that shows), optimizer, offload, host (fixed time of a step).
    """
    c, stages, many, deep = constants(framework), layout.pipeline, axes.accumulate, net.layers / layout.pipeline
    layer, first, last = (spent(part, cluster, layout, axes, framework, deep) for part in (net.layer, net.first, net.last))
    stage = deep * layer.whole
    slowest = {
        "none": stage + (np.maximum(first.whole, last.whole) if stages > 1 else first.whole + last.whole),
        "layers": _evened(net.layers, stages, layer.whole, last.whole),
        "vocabulary": stage + (first.whole + last.whole) / stages,
    }[layout.balance]
    order = SCHEDULES[layout.schedule]
    left = np.maximum(order.bubble, 1 - many / (2 * stages - 1)) if order.bubble < 1 else 1.0
    busy = many * slowest
    return {
        **{cause: many * deep * seconds for cause, seconds in layer.causes.items()},
        "ends": many * (slowest - stage),
        "bubble": left * (stages - 1) / axes.chunks * stage,
        "pipeline": 2 * axes.chunks * (many + stages - 1) * (stages > 1) * message_seconds(net, cluster, layout, axes, framework),
        **_updates(net, cluster, layout, axes, c, slowest, busy),
        "host": c["step_ms"] * 1e-3 + 0.0 * many,
    }


def _evened(layers: int, stages: int, each: Any, last: Any) -> Any:
    """Seconds of the slowest stage where as many whole layers as serve best are moved from the last one to the others."""
    if stages == 1:
        return layers * each + last
    kept = range(-(-layers // stages) + 1)
    ways = [np.maximum(-(-(layers - few) // (stages - 1)) * each, few * each + last) for few in kept]
    return np.minimum.reduce(ways)


def message_seconds(net: Network, cluster: Cluster, layout: Layout, axes: Axes, framework: str = "") -> Any:
    """What shows of one message from a stage to the next; each device of a tensor group sends its share of it."""
    c, stride = constants(framework), layout.tensor * layout.context * layout.data
    if layout.pipeline == 1:
        return 0.0
    on = wire(cluster, stride, layout.pipeline, c["network"], members=1)
    sizes = net.stream / (net.dtype.bits / 8) / layout.tensor
    once = np.array([_seconds("send", float(size), 2, net.dtype, on) for size in sizes])[axes.size]
    return once * c["pipeline"] + c["message_us"] * 1e-6


def owned(net: Network, layout: Layout) -> tuple[float, float]:
    """Parameters of the device that has most of them: outside of experts, and of experts."""
    ends = (net.first.owned, net.last.owned + net.last.tied * (layout.pipeline > 1))
    most = max(ends) if layout.pipeline > 1 and layout.balance != "vocabulary" else sum(ends)
    spread = layout.pipeline if layout.balance == "vocabulary" else 1
    return net.layers / layout.pipeline * net.layer.owned + most / spread, net.layers / layout.pipeline * net.layer.experts


def _updates(
    net: Network, cluster: Cluster, layout: Layout, axes: Axes, c: dict[str, float], slowest: Any, busy: Any
) -> dict[str, Any]:
    """Seconds that exchanging gradients and weights, the optimizer, and what is offloaded take or show."""
    many, shard, machine = axes.accumulate, axes.shard, cluster.machine
    gradient, replicas = DType("gradient", layout.gradient_bits), layout.data * layout.context
    dense, experts = owned(net, layout)
    reduce = scatter = gather = 0.0
    parameters, update = np.zeros(2), np.zeros(2)  # of a device that has all of a replica's, and its share of them
    for count, ranks, stride in (
        (dense, replicas, layout.tensor),
        (experts, replicas // layout.expert, layout.tensor * layout.expert),
    ):
        if count:
            on = wire(cluster, stride, ranks, c["network"])
            reduce += _seconds(boxing("partial", "whole"), count, ranks, gradient, on)
            scatter += _seconds(boxing("partial", "rows"), count, ranks, gradient, on)
            gather += _seconds(boxing("rows", "whole"), count, ranks, net.dtype, on)
            parameters += (count, count / ranks)
            update += [_update(number, net.dtype, machine) for number in (count, count / ranks)]
    # DDP; ZeRO-1; ZeRO-2 and 3 scatter every microbatch's gradients, and 3 gathers weights before each use of them
    exchange = np.choose(shard, [reduce, scatter + gather, many * scatter + gather, many * (scatter + 2 * gather)])
    if layout.overlap:
        exchange = hidden_behind(exchange, np.where(shard >= 2, busy, slowest), c["exposed"])
    split = (np.asarray(shard) >= 1).astype(int)
    offload = 0.0 * many
    if layout.offload != "none":
        speed = outside_bytes_per_s(machine, layout.offload_to)
        if layout.offload != "activations":  # states come in while those of other parameters go out
            offload = offload + parameters[split] * (4 * STATES / speed)
        if layout.offload != "optimizer":
            kept = many * net.layers / layout.pipeline * net.layer.saved[axes.redo, axes.size]
            offload = offload + hidden_behind(2 * kept / speed, busy, c["exposed"])
    return {"gradients": exchange, "optimizer": update[split], "offload": offload}


def outside_bytes_per_s(machine: Machine, tier: str) -> float:
    """What a device can move to or from the host's memory (`host`), or its `disk` behind that; NarrowsError where it has none."""
    if machine.host_link is None:
        raise NarrowsError(f"{machine.name} has no link to its host.", where="layout: offload", remedy="Give offload=none.")
    if tier == "disk" and machine.storage is None:
        raise NarrowsError(f"{machine.name} has no storage.", where="layout: offload_to", remedy="Give offload_to=host.")
    disk = machine.storage.bandwidth_bytes_per_s if tier == "disk" and machine.storage else float("inf")
    return min(machine.host_link.bandwidth_bytes_per_s, disk)


def _update(parameters: float, dtype: DType, machine: Machine) -> float:
    op = Op("optimizer", "optimizer", {"elements": parameters, "states": STATES - (dtype.bits >= 32)}, act=dtype)
    return float(op_seconds(op, Step.train(1, 1), machine))


def step_seconds(graph: Graph, cluster: Cluster, layout: Layout, sequence: int, framework: str = "") -> dict[str, float]:
    """Seconds of one training step by cause (see `ledger`); their sum is the step. `sequence` is in tokens.

    The layout is taken as it is: `Layout.require` says whether a graph divides over it.
    """
    net = network(graph, cluster, layout, sequence, framework=framework)
    return {cause: float(seconds) for cause, seconds in ledger(net, cluster, layout, Axes.of(layout), framework).items()}
