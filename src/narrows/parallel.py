"""Cutting a graph over devices: what one of them computes, and the collectives that follow from the cut."""

from dataclasses import replace

from narrows.errors import NarrowsError
from narrows.graph import Dim, Graph, Op

# the dims of which a device has its share, by the way an op is cut; where a kind has not that dim, it is not meant
_CUTS = {
    "column": ("outputs", "in_channels", "out_channels", "groups"),
    "row": ("inputs",),
    "heads": ("heads", "kv_heads", "channels"),
    "vocabulary": ("outputs",),
    "experts": ("experts", "top_k"),
}
_POINTWISE = {"elementwise": ("elements", "reads", "weights"), "norm": ("rows",)}


def tensor_parallel(graph: Graph, devices: int) -> Graph:
    """The graph of one of `devices` under tensor parallelism, as Megatron-LM and the serving engines cut it.

    A column-cut product keeps its share of the outputs, so what follows works on that share, up to a row-cut
    product, which leaves each device a summand. Summands are all-reduced once, before the first op that is not itself
    a sum of them (`split="sum"`). Keys and values are repeated where there are more devices than key-value heads; each
    device holds its share of the experts, whose results are summands too. An op without a `split` that reads a share
    alone works on a share.
    """
    if devices == 1:
        return graph
    shares: set[str] = set()
    partial: dict[str, Op] = {}  # ops whose result each device holds a summand of
    out: list[Op] = []
    fed = {name for op in graph if op.split == "experts" for name in op.inputs}
    for op in graph:
        summands = [partial.pop(name) for name in dict.fromkeys(op.inputs) if name in partial]
        if summands and op.split != "sum":
            out.append(_all_reduce(summands[-1], devices))
        cut = _cut(op, devices, set(op.inputs) <= shares and bool(op.inputs))
        out.append(cut)
        ends = op.split == "row" or (op.split == "experts" and op.name not in fed) or (op.kind == "embedding" and bool(op.split))
        if ends:
            partial[op.name] = op
        elif summands and op.split == "sum":
            partial[op.name] = summands[-1]
        if cut is op or ends:
            shares.discard(op.name)
        else:
            shares.add(op.name)
    out.extend(_all_reduce(op, devices) for op in dict.fromkeys(partial.values()))
    return replace(graph, ops=tuple(out))


def _all_reduce(op: Op, devices: int) -> Op:
    """The sum over devices of what a row-cut product, a share of the experts or of the vocabulary gives."""
    elements = op["rows"] * op["outputs"]  # type: ignore[operator]
    dims = {"elements": elements, "ranks": devices}
    return Op(f"{op.name} all_reduce", "all_reduce", dims, op.act, inputs=(op.name,), repeat=op.repeat)


def require_cut(graph: Graph, devices: int) -> None:
    """Raises NarrowsError where a graph does not say how to cut it, or its heads do not divide over the devices."""
    if devices > 1 and not any(op.split for op in graph):
        raise NarrowsError(
            f"it is not known how to cut {graph.name}.", where="devices", remedy="Use one device, or replicas to train."
        )
    for op in graph.find("attention", "latent_attention"):
        heads = op["heads"]
        if op.split == "heads" and isinstance(heads, int | float) and heads % devices:
            raise NarrowsError(
                f"{heads:g} heads do not divide over {devices}.",
                where=f"devices: {op.name}",
                remedy="Give a divisor of the heads.",
            )


def _cut(op: Op, devices: int, reads_share: bool) -> Op:
    """The share of an op that one device has; the op itself where it is not cut."""

    def share(value: Dim) -> Dim:
        return value * (1 / devices)

    if op.kind == "embedding" and op.split:
        return op.but(vocabulary=share(op["vocabulary"]))
    if op.split == "sum":
        return op
    if op.kind in _POINTWISE and (op.split or reads_share):
        return op.but(saved=share(op.saved), **{name: share(op[name]) for name in _POINTWISE[op.kind]})
    if op.split not in _CUTS:
        return op
    dims = {name: share(op[name]) for name in _CUTS[op.split] if name in dict(op.dims)}
    if "kv_heads" in dims and op["kv_heads"] < devices:  # type: ignore[operator]
        dims["kv_heads"] = 1.0
    whole_input = op.kind == "linear" and op.split != "row" and not reads_share  # each device keeps all that it reads
    return op.but(**dims, saved=op.saved if whole_input else share(op.saved))
