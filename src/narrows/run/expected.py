"""What a run is expected to do: the order of passes that its layout means, and the bytes that its graph says all ranks send."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from narrows.backward import gradient_exchange, training
from narrows.capture.config import from_config
from narrows.cost import cost
from narrows.free import cast
from narrows.graph import DTYPES, Graph
from narrows.kinds import COLLECTIVES
from narrows.layout import Layout
from narrows.parallel import context_parallel, is_layer, over, tensor_parallel
from narrows.simulate.pipeline import Order, Work
from narrows.simulate.played import V_SHAPED, order
from narrows.step import Step


def stages_of(layout: Layout) -> int:
    """Stages of the model, of which a V puts two on each rank, and interleaving several."""
    return layout.pipeline * (2 if layout.schedule in V_SHAPED else layout.chunks)


def order_of(layout: Layout) -> Order:
    """Which passes each rank runs, in turn, where all stages are equal and a backward pass takes twice a forward pass."""
    return order(layout, Work.of(stages_of(layout), layout.accumulate))


def graph_of(config: Mapping[str, Any], layout: Layout) -> Graph:
    """The training graph of one device of a layout, all of its pipeline's stages together."""
    whole = cast(from_config(dict(config), "run"), DTYPES["fp64"])  # in which it runs
    graph = training(tensor_parallel(whole, layout.tensor, layout.sequence))
    graph = context_parallel(graph, layout.context, layout.context_by)
    replicas = layout.data * layout.context
    return gradient_exchange(graph, replicas) if replicas > 1 and not layout.shard else graph


def predicted_bytes(config: Mapping[str, Any], layout: Layout, sequence: int) -> dict[str, float]:
    """Bytes that all ranks together send in a step, by kind of collective, as the graph and the layout say.

    Exact for DDP; under FSDP weights are gathered forward (and backward, with shard 3) and gradients scattered, a microbatch.
    """
    step = Step.train(layout.microbatch, sequence // layout.context)
    lines = layout.devices // layout.pipeline  # that hold the whole model together
    found: dict[str, float] = defaultdict(float)
    graph = graph_of(config, layout)
    last = [op.name for op in graph.forward if op.kind in COLLECTIVES and is_layer(op) and over(op) == "tensor"][-1:]
    for op in graph:
        if op.kind in COLLECTIVES:
            each = 1 if op.phase == "update" else layout.accumulate
            if layout.recompute == "full" and op.phase == "forward" and is_layer(op) and op.name not in last:
                each *= 2  # a layer that is computed again stops before the sum at its end: nothing behind it was kept
            found[op.kind] += float(cost(op, step).link_bytes) * each * lines
    width = graph.ops[0].act.bits / 8
    if layout.pipeline > 1:
        hops = stages_of(layout) - 1 - (layout.schedule in V_SHAPED)  # at the foot of a V a rank hands on to itself
        stream = layout.microbatch * sequence // layout.context * config["hidden_size"] * width
        share = layout.tensor if layout.sequence else 1
        found["send"] += 2 * hops * layout.accumulate * lines * stream / share
    if layout.shard:
        owned = sum(op.parameters for op in graph.forward) * width
        part = owned * (layout.data - 1) / layout.data * lines * (layout.accumulate if layout.pipeline == 1 else 1)
        found["all_gather"] += part * (2 if layout.shard == 3 and layout.pipeline == 1 else 1)
        found["reduce_scatter"] += part
    return dict(found)
