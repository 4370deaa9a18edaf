"""The shape of every tensor of an ONNX file at one concrete step, and the few values that shapes depend on."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrows.capture.onnx_attention import fused_sizes
from narrows.capture.onnx_file import (
    MAX_VALUES,
    MICROSOFT,
    STANDARD,
    File,
    Node,
    Tensor,
    checked,
    damaged,
    need,
    numpy_type,
    stored_tensor,
    turned,
)
from narrows.errors import NarrowsError
from narrows.step import Step

# what a dim may be: the names that exporters give it, and its size in a step
_ROLES: dict[str, tuple[str, Callable[[Step], Any]]] = {
    "batch": ("batch_size batchsize batch_dim n b bs", lambda s: s.batch),
    "sequence": ("sequence_length seq seq_len seqlen seq_length t tokens num_tokens decoder_sequence_length", lambda s: s.new),
    "past": ("past_sequence past_sequence_length past_length past_len past_seq_len", lambda s: s.past),
    "source": ("encoder_sequence encoder_sequence_length encoder_length source_length src_len", lambda s: s.source),
    "total": ("total_sequence total_sequence_length total_length kv_sequence_length", lambda s: s.past + s.new),
}
# operators of onnxruntime (and one it keeps among the standard ones) whose results have the shape of their first input
_SAME = {"FastGelu", "BiasGelu", "QuickGelu", "RotaryEmbedding", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
         "SimplifiedLayerNormalization"}  # fmt: skip
_SMALL = 64  # numbers that a shape may depend on: axes, sizes, bounds
_AS_STANDARD = {"FusedConv": "Conv", "Gelu": "Gelu"}


def input_tensors(file: File, dims: Mapping[str, int | str]) -> tuple[Callable[[Step], dict[str, Tensor]], set[str]]:
    """The inputs at a step of one group, and which of its sizes they follow: batch, sequence, past, source, total.

    `dims` gives a named dim a number, or a role by another name: `{"height": 224, "s0": "sequence"}`; an unnamed
    dim is called `input.axis`. Raises NarrowsError for a dim that is neither known nor given, and for an unused one.
    """
    used: set[str] = set()
    roles: set[str] = set()

    def term(name: str) -> Callable[[Step], int]:
        given = dims.get(name, int(name) if name.isdecimal() and len(name) < 10 else name)
        used.add(name)
        if isinstance(given, int) and given > 0:
            return lambda step: given
        for role, (names, size) in _ROLES.items():
            if str(given).lower() in (role, *names.split()):
                roles.add(role)
                return lambda step: int(size(step).flat[0])
        problem = f"the size {name!r} is {f'given as {given!r}' if name in dims else 'not known'}."
        remedy = f'Give it (--dim {name}=8, or dims={{"{name}": 8}} in Python), or say which it is: {", ".join(_ROLES)}.'
        raise NarrowsError(problem, where="inputs", remedy=remedy)

    def total(name: str) -> Callable[[Step], int]:  # exporters also write sums, like past_sequence_length + 1
        terms = [term(part.strip(" ()")) for part in name.split("+")]
        return lambda step: sum(part(step) for part in terms)

    shapes: dict[str, tuple[int, tuple[int | Callable[[Step], int], ...]]] = {}
    for name, elem, shape in file.inputs:
        keys = [f"{name}.{axis}" if not d or f"{name}.{axis}" in dims else d for axis, d in enumerate(shape)]
        shapes[name] = elem, tuple(total(key) if isinstance(key, str) else key for key in keys)
    unused = sorted(set(dims) - used)
    if unused:
        names = sorted({d for _, _, shape in file.inputs for d in shape if isinstance(d, str)})
        remedy = f"The named dims are {', '.join(names) or 'none'}; the first of an input x is x.0."
        raise NarrowsError(f"no input has a dim {unused[0]!r}.", where="dims", remedy=remedy)

    def at(step: Step) -> dict[str, Tensor]:
        return {name: Tensor(checked(tuple(d if isinstance(d, int) else d(step) for d in shape), name), elem)
                for name, (elem, shape) in shapes.items()}  # fmt: skip

    return at, roles


def results(file: File, node: Node, ins: Sequence[Tensor | None]) -> list[Tensor]:
    """Types and shapes of a node's outputs. Raises NarrowsError for an operator that is not described."""
    domain, first = node.proto.domain, need(node, ins, 0) if node.inputs else None
    if domain in STANDARD and node.op not in _SAME - {"RotaryEmbedding"}:
        return _infer(file, node, node.op, ins)
    if domain in (*STANDARD, MICROSOFT) and first is not None:
        if node.op in _AS_STANDARD:
            return _infer(file, node, _AS_STANDARD[node.op], ins)
        if node.op in _SAME:
            return [Tensor(first.shape, first.elem)] * len(node.outputs)
        shape = _products(node, ins, first)
        if shape is not None:
            return [Tensor(checked(shape[0], node.name), shape[1]), *[Tensor((), first.elem)] * (len(node.outputs) - 1)]
        if node.op in ("Attention", "MultiHeadAttention", "GroupQueryAttention"):
            f = fused_sizes(node, ins)
            cache = (f.batch, f.kv_heads, f.past + f.keys, f.head_dim)
            kept = Tensor(checked((2, *cache) if node.op == "Attention" else cache, node.name), first.elem)
            out = checked((f.batch, f.queries, f.heads * f.value_dim), node.name)
            return [Tensor(out, first.elem), *[kept] * (len(node.outputs) - 1)]
    remedy = "Export it as standard operators, inlined."
    raise NarrowsError(f"{domain}.{node.op} is not described.", where=node.name, remedy=remedy)


def _products(node: Node, ins: Sequence[Tensor | None], first: Tensor) -> tuple[tuple[int, ...], int] | None:
    """Shape and type of what onnxruntime's own matrix products give."""
    if node.op == "FusedMatMul":
        a, b = turned(first, node.number("transA")), turned(need(node, ins, 1), node.number("transB"))
        return (*max(a[:-2], b[:-2], key=len), a[-2], b[-1]), first.elem
    if node.op == "MatMulNBits":
        return (*first.shape[:-1], node.number("N")), first.elem
    if node.op in ("MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
        scale = need(node, ins, 2)
        return (*first.shape[:-1], need(node, ins, 1).shape[-1]), scale.elem
    if node.op == "GatherBlockQuantized":
        packed = 8 // node.number("bits", 4) if first.elem == 2 else 1  # bytes hold several numbers, int4 tensors do not say so
        return (*need(node, ins, 1).shape, first.shape[-1] * packed), need(node, ins, 2).elem
    return None


def _infer(file: File, node: Node, op: str, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """The outputs of a standard operator, by onnx's own rules."""
    values = [t.value if t is not None and t.value is not None and t.value.size <= _SMALL else None for t in inputs]
    sizes = tuple(t and (t.elem, t.shape, None if v is None else v.tobytes()) for t, v in zip(inputs, values, strict=True))
    key = (op, node.settings, sizes, tuple(map(bool, node.outputs)))
    if key not in file.known:
        file.known[key] = _ask(file, node, op, inputs, values)
    return file.known[key]


def _ask(file: File, node: Node, op: str, inputs: Sequence[Tensor | None], values: Sequence[NDArray[Any] | None]) -> list[Tensor]:
    import onnx
    from onnx import checker, defs, helper, numpy_helper, shape_inference

    try:
        schema = defs.get_schema(op, file.opset if op != "Gelu" else max(file.opset, 20), "")
    except defs.SchemaError as error:
        remedy = "Export it as standard operators."
        raise NarrowsError(f"{op} is not an operator of opset {file.opset}.", where=node.name, remedy=remedy) from error
    types, data = {}, {}
    for name, tensor, value in zip(node.inputs, inputs, values, strict=True):
        if tensor is not None:
            types[name] = helper.make_tensor_type_proto(tensor.elem, tensor.shape)
        if value is not None:
            data[name] = numpy_helper.from_array(value)
    proto = node.proto
    if proto.domain:
        proto = onnx.NodeProto()
        proto.CopyFrom(node.proto)
        proto.op_type, proto.domain = op, ""
    try:
        opsets = [helper.make_opsetid("", file.opset)]
        found = shape_inference.infer_node_outputs(schema, proto, types, data, opset_imports=opsets)
    except (shape_inference.InferenceError, checker.ValidationError, RuntimeError, ValueError, TypeError, LookupError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[-1]
        raise damaged(f"the inputs do not fit {op} ({reason[:160]}).", node.name) from error
    return [_shaped(node, found.get(name)) if name else Tensor((), 1) for name in node.outputs]


def _shaped(node: Node, kind: Any) -> Tensor:
    if kind is not None and kind.WhichOneof("value") == "tensor_type" and kind.tensor_type.HasField("shape"):
        dims = kind.tensor_type.shape.dim
        if all(d.WhichOneof("value") == "dim_value" for d in dims):
            return Tensor(checked(tuple(d.dim_value for d in dims), node.name), kind.tensor_type.elem_type)
    problem = f"the shape of {node.op}'s result depends on data."
    raise NarrowsError(problem, where=node.name, remedy="Fold its constants, or export it with fixed sizes.")


def _slice(v: list[Any], n: Node) -> Any:
    starts, ends = v[1], v[2]
    axes = v[3] if len(v) > 3 and v[3] is not None else np.arange(starts.size)
    strides = v[4] if len(v) > 4 and v[4] is not None else np.ones(starts.size, np.int64)
    index: list[slice] = [slice(None)] * v[0].ndim
    for start, end, axis, stride in zip(starts.flat, ends.flat, axes.flat, strides.flat, strict=True):
        stop = None if stride < 0 and end < -v[0].shape[int(axis)] else int(end)  # past the first element, going down
        index[int(axis)] = slice(int(start), stop, int(stride))
    return v[0][tuple(index)]


def _divide(v: list[Any], n: Node) -> Any:
    whole = np.issubdtype(v[0].dtype, np.integer)
    return np.trunc(np.divide(v[0], v[1])).astype(v[0].dtype) if whole else np.divide(v[0], v[1])


def _axes(v: list[Any], n: Node) -> tuple[int, ...] | None:
    axes = tuple(int(a) for a in v[1].flat) if len(v) > 1 and v[1] is not None else n.numbers("axes")
    return axes or None


_UFUNCS: dict[str, np.ufunc] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Mod": np.mod, "Neg": np.negative, "Sqrt": np.sqrt, "Ceil": np.ceil,
    "Floor": np.floor, "Equal": np.equal, "Less": np.less, "Greater": np.greater, "Not": np.logical_not, "And": np.logical_and,
    "Or": np.logical_or,
}  # fmt: skip
# what shape arithmetic is made of; the result of any other operator has a shape, but no value here
_FOLD: dict[str, Callable[[list[Any], Node], Any]] = {
    "Identity": lambda v, n: v[0],
    "Cast": lambda v, n: v[0].astype(numpy_type(n.number("to"))),
    "Concat": lambda v, n: np.concatenate(v, n.number("axis")),
    "Gather": lambda v, n: np.take(v[0], v[1].astype(np.int64), n.number("axis")),
    "Slice": _slice,
    "Unsqueeze": lambda v, n: np.expand_dims(v[0], _axes(v, n) or 0),
    "Squeeze": lambda v, n: np.squeeze(v[0], _axes(v, n)),
    "Range": lambda v, n: v[0] + v[2] * np.arange(math.ceil((v[1] - v[0]) / v[2])),
    "ReduceProd": lambda v, n: np.prod(v[0], _axes(v, n), keepdims=bool(n.number("keepdims", 1))),
    "Where": lambda v, n: np.where(v[0], v[1], v[2]),
    "Div": _divide,
    "Min": lambda v, n: functools.reduce(np.minimum, v),
    "Max": lambda v, n: functools.reduce(np.maximum, v),
}  # fmt: skip


def fold(node: Node, inputs: Sequence[Tensor | None], out: Tensor) -> NDArray[Any] | None:
    """The numbers of a result of shape arithmetic, or None where they are many or no such arithmetic."""
    if node.op in ("Shape", "Size") and inputs and inputs[0] is not None:
        whole = np.array(inputs[0].shape, np.int64)
        end = node.number("end", len(whole))
        return np.asarray(whole.prod()) if node.op == "Size" else whole[node.number("start") : end]
    values = [None if t is None else t.value for t in inputs]
    if out.numel > MAX_VALUES or any(v is None and t is not None for v, t in zip(values, inputs, strict=True)):
        return None
    if node.op in ("Reshape", "Expand") and values[0] is not None:
        return np.broadcast_to(values[0], out.shape) if node.op == "Expand" else np.reshape(values[0], out.shape)
    if node.op == "ConstantOfShape":
        given = node.attrs.get("value")
        filled = np.zeros(1, np.float32) if given is None else stored_tensor(given, node.name).value
        return None if filled is None else np.broadcast_to(filled.reshape(-1)[:1], out.shape)
    rule, plain = _FOLD.get(node.op), _UFUNCS.get(node.op)
    if rule is None and plain is None:
        return None
    with np.errstate(all="ignore"):
        result = np.asarray(rule(values, node) if rule else plain(*values))  # type: ignore[misc]
    return result if result.shape == out.shape else None
