"""Cutting a graph over devices: what one of them computes, and the collectives that follow from the cut.

Along each dimension of a mesh of devices a result is `whole` on each, split by `rows` (tokens) or `features`, or
`partial` (each holds a summand): the algebra of OneFlow's SBP (arXiv 2110.15032). Where an op needs a result in another
state than it is in, `boxing` names the collective that brings it there.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from narrows.errors import NarrowsError
from narrows.graph import Dim, Graph, Op, Size

_BOXING = {
    ("partial", "whole"): "all_reduce",
    ("partial", "rows"): "reduce_scatter",
    ("partial", "features"): "reduce_scatter",
    ("rows", "whole"): "all_gather",
    ("features", "whole"): "all_gather",
    ("rows", "features"): "all_to_all",
    ("features", "rows"): "all_to_all",
}
# the dims of which a device has its share, by the way an op is cut; where a kind has not that dim, it is not meant
_CUTS = {
    "column": ("outputs", "in_channels", "out_channels", "groups"),
    "row": ("inputs",),
    "heads": ("heads", "kv_heads", "channels"),
    "vocabulary": ("outputs",),
    "experts": ("experts", "top_k"),
}
_POINTWISE = {"elementwise": ("elements", "reads", "weights"), "norm": ("rows",), "matmul": ("rows", "matrices")}
_ROWS = {"elementwise": ("elements", "reads"), "norm": ("rows",), "linear": ("rows",)}


def boxing(have: str, want: str) -> str:
    """The collective that turns one state of a result into another; '' where each device has what it needs already."""
    return _BOXING.get((have, want), "")


def tensor_parallel(graph: Graph, devices: int, sequence: bool = False) -> Graph:
    """The graph of one of `devices` under tensor parallelism, as Megatron-LM and the serving engines cut it.

    A column-cut product keeps its share of the outputs, so what follows works on that share, up to a row-cut
    product, which leaves each device a summand. Summands are brought together once, before the first op that is not
    itself a sum of them (`split="sum"`). Keys and values are repeated where there are more devices than key-value heads;
    each device holds its share of the experts, whose results are summands too. An op without a `split` that reads a
    share alone works on a share. With `sequence` parallelism the other ops without a `split` work on a share of the
    tokens (Korthikanti et al. 2022), so sums are scattered before them and gathered after them.
    """
    if devices == 1:
        return graph
    states: dict[str, str] = {}  # of each result that is not whole
    summand: dict[str, Op] = {}  # the product that a partial result is, or is a sum of
    made: dict[str, Op] = {}
    out: list[Op] = []
    fed = {name for op in graph if op.split == "experts" for name in op.inputs}

    def bring(names: list[str], want: str) -> None:
        partial = [name for name in names if states.get(name) == "partial"]
        if partial:  # several summands that one op reads are added before they are sent
            last = summand[partial[-1]]
            out.append(_collective(boxing("partial", want), last, _product(last, "rows", "outputs"), devices))
            states.update(dict.fromkeys(partial, want))
        for name in names:
            if want == "whole" and states.get(name) == "rows" and name not in partial:
                out.append(_collective(boxing("rows", want), made[name], _results(made[name]), devices))
                states[name] = "whole"

    for op in graph:
        reads = list(dict.fromkeys(op.inputs))
        reads_share = bool(reads) and all(states.get(name) == "features" for name in reads)
        by_rows = sequence and not op.split and not reads_share and op.kind in _ROWS
        partial = [name for name in reads if states.get(name) == "partial"]
        if op.split != "sum":
            bring(reads, "rows" if by_rows else "whole")
        cut = _share(op, devices, _ROWS[op.kind]) if by_rows else _cut(op, devices, reads_share, sequence)
        made[op.name] = op
        out.append(cut)
        ends = op.split == "row" or (op.split == "experts" and op.name not in fed) or (op.kind == "embedding" and bool(op.split))
        if ends or (partial and op.split == "sum"):
            states.update(dict.fromkeys(partial, "whole"))  # what a sum has taken up is not reduced on its own
            states[op.name], summand[op.name] = "partial", op if ends else summand[partial[-1]]
        else:
            states[op.name] = "rows" if by_rows else "whole" if cut is op else "features"
    left = {id(summand[name]): name for name, state in states.items() if state == "partial"}
    for name in left.values():
        bring([name], "whole")
    return replace(graph, ops=tuple(out))


def context_parallel(graph: Graph, devices: int, by: str) -> Graph:
    """The training graph of one of `devices` that share each sequence; its step has that device's share of the tokens.

    Only attention needs the tokens of others. `ring`: every device's keys and values come by in devices - 1 messages,
    backward with their gradients (Liu et al. 2023). `ulysses`: queries, keys, values and results are exchanged for
    all tokens of a share of the heads (Jacobs et al. 2023). Latents and states of a scan are gathered.
    """
    if devices == 1:
        return graph

    def exchange(op: Op) -> list[Op] | Op:
        if op.kind == "attention":
            heads, few = _number(op, "heads"), _number(op, "kv_heads")
            size, keys = _number(op, "head_dim"), _number(op, "head_dim") + _number(op, "value_dim")
            if by == "ring":
                send = _collective("send", op, op["queries"] * (few * keys * (1 + (op.phase == "backward"))), 2, "context")
                return [replace(send, repeat=op.repeat * (devices - 1)), op]
            before = op["queries"] * (heads * size + max(few, devices) * keys)
            after = op["queries"] * (heads * (keys - size))
            return [
                _collective("all_to_all", op, before, devices, "context"),
                op,
                _collective("all_to_all", op, after, devices, "context, back"),
            ]
        if op.kind == "latent_attention":
            latents = op["queries"] * ((_number(op, "rank") + _number(op, "rope_dim")) * devices)
            return [_collective("all_gather", op, latents, devices, "context"), op]
        if op.kind == "scan":
            states = Size.of(sequences=_number(op, "channels") * _number(op, "state") * devices)
            return [_collective("all_gather", op, states, devices, "context"), op]
        return op

    return graph.map(exchange)


def expert_parallel(graph: Graph, devices: int) -> Graph:
    """The graph of one of `devices` replicas that share the experts: each holds its part and works on what all send it.

    Tokens go to their experts and back in an all-to-all each; every expert is taken to get equally many.
    """
    if devices == 1:
        return graph
    fed = {name for op in graph if op.split == "experts" for name in op.inputs}
    inner = {op.name for op in graph if op.split == "experts"}

    def exchange(op: Op) -> list[Op] | Op:
        if op.kind != "expert" or op.split != "experts":
            return op
        pairs = _product(op, "rows", "top_k")
        ops = [op.but(experts=op["experts"] * (1 / devices))]
        if not inner & set(op.inputs):
            ops.insert(0, _collective("all_to_all", op, pairs * _number(op, "inputs"), devices, "expert"))
        if op.name not in fed:
            ops.append(_collective("all_to_all", op, pairs * _number(op, "outputs"), devices, "expert, back"))
        return ops

    return graph.map(exchange)


def pipelined(graph: Graph, stages: int) -> Graph:
    """The graph with what passes between `stages` that share its layers: a token's residual stream, from each to the next."""
    inside = next((op for op in graph.forward if is_layer(op)), None)
    if stages == 1:
        return graph
    if inside is None or layer_count(graph) < stages:
        raise NarrowsError(f"{graph.name} has not {stages} layers.", where="pipeline", remedy="Use fewer stages.")
    send = _collective("send", inside, inside.spec.reads(dict(inside.dims)), 2, "pipeline")
    return replace(graph, ops=(*graph.ops, replace(send, repeat=stages - 1)))


def over(op: Op) -> str:
    """The dimension of the mesh that a collective goes over: tensor, context or expert."""
    return op.name.rpartition(" over ")[2].split(",")[0].split()[0]


@lru_cache(maxsize=64)
def layer_count(graph: Graph) -> int:
    """How many layers its stacks have: of each stack, the most that one name (`layers.*.mlp`) is repeated."""
    stacks: dict[str, dict[str, int]] = {}
    for op in graph.forward:
        if is_layer(op):
            names = stacks.setdefault(op.name.partition(".*")[0], {})
            names[op.name] = names.get(op.name, 0) + op.repeat
    return sum(max(names.values()) for names in stacks.values())


def is_layer(op: Op) -> bool:
    """Whether an op belongs to a repeated layer: its name has a `*` for the layer's index."""
    return ".*" in op.name


def _collective(kind: str, op: Op, elements: Dim, devices: int, dimension: str = "tensor") -> Op:
    dims = {"elements": elements, "ranks": devices}
    name = f"{op.name} {kind} over {dimension}"
    return Op(name, kind, dims, op.act, inputs=(op.name,), repeat=op.repeat, phase=op.phase)


def _number(op: Op, dim: str) -> float:
    """A dim that no step changes."""
    return float(op[dim])  # type: ignore[arg-type]


def _product(op: Op, rows: str, width: str) -> Dim:
    return op[rows] * _number(op, width)


def _results(op: Op) -> Dim:
    return op.spec.writes(dict(op.dims))  # type: ignore[no-any-return]


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


def _share(op: Op, devices: int, names: Iterable[str]) -> Op:
    """The op with its share of these dims, and of what it saves."""
    return op.but(saved=op.saved * (1 / devices), **{name: op[name] * (1 / devices) for name in names})


def _cut(op: Op, devices: int, reads_share: bool, sequence: bool = False) -> Op:
    """The share of an op that one device has; the op itself where it is not cut."""
    if op.kind == "embedding" and op.split:
        return op.but(vocabulary=op["vocabulary"] * (1 / devices))
    if op.split == "sum":
        return op
    if op.kind in _POINTWISE and (op.split or reads_share):
        return _share(op, devices, _POINTWISE[op.kind])
    if op.split not in _CUTS:
        return op
    cut = _share(op, devices, [name for name in _CUTS[op.split] if name in dict(op.dims)])
    if "kv_heads" in dict(op.dims) and op["kv_heads"] < devices:  # type: ignore[operator]
        cut = cut.but(kv_heads=1.0)
    # each device keeps all that it reads, unless it keeps a share of the tokens and gathers them again
    whole_input = op.kind == "linear" and op.split != "row" and not reads_share and not sequence
    return replace(cut, saved=op.saved) if whole_input else cut
