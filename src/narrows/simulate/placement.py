"""A training step whose pipeline stages lie on nodes that differ in their links: in closed form, and played out."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from narrows.graph import Graph
from narrows.layout import Layout
from narrows.machine import Cluster
from narrows.simulate.memory import peak_bytes
from narrows.simulate.network import Axes, network
from narrows.simulate.orders import one_f_one_b
from narrows.simulate.pipeline import Work
from narrows.simulate.training import owned, spent

Links = NDArray[np.float64]  # bytes per second between every two nodes
Order = tuple[tuple[int, ...], ...]  # the node of each stage of each replica


class Stage(NamedTuple):
    """A configuration, and what one of its stages takes: seconds of a microbatch, bytes handed on, bytes of gradients, memory."""

    layout: Layout
    forward: float
    backward: float
    message_bytes: float
    gradient_bytes: float
    held_bytes: float


def stage_of(graph: Graph, group: Cluster, layout: Layout, sequence: int) -> Stage:
    """The average stage of a layout. Bytes are a node's: all its devices send at once, over one card."""
    net, axes = network(graph, group, layout, sequence), Axes.of(layout)
    deep = {"layer": net.layers / layout.pipeline, "first": 1 / layout.pipeline, "last": 1 / layout.pipeline}
    parts = {name: spent(getattr(net, name), group, layout, axes) for name in deep}
    whole = sum(float(parts[name].whole) * deep[name] for name in parts)
    ahead = sum(float(parts[name].causes["forward"]) * deep[name] for name in parts)
    gradients = sum(owned(net, layout)) * layout.tensor * net.dtype.bits / 8
    sent = float(net.stream[0]) * group.devices_per_node / layout.tensor
    return Stage(layout, ahead, whole - ahead, sent, gradients, float(peak_bytes(net, layout, axes)))


def placed_seconds(stage: Stage, order: Order, links: Links) -> float:
    """A step along the critical path: the first microbatch's way there and back, then the slowest round trip for each other.

    From stage s on p - s microbatches are in flight: their round trip, over p - s, or one stage's work, whichever is longer.
    """
    p, each, at = stage.layout.pipeline, stage.forward + stage.backward, np.array(order)
    sends = stage.message_bytes / links[at[:, :-1], at[:, 1:]]
    after = np.zeros(at.shape)
    after[:, :-1] = sends[:, ::-1].cumsum(1)[:, ::-1]
    left = p - np.arange(p)
    period = np.max((left * each + 2 * after) / left, 1)
    way = p * each + 2 * after[:, 0] + (stage.layout.accumulate - 1) * period
    return float(way.max()) + summing_seconds(stage, order, links)


def summing_seconds(stage: Stage, order: Order, links: Links) -> float:
    """The all-reduce of a step's gradients: for each stage a ring of the nodes that hold it, as slow as its slowest link."""
    if len(order) == 1:
        return 0.0
    at = np.array(order)
    slowest = links[at, np.roll(at, -1, 0)].min()
    return float(2 * (len(at) - 1) / len(at) * stage.gradient_bytes / slowest)


def played(stage: Stage, order: Order, links: Links) -> float:
    """Seconds of a step as the schedule engine plays 1F1B over these links, every replica, and its gradients' sum."""
    p, n = stage.layout.pipeline, stage.layout.accumulate
    slowest = 0.0
    for row in order:
        sends: Any = [[stage.message_bytes / links[a, b] if a != b else 0.0 for b in row] for a in row]
        work = Work.of(p, n, stage.forward, stage.backward / 2, stage.backward / 2, sends)
        slowest = max(slowest, one_f_one_b(p, n).play(work).seconds)
    return float(slowest + summing_seconds(stage, order, links))
