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
    loss = [_loss(op) for op in graph if op.split == "vocabulary" and op.kind == "linear"]
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


def _loss(head: Op) -> Op:
    """The cross-entropy of what a head gives, in fp32; its probabilities are kept."""
    rows, words = head["rows"], float(head["outputs"])  # type: ignore[arg-type]
    dims = {"elements": rows, "reads": rows * words, "flop_per_element": 5 * words}
    return Op("loss", "elementwise", dims, act=FP32, saved=rows * words, inputs=(head.name,), kernels=4)


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
