"""One step of training a graph on many devices, in closed form, split into causes that add up to it.

    step = microbatches x slowest stage + bubble + pipeline messages + exchange of gradients and weights + optimizer + host

A stage takes what its layers take forward, backward and, where activations are recomputed, forward again, with the
collectives of its tensor, context and expert groups; the device waits where the host launches more slowly than it
computes. What a layout leaves equal (`Network`) is found once; here are the rest's numbers, or arrays of them (`Axes`).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from narrows.costmodel import achieved, seconds_of
from narrows.errors import NarrowsError
from narrows.graph import DType, Graph, Op
from narrows.layout import SCHEDULES, Layout
from narrows.machine import Cluster, Machine
from narrows.parallel import boxing
from narrows.simulate.network import FULL, Axes, Network, Part, Place, constants, network, wire
from narrows.site import Site

STATES = 3  # numbers of 4 bytes that the optimizer keeps for a parameter: master copy and two moments


def _seconds(kind: str, elements: Any, ranks: int, dtype: DType, on: Machine) -> Any:
    """A collective of so many elements, a number or an array; nothing where there is one rank."""
    op = _op(kind, dtype, ranks=ranks)
    return seconds_of(op, {**dict(op.dims), "elements": elements}, on) if ranks > 1 else 0.0 * elements


@lru_cache(maxsize=4096)
def _op(kind: str, dtype: DType, **dims: int) -> Op:
    return Op(kind, kind, {"elements": 1, **dims}, act=dtype)


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of a part of the network for the chosen sizes: by cause, and the whole with what the host adds."""

    causes: dict[str, Any]
    whole: Any


def spent(part: Part, cluster: Cluster, layout: Layout, axes: Axes, framework: str = "", deep: Any = 1.0) -> Spent:
    """What a part takes for one microbatch; `deep` layers of its kind make a stage, of which some may be recomputed."""
    c, machine = constants(framework), cluster.machine
    redone = np.minimum(1.0, layout.recompute_layers / deep) if layout.recompute_layers else 1.0
    hidden = part.hidden[:, axes.size]
    causes = {"forward": part.forward[axes.size], "backward": part.backward[axes.size],
              "recompute": (part.again[axes.redo, axes.size] - hidden[0] * (axes.redo == FULL)) * redone,
              **{name: seconds[axes.size] for name, seconds in part.wire.items()}}  # fmt: skip
    causes["context"] = causes["context"] - (1 - c["exposed"]) * hidden.sum(0)
    causes = {name: seconds * c["sustained"] for name, seconds in causes.items()}
    device = sum(causes.values())
    host = part.launches[axes.redo] * machine.launch_seconds * achieved(machine, "launch").median * c["launch"]
    whole = (device ** c["norm"] + host ** c["norm"]) ** (1 / c["norm"])
    return Spent({**causes, "launch": whole - device}, whole)


def hidden_behind(exchange: Any, busy: Any, exposed: float) -> Any:
    """What shows of an exchange beside a computation: what is longer, and of the rest the share by which the two interfere."""
    return np.maximum(exchange - busy, 0.0) + exposed * np.minimum(exchange, busy)


def ledger(net: Network, layout: Layout, axes: Axes, framework: str = "") -> dict[str, Any]:
    """Seconds of a step by cause, each a number or an array over `axes`; their sum is the step.

    forward, backward, recompute, launch (the device waits for the host), tensor, context, expert (collectives that
    show), of the slowest stage; ends (what embedding and output add to it), bubble (the other stages, once), pipeline
    (messages), gradients (exchange of gradients and weights that shows), optimizer, offload, host (fixed time of a step).
    """
    c, stages, many = constants(framework), layout.pipeline, axes.accumulate
    places = list(zip(net.places, axes.deep(net), axes.many(net), strict=True))
    each = [_busy(net, place, deep, layout, axes, framework) for place, deep, _ in places]
    busy = _slowest([{cause: rounds * seconds for cause, seconds in one.items()}
                     for one, (_, _, rounds) in zip(each, places, strict=True)])  # fmt: skip
    whole, layers = sum(busy.values()), [sum(one.values()) - one["ends"] for one in each]
    every: dict[tuple[int, ...], Any] = {}  # stages across several groups wait for the slowest of them
    for place, seconds in zip(net.places, layers, strict=True):
        every[place.stages] = np.maximum(every.get(place.stages, 0.0), seconds)
    others = sum(len(some) * seconds for some, seconds in every.items()) - (whole - busy["ends"]) / many
    order = SCHEDULES[layout.schedule]
    left = np.maximum(order.bubble, 1 - many / (2 * stages - 1)) if order.bubble < 1 else 1.0
    messages = [(message_seconds(net, on, layout, axes, framework), count) for on, count in net.hops]
    worst = np.maximum.reduce([seconds for seconds, _ in messages]) if messages else 0.0
    return {
        **busy,
        "bubble": left / axes.chunks * (others if stages > 1 else 0.0),
        "pipeline": 2 * axes.chunks * (many * worst + sum(seconds * count for seconds, count in messages)),
        **_slowest([_updates(net, place, deep, layout, axes, c, whole) for place, deep, _ in places]),
        "host": c["step_ms"] * 1e-3 + 0.0 * many,
    }


def _busy(net: Network, place: Place, deep: Any, layout: Layout, axes: Axes, framework: str) -> dict[str, Any]:
    """Seconds of a microbatch by cause in the slowest stage of a place."""
    stages = layout.pipeline
    layer, first, last = (
        spent(part, place.cluster, layout, axes, framework, deep) for part in (place.layer, place.first, place.last)
    )
    stage = deep * layer.whole
    head, tail = first.whole * (0 in place.stages), last.whole * (stages - 1 in place.stages)
    if layout.balance == "layers":
        ends = _evened(net.layers, stages, layer.whole, last.whole) - stage
    elif layout.balance == "vocabulary":
        ends = (first.whole + last.whole) / stages
    else:
        ends = np.maximum(head, tail) if stages > 1 else head + tail
    return {**{cause: deep * seconds for cause, seconds in layer.causes.items()}, "ends": ends}


def _slowest(ledgers: list[dict[str, Any]]) -> dict[str, Any]:
    """The one whose sum is largest; of arrays, at each index."""
    found = ledgers[0]
    for other in ledgers[1:]:
        later = sum(other.values()) > sum(found.values())
        found = {cause: np.where(later, other[cause], seconds) for cause, seconds in found.items()}
    return found


def _evened(layers: int, stages: int, each: Any, last: Any) -> Any:
    """Seconds of the slowest stage where as many whole layers as serve best are moved from the last one to the others."""
    if stages == 1:
        return layers * each + last
    kept = range(-(-layers // stages) + 1)
    ways = [np.maximum(-(-(layers - few) // (stages - 1)) * each, few * each + last) for few in kept]
    return np.minimum.reduce(ways)


def message_seconds(net: Network, on: Machine, layout: Layout, axes: Axes, framework: str = "") -> Any:
    """What shows of one message over a link to the next stage; each device of a tensor group sends its share of it."""
    c, sizes = constants(framework), net.stream / (net.dtype.bits / 8) / layout.tensor
    return _seconds("send", sizes, 2, net.dtype, on)[axes.size] * c["pipeline"] + c["message_us"] * 1e-6


def owned(net: Network, layout: Layout) -> tuple[float, float]:
    """Parameters of the device that has most of them: outside of experts, and of experts."""
    both = [_owned(net, place, place.layers, layout) for place in net.places]
    return max(both, key=sum)


def _owned(net: Network, place: Place, deep: Any, layout: Layout) -> tuple[Any, Any]:
    ends = (net.first.owned, net.last.owned + net.last.tied * (layout.pipeline > 1))
    there = (ends[0] * (0 in place.stages), ends[1] * (layout.pipeline - 1 in place.stages))
    most = sum(ends) / layout.pipeline if layout.balance == "vocabulary" else max(there) if layout.pipeline > 1 else sum(ends)
    return deep * net.layer.owned + most, deep * net.layer.experts


def _updates(net: Network, place: Place, deep: Any, layout: Layout, axes: Axes, c: dict[str, float], busy: Any) -> dict[str, Any]:
    """Seconds that exchanging gradients and weights, the optimizer, and what is offloaded take or show in a place."""
    many, shard, machine = axes.accumulate, axes.shard, place.cluster.machine
    gradient, replicas = DType("gradient", layout.gradient_bits), layout.data * layout.context
    dense, experts = _owned(net, place, deep, layout)
    reduce = scatter = gather = 0.0
    parameters = update = np.zeros((2, *np.shape(dense)))  # of all that a replica has there, and of a device's share of it
    for count, ranks, stride in (
        (dense, replicas, layout.tensor),
        (experts, replicas // layout.expert, layout.tensor * layout.expert),
    ):
        if np.any(count):
            on = wire(place.cluster, stride, ranks, c["network"], seams=place.seams)
            reduce += _seconds(boxing("partial", "whole"), count, ranks, gradient, on)
            scatter += _seconds(boxing("partial", "rows"), count, ranks, gradient, on)
            gather += _seconds(boxing("rows", "whole"), count, ranks, net.dtype, on)
            parameters = parameters + (held := np.array([count, count / ranks]))
            update = update + _update(held, net.dtype, machine)
    # DDP; ZeRO-1; ZeRO-2 and 3 scatter every microbatch's gradients, and 3 gathers weights before each use of them
    exchange = np.choose(shard, [reduce, scatter + gather, many * scatter + gather, many * (scatter + 2 * gather)])
    if layout.overlap:
        exchange = hidden_behind(exchange, np.where(shard >= 2, busy, busy / many), c["exposed"])
    sharded, offload = np.asarray(shard) >= 1, 0.0 * many
    if layout.offload != "none":
        speed = outside_bytes_per_s(machine, layout.offload_to)
        if layout.offload != "activations":  # states come in while those of other parameters go out
            offload = offload + np.where(sharded, parameters[1], parameters[0]) * (4 * STATES / speed)
        if layout.offload != "optimizer":
            kept = many * deep * net.layer.saved[axes.redo, axes.size]
            offload = offload + hidden_behind(2 * kept / speed, busy, c["exposed"])
    return {"gradients": exchange, "optimizer": np.where(sharded, update[1], update[0]), "offload": offload}


def outside_bytes_per_s(machine: Machine, tier: str) -> float:
    """What a device can move to or from the host's memory (`host`), or its `disk` behind that; NarrowsError where it has none."""
    if machine.host_link is None:
        raise NarrowsError(f"{machine.name} has no link to its host.", where="layout: offload", remedy="Give offload=none.")
    if tier == "disk" and machine.storage is None:
        raise NarrowsError(f"{machine.name} has no storage.", where="layout: offload_to", remedy="Give offload_to=host.")
    disk = machine.storage.bandwidth_bytes_per_s if tier == "disk" and machine.storage else float("inf")
    return min(machine.host_link.bandwidth_bytes_per_s, disk)


def _update(parameters: Any, dtype: DType, machine: Machine) -> Any:
    op = _op("optimizer", dtype, states=STATES - (dtype.bits >= 32))
    return seconds_of(op, {**dict(op.dims), "elements": parameters}, machine)


def step_seconds(graph: Graph, cluster: Cluster | Site, layout: Layout, sequence: int, framework: str = "") -> dict[str, float]:
    """Seconds of one training step by cause (see `ledger`); their sum is the step. `sequence` is in tokens.

    The layout is taken as it is: `Layout.require` says whether a graph divides over it.
    """
    net = network(graph, cluster, layout, sequence, framework=framework)
    return {cause: float(seconds) for cause, seconds in ledger(net, layout, Axes.of(layout), framework).items()}
