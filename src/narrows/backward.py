"""From a forward graph to the graph of a training step: backward ops, recomputation, the optimizer."""

from dataclasses import replace

from narrows.graph import FP32, DType, Graph, Op, Size

ALL_KEPT = "What the backward pass needs of this graph is not known: every result is taken to be kept."


def training(graph: Graph, optimizer_states: int = 2) -> Graph:
    """The graph of forward, backward and optimizer over a forward graph; one that has backward ops is left alone.

    Backward ops follow in reverse order; an op with `segments` runs once more before its backward. The optimizer
    reads a gradient and `optimizer_states` fp32 numbers per parameter (Adam: 2), and an fp32 master copy of
    weights that are kept in fewer bits. Ops of a graph that says of none what it saves keep their results.
    """
    if any(op.phase != "forward" for op in graph):
        return graph
    if not any(op.saved for op in graph):
        graph = replace(
            graph, ops=tuple(replace(op, saved=op.spec.writes(dict(op.dims))) for op in graph), notes=(*graph.notes, ALL_KEPT)
        )
    logits = [op for op in graph if op.split == "vocabulary" and op.kind == "linear"]
    loss = [
        Op(
            "loss",
            "elementwise",
            {"elements": op["rows"], "reads": op["rows"] * op["outputs"], "flop_per_element": 5 * op["outputs"]},  # type: ignore[operator]
            act=FP32,
            saved=op["rows"] * op["outputs"],
            inputs=(op.name,),
            kernels=4,
        )
        for op in logits
    ]  # type: ignore[operator]
    graph = replace(graph, ops=(*graph.ops, *loss))
    backward: list[Op] = []
    for op in reversed(graph.ops):
        if op.segments:
            backward.append(replace(op, phase="recompute"))
        if op.kind != "checkpoint":
            backward.append(replace(op, phase="backward"))
    update = [
        Op(
            "optimizer" + (f" ({dtype.name})" if dtype != FP32 else ""),
            "optimizer",
            {"elements": n, "states": optimizer_states + (dtype.bits < 32)},
            act=dtype,
            phase="update",
            kernels=12,
        )
        for dtype, n in _owned(graph).items()
    ]
    return replace(graph, ops=(*graph.ops, *backward, *update))


def _owned(graph: Graph) -> dict[DType, float]:
    """Parameters by the dtype they are stored in."""
    count: dict[DType, float] = {}
    for op in graph:
        if op.parameters:
            dtype = op.weight or op.act
            count[dtype] = count.get(dtype, 0) + op.parameters
    return count


def gradient_exchange(graph: Graph, ranks: int) -> Graph:
    """A training graph as one of `ranks` data-parallel devices sees it: every gradient is all-reduced once, before the update."""
    exchange = [
        Op(
            "gradients" + (f" ({dtype.name})" if dtype != FP32 else ""),
            "all_reduce",
            {"elements": n, "ranks": ranks},
            act=dtype,
            phase="update",
        )
        for dtype, n in _owned(graph).items()
    ]
    at = next((i for i, op in enumerate(graph.ops) if op.phase == "update"), len(graph.ops))
    return replace(graph, ops=(*graph.ops[:at], *exchange, *graph.ops[at:]))


def checkpoint_op(name: str, elements: Size | float, like: Op, repeat: int) -> Op:
    """What recomputation keeps: `elements` at each of `repeat` segment boundaries."""
    return Op(name, "checkpoint", {"elements": elements}, act=like.act, repeat=repeat, saved=elements)
