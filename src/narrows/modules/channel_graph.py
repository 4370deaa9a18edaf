"""Which channels of a Graph can be taken out, and the Graph without them: what `channels` finds on a module, told from sizes.

A Graph names what an op reads, and folds layers that are alike. So a reader is bound to those ops of the names it gives that
make as many numbers as it reads; where that leaves a doubt, the channels stay.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from narrows.graph import Dim, Graph, Op, Size

# what an op reads and what it makes: the dim with the channels, and that with their number of places
_READS = {"linear": ("inputs", "rows"), "conv": ("in_channels", "in_positions"), "norm": ("width", "rows")}
_MAKES = {"linear": ("outputs", "rows"), "conv": ("out_channels", "positions"), "norm": ("width", "rows"),
          "embedding": ("outputs", "rows"), "elementwise": ("elements", "")}  # fmt: skip

# the dims that shrink with what an op makes
_CUT = {
    "linear": ("outputs",),
    "conv": ("out_channels",),
    "attention": ("heads", "kv_heads"),
    "elementwise": ("elements", "reads"),
}


def narrowed(graph: Graph, left: Callable[[int], int], heads: bool = False) -> Graph:
    """The graph with `left(n)` of n groups wherever they can be taken out."""

    def cut(value: Dim, of: int) -> Dim:
        share = left(of) / of if of else 1
        return value * share if isinstance(value, Size) else round(value * share)

    ops = []
    for op, (read, made) in zip(graph.ops, groups(graph, heads), strict=True):
        dims = dict(op.dims)
        if op.kind in _READS:
            dims[_READS[op.kind][0]] = cut(op[_READS[op.kind][0]], read)
        for name in _CUT.get(op.kind, ()):
            dims[name] = cut(op[name], made)
        if _depthwise(op):
            dims["groups"] = dims["in_channels"]
        ops.append(replace(op, dims=dims))
    return replace(graph, ops=tuple(ops))


def groups(graph: Graph, heads: bool = False) -> list[tuple[int, int]]:
    """For each op, the removable groups of the channels that it reads and of those that it makes; 0 where they stay.

    A residual stream stays, since every layer of it reads it; so does what no op reads. Heads are removable if asked for.
    """
    ops = graph.ops
    named: dict[str, list[int]] = defaultdict(list)
    for i, op in enumerate(ops):
        named[op.name].append(i)
    parent = list(range(len(ops)))
    stays: set[int] = set()
    read: set[int] = set()

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    def tie(*together: int) -> None:
        for i in together[1:]:
            parent[root(i)] = root(together[0])

    def feeders(op: Op, *sizes: Any) -> list[int]:
        return [j for name in dict.fromkeys(op.inputs) for j in named[name] if any(_same(_made(ops[j]), s) for s in sizes)]

    fed: list[list[int]] = []
    for i, op in enumerate(ops):
        found: list[int] = []
        if op.kind in _READS:
            found = feeders(op, _total(op, *_READS[op.kind]))
            tie(*found, *((i,) if op.kind == "norm" or _depthwise(op) else ()))
            if op.kind == "conv" and op["groups"] != 1 and not _depthwise(op):
                stays.update((i, *found))
        elif op.kind == "elementwise":
            found = feeders(op, op["elements"], op["reads"])
            tie(i, *found)
            if _joins(op, [ops[j] for j in found]):
                stays.add(i)
        elif op.kind == "attention" and heads:
            found = _projections(op, ops, named)
            tie(i, *found)
        if not _plain(op) or (op.kind not in _READS and not (found or op.kind == "elementwise")):
            stays.update((i, *found, *(j for name in op.inputs for j in named[name])))
        read.update(found)
        fed.append(found)
    stays.update(set(range(len(ops))) - read)

    makers: dict[int, list[Op]] = defaultdict(list)
    for i, op in enumerate(ops):
        if op.kind in ("linear", "conv", "attention"):
            makers[root(i)].append(op)
    count = {r: _count(together) for r, together in makers.items()}
    for i, found in enumerate(fed):  # a flattened map is read as a multiple of its channels; anything else is not understood
        n = count.get(root(found[0]), 0) if found else 0
        if n and ops[i].kind in ("linear", "conv") and int(ops[i][_READS[ops[i].kind][0]]) % n:  # type: ignore[arg-type]
            stays.add(found[0])
    kept = {root(i) for i in stays}
    free = [0 if root(i) in kept else count.get(root(i), 0) for i in range(len(ops))]
    return [(free[found[0]] if found else 0, free[i]) for i, found in enumerate(fed)]


def _total(op: Op, *dims: str) -> Any:
    """The product of dims, of which one at most is no plain number."""
    product: Any = 1
    for value in (op[d] for d in dims if d):
        product = value * product if isinstance(value, Size) else product * value
    return product


def _made(op: Op) -> Any:
    """How many numbers an op makes; None where that says nothing of channels."""
    if op.kind == "attention":
        return _total(op, "queries", "heads", "value_dim")
    return _total(op, *_MAKES[op.kind]) if op.kind in _MAKES else None


def _same(a: Any, b: Any) -> bool:
    return a is not None and isinstance(a, Size) == isinstance(b, Size) and a == b


def _plain(op: Op) -> bool:
    """It has no weights, or plain ones of its own."""
    return op.weight is None or (not op.weight.scale_bits and op.weight.bits >= 16 and not op.tied)


def _depthwise(op: Op) -> bool:
    return op.kind == "conv" and op["groups"] == op["in_channels"] == op["out_channels"] != 1


def _joins(op: Op, found: list[Op]) -> bool:
    """Whether an op brings channels of different origin together, as a residual stream does; a gate and its partner do not."""
    several = len({one.name for one in found}) > 1
    twice = len(found) > 0 and op["reads"] == op["elements"] * 2 and any(_same(_made(one), op["elements"]) for one in found)  # type: ignore[operator]
    gated = all(one.kind == "linear" and one.inputs == found[0].inputs for one in found) and several
    return (several or twice) and not gated


def _projections(op: Op, ops: tuple[Op, ...], named: dict[str, list[int]]) -> list[int]:
    """The three linear layers that an attention reads, and what is between; none where they are not told apart."""
    between: list[int] = []
    linear: list[int] = []
    for name in op.inputs:
        for j in named[name]:
            if ops[j].kind == "linear":
                linear.append(j)
            elif ops[j].kind == "elementwise":
                behind = [k for inner in ops[j].inputs for k in named[inner] if ops[k].kind == "linear"]
                linear += behind
                between += [j] if behind else []
    heads, kv, d, value = (int(op[n]) for n in ("heads", "kv_heads", "head_dim", "value_dim"))  # type: ignore[arg-type]
    widths = sorted(int(ops[j]["outputs"]) for j in dict.fromkeys(linear))  # type: ignore[arg-type]
    return [*dict.fromkeys(linear), *between] if widths == sorted((heads * d, kv * d, kv * value)) else []


def _count(together: list[Op]) -> int:
    """The groups of channels that some ops make together; 0 where their widths do not agree."""
    attention = [int(op["kv_heads"]) for op in together if op.kind == "attention"]  # type: ignore[arg-type]
    widths = {int(op[_MAKES[op.kind][0]]) for op in together if op.kind != "attention"}  # type: ignore[arg-type]
    if attention:
        return attention[0] if len(set(attention)) == 1 and not any(w % attention[0] for w in widths) else 0
    return widths.pop() if len(widths) == 1 else 0
