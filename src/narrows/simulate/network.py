"""What the devices of a training layout have to do for a microbatch: a graph cut for each, and the links they meet over.

A device's work is the sum of what depends on little (the rest of a layer), on the number of devices that share its experts,
and on its context group: each is found once for many layouts, as arrays over sizes of a microbatch.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache, reduce
from itertools import groupby, product
from operator import add
from typing import Any

import numpy as np

from narrows.backward import training
from narrows.costmodel import ATTENTION, medians, seconds_of
from narrows.errors import NarrowsError
from narrows.graph import DType, Graph, Op, at
from narrows.kinds import COLLECTIVES
from narrows.layout import RECOMPUTE, Layout
from narrows.machine import HOST_LINKS, Cluster, Link, Machine
from narrows.parallel import context_parallel, expert_parallel, is_layer, layer_count, over, tensor_parallel
from narrows.site import Seam, Seen, Site
from narrows.step import Step

NONE, SELECTIVE, FULL = (RECOMPUTE.index(name) for name in ("none", "selective", "full"))
# Of a logit, beside its probability in fp32: itself in 16 bits, and in fp32 less the largest and as an exponential, as
# Megatron-LM's and DeepSpeed's cross entropy hold them at once.
LOSS_BYTES = 10
WEIGHT_SHARE = 0.5  # of a product's backward pass: gradients of weights and of inputs are one product of the same size each


@dataclass(frozen=True, slots=True)
class Part:
    """What the average layer, or an end of the network, needs of one device for one microbatch; arrays over its sizes.

    forward, backward   seconds of kernels, K;  weights   of the backward ones, what gradients of weights take, K
    again               seconds of the forward pass that is redone, with its collectives, RECOMPUTE x K
    wire                seconds of collectives both ways, by dimension, K
    sends, covers       of messages, and of the attention that they can hide behind, forward and backward: 2 x K
    launches            of the host, RECOMPUTE;  saved   bytes kept for the backward pass, RECOMPUTE x K
    largest             bytes that the op with most of them reads and writes, K
    owned, experts      parameters outside of experts and of experts;  tied   those that belong to another part
    """

    forward: Any
    backward: Any
    weights: Any
    again: Any
    wire: dict[str, Any]
    sends: Any
    covers: Any
    launches: Any
    saved: Any
    largest: Any
    owned: float
    experts: float
    tied: float

    @property
    def hidden(self) -> Any:
        """Seconds of messages behind attention, forward and backward: 2 x K."""
        return np.minimum(self.sends, self.covers)

    def at(self, chosen: slice) -> "Part":
        """The part for the chosen ones of its K."""
        sized = {name: getattr(self, name)[..., chosen] for name in _SIZED}
        return replace(self, **sized, wire={name: seconds[chosen] for name, seconds in self.wire.items()})

    def __add__(self, other: "Part") -> "Part":
        wire = {name: seconds + other.wire[name] for name, seconds in self.wire.items()}
        more = {"wire": wire, "largest": np.maximum(self.largest, other.largest)}
        return Part(*(more[f.name] if f.name in more else getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


Ends = tuple[Part, Part, Part]  # a layer, what comes before the layers, and what comes after
Points = tuple[tuple[int, int], ...]  # devices of a context group, and sequences of a microbatch
_SIZED = ("forward", "backward", "weights", "again", "sends", "covers", "saved", "largest")


@dataclass(frozen=True, slots=True)
class Place:
    """Stages as one kind of device sees them that they stand on; stages across several groups have a place in each.

    layers   of each of these stages
    cluster, seams   the devices, and what lies between groups (see `Site.seen`)
    layer, first, last   what the average layer, and the ends of the network, need there
    """

    stages: tuple[int, ...]
    layers: float
    cluster: Cluster
    seams: tuple[Seam, ...]
    layer: Part
    first: Part
    last: Part


@dataclass(frozen=True, slots=True)
class Network:
    """A graph cut for the devices of a layout, place by place, for each of K `sizes` of a microbatch.

    stream   bytes of the residual stream that one stage hands to the next, K
    hops     from how many stages to the next over which link
    """

    places: tuple[Place, ...]
    hops: tuple[tuple[Machine, int], ...]
    layers: int
    sizes: tuple[int, ...]
    stream: Any
    dtype: DType

    @property
    def layer(self) -> Part:
        """The average layer in the first place; what it owns and keeps is alike in all."""
        return self.places[0].layer

    @property
    def first(self) -> Part:
        """What comes before the layers."""
        return self.places[0].first

    @property
    def last(self) -> Part:
        """What comes after the layers."""
        return self.places[0].last


@dataclass(frozen=True, slots=True)
class Axes:
    """What a layout leaves open for arrays: places in a Network's microbatch sizes, their number a step, and the like.

    layers   of a stage of each place, where they are not the network's own
    rounds   microbatches of a replica in each place, where they are not all `accumulate`
    """

    size: Any
    accumulate: Any
    chunks: Any
    shard: Any
    redo: Any
    layers: tuple[Any, ...] = ()
    rounds: tuple[Any, ...] = ()

    @classmethod
    def of(cls, layout: Layout) -> "Axes":
        """Those of one layout, whose network has one size of microbatch."""
        rounds = tuple(many for _, many in layout.rounds)
        return cls(0, layout.accumulate, layout.chunks, layout.shard, RECOMPUTE.index(layout.recompute), rounds=rounds)

    def at(self, chosen: Any) -> "Axes":
        """Those at the chosen indices."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return Axes(**{name: tuple(one[chosen] for one in v) if isinstance(v, tuple) else v[chosen] for name, v in own.items()})

    def deep(self, net: Network) -> tuple[Any, ...]:
        """Layers of a stage, place by place."""
        return self.layers or tuple(place.layers for place in net.places)

    def many(self, net: Network) -> tuple[Any, ...]:
        """Microbatches of a replica, place by place."""
        return self.rounds or (self.accumulate,) * len(net.places)


def constants(framework: str = "") -> dict[str, float]:
    """The fitted constants of training, with those of a framework (`deepspeed`, `fsdp`) in their place where it has its own.

    sustained   factor on a device's time over a step, against kernels timed alone
    launch      host time of an operator, in launches of the machine;  norm  how sharply the slower of host and device wins
    network     share of the bandwidth between nodes;  pipeline  share of a stage's messages that is not hidden
    message_us  host time of a message;  step_ms  of a step
    exposed     share of an exchange beside the computation by which the two slow each other
    """
    return medians("training", framework)


def network(
    graph: Graph,
    cluster: Cluster | Site,
    layout: Layout,
    sequence: int,
    microbatches: Iterable[int] = (),
    framework: str = "",
    contexts: Iterable[int] = (),
) -> Network:
    """The graph as the devices of a layout see it, for these sizes of a microbatch (default: the layout's own).

    Asked for the same graph in several `contexts`, it does in one pass over arrays what these have in common.
    """
    on, sizes = Site.of(cluster).only(layout.groups), tuple(microbatches) or (layout.microbatch,)
    width, share = layout.tensor * layout.context * layout.data, constants(framework)["network"]
    points = tuple(product(tuple(contexts) or (layout.context,), sizes))
    deep = _cut(graph, layout.tensor, layout.sequence)[2]
    depths = layout.split or (deep / layout.pipeline,) * layout.pipeline
    found: dict[tuple[tuple[Seen, ...], float], list[int]] = {}
    for first, end, seen in on.runs(layout.pipeline, width):
        for layers, stages in groupby(range(first, end), depths.__getitem__):
            found.setdefault((seen, layers), []).extend(stages)
    hops: dict[Machine, int] = {}
    for first, end, seen in on.runs(layout.pipeline - 1, width, 2):
        ways = (wire(group, width, layout.pipeline, share, 1, seams) for group, seams in seen)
        slowest = min(ways, key=lambda way: way.links[0].bandwidth_bytes_per_s)
        hops[slowest] = hops.get(slowest, 0) + end - first
    places = tuple(
        Place(tuple(stages), layers, *one, *_placed(graph, *one, layout, points, sequence, share))
        for (seen, layers), stages in found.items()
        for one in seen
    )
    own = tuple(place.cluster.devices // (layout.tensor * layout.context) for place in places)
    if layout.shares and own != tuple(replicas for replicas, _ in layout.rounds):
        raise NarrowsError(f"the groups have {' and '.join(map(str, own))} replicas, and it says {layout.shares}.",
                           where="layout: shares", remedy="Give a share for each group, in their order.")  # fmt: skip
    stream = _stream(graph, _step(points[_of(points, layout.context)], sequence))
    return Network(places, tuple(hops.items()), deep, sizes, stream, _act(graph))


def _placed(
    graph: Graph, cluster: Cluster, seams: tuple[Seam, ...], layout: Layout, points: Points, sequence: int, share: float
) -> Ends:
    """What one device of a cluster has to do, part by part and each as it depends on the layout."""
    stride, mine = layout.tensor * layout.context, _of(points, layout.context)
    groups = {"tensor": (1, layout.tensor), "context": (layout.tensor, layout.context), "expert": (stride, layout.expert)}
    on = {name: wire(cluster, *group, share, seams=seams) for name, group in groups.items()}
    cut = (graph, cluster.machine, layout.tensor, layout.sequence)
    found = [[part.at(mine) for part in _parts(*cut, on["tensor"], "rest", 1, "", points, sequence)]]
    if any(some.ops for some in _cut(graph, layout.tensor, layout.sequence)[1]):
        experts = _parts(*cut, cluster.machine, "experts", layout.expert, "", points, sequence)
        found += [[part.at(mine) for part in experts]]
    for name, ranks, way in (("expert", layout.expert, ""), ("context", layout.context, layout.context_by)):
        if ranks > 1:
            found += [list(_parts(*cut, on[name], name, ranks, way, points[mine], sequence))]
    layer, first, last = (
        reduce(add, [part for part in some if part.launches.any()] or some[:1]) for some in zip(*found, strict=True)
    )
    row = np.zeros(layer.saved.shape)
    row[FULL] = _stream(graph, _step(points[mine], sequence)) / (layout.tensor if layout.sequence else 1)
    return (replace(layer, saved=layer.saved + row) if layer.launches.any() else layer), first, last


def _of(points: Points, context: int) -> slice:
    """Where the points of a context group lie, next to each other."""
    mine = [at for at, (devices, _) in enumerate(points) if devices == context]
    return slice(mine[0], mine[-1] + 1)


@lru_cache(maxsize=256)
def _cut(graph: Graph, tensor: int, by_tokens: bool) -> tuple[list[Graph], list[Graph], int]:
    """Training on one device of a tensor group, without experts and those alone: layers, what comes before, what after."""
    inside = [op for op in graph.forward if is_layer(op)]
    ahead = {op.name for op in graph.forward[: graph.forward.index(inside[0])]} if inside else set()
    ops: dict[bool, tuple[list[Op], ...]] = {experts: ([], [], []) for experts in (False, True)}
    for op in training(tensor_parallel(graph, tensor, by_tokens)):
        if op.kind != "checkpoint" and op.phase != "update":
            own = op.name.partition(" ")[0]
            ops[op.split == "experts"][0 if is_layer(op) else 1 if own in ahead else 2].append(op)
    rest, experts = ([replace(graph, ops=tuple(some)) for some in ops[experts]] for experts in (False, True))
    return rest, experts, layer_count(graph) or 1


@lru_cache(maxsize=256)
def _step(points: Points, sequence: int) -> Step:
    """The average member of a ring has its share of the queries, and meets half of the keys of the others."""
    context, many = (np.array(size)[:, None] for size in zip(*points, strict=True))
    return Step(many, sequence // context, (context - 1) * sequence // (2 * context), phase="train")


def _stream(graph: Graph, step: Step) -> Any:
    """Bytes of what one layer hands to the next."""
    inside = next((op for op in graph.forward if is_layer(op)), None)
    width = inside.spec.reads(inside.sized(step)) if inside else step["tokens"]
    return np.broadcast_to(width * _act(graph).bits / 8, np.shape(step["tokens"]))


@lru_cache(maxsize=64)
def _act(graph: Graph) -> DType:
    """The format that a network works in: that of the op with most parameters."""
    return max(graph.forward, key=lambda op: op.parameters).act


@lru_cache(maxsize=4096)
def _parts(
    graph: Graph, machine: Machine, tensor: int, by_tokens: bool, on: Machine, what: str, ranks: int, way: str, points: Points,
    sequence: int,
) -> Ends:  # fmt: skip
    """The `rest` of the parts, their `experts` (so many ranks share them), or what an `expert` or `context` group sends."""
    ops, deep = _ops(graph, tensor, by_tokens, what, ranks, way), _cut(graph, tensor, by_tokens)[2]
    step = _step(points, sequence)
    layer, first, last = (_part(some, machine, on, step, many) for some, many in zip(ops, (deep, 1, 1), strict=True))
    return layer, first, last


@lru_cache(maxsize=1024)
def _ops(graph: Graph, tensor: int, by_tokens: bool, what: str, ranks: int, way: str) -> list[list[Op]]:
    """The ops of layers, of what comes before and of what comes after (see `_parts`)."""
    rest, experts, _ = _cut(graph, tensor, by_tokens)
    if what == "rest":
        return [list(some) for some in rest]
    whole = [context_parallel(some, ranks, way) for some in rest] if what == "context" else [
        expert_parallel(some, ranks) for some in experts
    ]  # fmt: skip
    return [[op for op in some if (over(op) if op.kind in COLLECTIVES else "experts") == what] for some in whole]


def _part(ops: list[Op], machine: Machine, on: Machine, step: Step, layers: int) -> Part:
    """What ops take whose collectives go over one link; of the layers, the average one."""
    many = np.size(step["tokens"])
    forward, backward, weights, largest = np.zeros((4, many))
    again, saved, sends, covers = np.zeros((3, many)), np.zeros((3, many)), np.zeros((2, many)), np.zeros((2, many))
    wire, launches = dict(zip(("tensor", "context", "expert"), np.zeros((3, many)), strict=True)), np.zeros(3)
    core = {op.name for op in ops if op.kind in ATTENTION or (op.kind == "matmul" and op.split == "heads")}
    owned = experts = tied = 0.0
    for op in ops:
        exchange, back = op.kind in COLLECTIVES, op.phase != "forward"
        dims = op.sized(step)
        seconds = seconds_of(op, dims, on if exchange else machine) / layers
        count = op.repeat / layers
        if exchange:
            wire[over(op)] += seconds
        elif back:
            backward += seconds
            weights += seconds * WEIGHT_SHARE * (op.weight is not None and op.spec.matmul)
        else:
            forward += seconds
        if op.kind == "send":
            sends[int(back)] += seconds
        elif op.kind in ATTENTION:
            covers[int(back)] += seconds
        launches += count * (2 if back else 1)
        if back:
            continue
        inner = op.name in core or op.name.rpartition(".")[0] in core
        for redo in (SELECTIVE, FULL) if inner and not exchange else (FULL,):
            again[redo] += seconds
            launches[redo] += count
        for redo in (NONE,) if inner and op.kind == "elementwise" else (NONE, SELECTIVE):
            saved[redo] += at(op.saved, step) * (op.act.bits / 8 * count)
        touched = (
            op.spec.reads(dims) * LOSS_BYTES
            if op.name == "loss"
            else (op.spec.reads(dims) + op.spec.writes(dims)) * (op.act.bits / 8)
        )
        largest = np.maximum(largest, touched)
        owned += op.parameters / layers * (op.kind != "expert")
        experts += op.parameters / layers * (op.kind == "expert")
        tied += op.spec.parameters(dict(op.dims)) * count * bool(op.tied)
    return Part(forward, backward, weights, again, wire, sends, covers, launches, saved, largest, owned, experts, tied)


def wire(
    cluster: Cluster, stride: int, ranks: int, share: float = 1.0, members: int = 0, seams: tuple[Seam, ...] = ()
) -> Machine:
    """The machine as a group of `ranks` sees it whose members lie `stride` devices apart.

    Between nodes, each member of the group in a node brings one network card (`members`, where it is not all of them). A
    group that lies across a seam is as slow as the link there.
    """
    link, block = cluster.scale_up, stride * ranks
    crossed = [between for at, between in seams if at % block]
    if crossed or block > cluster.devices_per_node:
        if cluster.scale_out is None and not crossed:
            problem = f"{block} devices do not fit a node of {cluster.devices_per_node}, and no link joins nodes."
            raise NarrowsError(problem, where=f"{cluster.name}: scale_out", remedy="Give the cluster a scale_out link.")
        ways = [*crossed, *([cluster.scale_out] if cluster.scale_out else [])]
        out = min(ways, key=lambda way: way.bandwidth_bytes_per_s)
        members = members or max(1, cluster.devices_per_node // stride)
        speed = min(link.bandwidth_bytes_per_s, out.bandwidth_bytes_per_s * share * members)
        link = Link(out.name, speed, out.latency_seconds)
    return _over(cluster.machine, link)


@lru_cache(maxsize=1024)
def _over(machine: Machine, link: Link) -> Machine:
    """The machine where its peers are reached over a link."""
    if machine.links[:1] == (link,):
        return machine
    rest = tuple(way for way in machine.links if way.name in HOST_LINKS and way.name != link.name)
    return replace(machine, links=(link, *rest), sources={})
