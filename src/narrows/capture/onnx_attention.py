"""Attention in ONNX files: as one operator, or written out as two products around a Softmax."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from narrows.capture.onnx_file import MICROSOFT, File, Node, Tensor, damaged, need

_PRODUCTS = {"MatMul", "FusedMatMul"}
_BETWEEN = {"Add", "Sub", "Mul", "Div", "Where", "Cast", "Reshape", "Max", "Tanh", "IsNaN", "Dropout", "Identity"}
_REACH = 8  # nodes between a product and the Softmax, at most


@dataclass(frozen=True)
class Block:
    """Names of the tensors of one attention that is written out."""

    query: str
    keys: str
    values: str
    scores: str


@dataclass(frozen=True)
class Layout:
    """The edges of a graph, and its written-out attention: by the id of the last product, and the ids of the nodes inside."""

    makers: dict[str, Node]
    users: dict[str, list[Node]]
    ends: dict[int, Block]
    inside: set[int]


def find_blocks(file: File) -> Layout:
    """Find MatMul - [scale] - [mask] - Softmax - MatMul of data alone (a product with a parameter is a linear layer)."""
    makers = {out: node for node in file.nodes for out in node.outputs}
    users: dict[str, list[Node]] = {}
    for node in file.nodes:
        for name in node.inputs:
            users.setdefault(name, []).append(node)
    layout = Layout(makers, users, {}, set())

    def holds_parameter(node: Node) -> bool:
        return any(n in file.constants and file.constants[n].is_parameter for n in node.inputs)

    def is_product(node: Node) -> bool:
        return node.op in _PRODUCTS and len(node.inputs) == 2

    def above(name: str, reach: int = _REACH) -> list[Node]:
        node = makers.get(name)
        if node is None or not reach or holds_parameter(node):
            return []
        if is_product(node):
            return [node]
        return next(([*path, node] for n in node.inputs if (path := above(n, reach - 1))), []) if node.op in _BETWEEN else []

    def below(name: str, reach: int = _REACH) -> list[Node]:
        for node in users.get(name, []) if reach else []:
            if is_product(node) and node.inputs[0] == name and not holds_parameter(node):
                return [node]
            if node.op in _BETWEEN and (path := below(node.outputs[0], reach - 1)):
                return [node, *path]
        return []

    for node in file.nodes:
        if node.op == "Softmax" and node.inputs and (first := above(node.inputs[0])) and (last := below(node.outputs[0])):
            product, final = first[0], last[-1]
            layout.ends[id(final)] = Block(product.inputs[0], product.inputs[1], final.inputs[1], product.outputs[0])
            checks = [n for n in users[node.outputs[0]] if n.op == "IsNaN"]
            layout.inside.update(id(n) for n in (*first, node, *last[:-1], *checks))
    return layout


@dataclass(frozen=True)
class Fused:
    """Sizes of one attention operator: tokens of a sequence it asks for and reads, and those in its cache before."""

    batch: int
    queries: int
    keys: int
    past: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    causal: bool
    cached: bool


def fused_sizes(node: Node, ins: Sequence[Tensor | None]) -> Fused:
    """Read them off the inputs: [B, T, H d] or [B, H, T, d] each, or queries, keys and values packed in the first one.

    Raises NarrowsError where the heads are missing or do not divide.
    """
    x = need(node, ins, 0).shape
    one, two, three, four, six = (ins[i].shape if i < len(ins) and ins[i] is not None else None for i in (1, 2, 3, 4, 6))  # type: ignore[union-attr]
    standard, group = node.proto.domain != MICROSOFT, node.op == "GroupQueryAttention"
    past = four if standard or node.op == "Attention" else three if group else six
    causal = group or bool(node.number("is_causal" if standard else "unidirectional"))
    if standard and len(x) == 4 and one and two:
        return Fused(x[0], x[2], one[2], past[2] if past else 0, x[1], one[1], x[3], two[3], causal, past is not None)
    heads = node.number("q_num_heads" if standard else "num_heads")
    kv_heads = node.number("kv_num_heads", heads)
    if heads < 1 or kv_heads < 1 or len(x) < 3:
        raise damaged("it does not say how many heads it has.", node.name)
    before = past[-2] if past and len(past) > 2 else 0
    weight = one if node.op == "Attention" and not standard else None
    if weight is not None or one is None:  # one packed input, or one made by the packed weight
        total = weight[-1] if weight else math.prod(x[2:])
        width, rest = divmod(total, heads + 2 * kv_heads)
        keys, value = x[1], width
    else:
        values = two or one
        (width, rest), keys = divmod(x[2], heads), one[2] if len(one) == 4 else one[1]
        value = values[3] if len(values) == 4 else values[2] // kv_heads
    if rest or not width:
        raise damaged(f"{heads} heads do not divide its width.", node.name)
    return Fused(x[0], x[1], keys, before, heads, kv_heads, width, value, causal, past is not None)
