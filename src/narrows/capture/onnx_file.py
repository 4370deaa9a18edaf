"""An ONNX file read without trust: its nodes, constants and inputs, and the shape of every tensor at given sizes.

Nothing outside the file is opened (weights kept beside it stay there: their shapes are in the file), and what is
damaged or hostile ends in a NarrowsError that names the file and the node or tensor.
"""

import math
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from narrows.errors import NarrowsError
from narrows.graph import BF16, DTYPES, FP16, FP32, DType
from narrows.step import Step

if TYPE_CHECKING:
    import onnx

MAX_FILE = 2 * 10**9  # bytes; protobuf itself ends at 2 GiB
MAX_ELEMENTS = 2**56
MAX_VALUES = 4096  # larger constants are weights or tables: their shape is enough
OPSET = 13
STANDARD = ("", "ai.onnx")

# element types of TensorProto; integers take the byte size of the nearest type that machines have a peak for
_TYPES = {1: FP32, 2: DTYPES["int8"], 3: DTYPES["int8"], 4: FP16, 5: FP16, 6: FP32, 7: DTYPES["fp64"], 9: DTYPES["int8"], 10: FP16,
          11: DTYPES["fp64"], 12: FP32, 13: DTYPES["fp64"], 16: BF16, 17: DTYPES["fp8"], 18: DTYPES["fp8"], 19: DTYPES["fp8"],
          20: DTYPES["fp8"], 21: DTYPES["int4"], 22: DTYPES["int4"], 23: DTYPES["fp4"]}  # fmt: skip
_FLOATS = {1, 10, 11, 16, 17, 18, 19, 20, 23}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the graph at concrete sizes.

    value    its numbers, where they follow from sizes and constants and are few
    origin   the one stored tensor that it is computed from, if from one alone
    fixed    follows from sizes and constants: no data and no parameter goes in
    stored   how the origin's numbers are stored
    makers   the ops that it comes from
    """

    shape: tuple[int, ...]
    elem: int
    value: NDArray[Any] | None = None
    origin: str = ""
    fixed: bool = False
    stored: DType | None = None
    makers: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_parameter(self) -> bool:
        return bool(self.origin) and not self.fixed

    @property
    def dtype(self) -> DType:
        return _TYPES.get(self.elem, FP32)


@dataclass(frozen=True)
class Node:
    """One node: `name` for messages, `module` the path of the layer it belongs to ('' if the file does not say)."""

    proto: "onnx.NodeProto"
    name: str
    module: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def int(self, key: str, default: int = 0) -> int:
        value = self.attrs.get(key, default)
        return value if isinstance(value, int) else self._wrong(key)

    def ints(self, key: str, default: Sequence[int] = ()) -> tuple[int, ...]:
        value = self.attrs.get(key, default)
        return tuple(value) if isinstance(value, Sequence) and all(isinstance(v, int) for v in value) else self._wrong(key)

    def _wrong(self, key: str) -> Any:
        raise NarrowsError(f"attribute {key} is {self.attrs.get(key)!r}.", where=self.name, remedy="Export the model again.")


@dataclass(frozen=True)
class File:
    """What `read` gives: nodes in order, tensors that are stored or constant, and inputs with their dims."""

    path: str
    nodes: tuple[Node, ...]
    constants: Mapping[str, Tensor]
    inputs: tuple[tuple[str, int, tuple[int | str, ...]], ...]
    opset: int


def read(path: str | Path) -> File:
    """Parse and check a file. Raises NarrowsError for a missing extra, and for what is no ONNX model of opset 13 or newer."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise NarrowsError("reading ONNX needs the onnx package.", where=str(path), remedy="pip install 'narrows[onnx]'") from error
    where = str(path)
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE:
            problem = f"it has {status.st_size} bytes." if stat.S_ISREG(status.st_mode) else "it is no regular file."
            raise NarrowsError(problem, where=where, remedy="Give an .onnx file of at most 2 GB; larger weights lie beside it.")
        model = onnx.ModelProto.FromString(Path(path).read_bytes())
    except OSError as error:
        raise NarrowsError(f"cannot be read ({error.strerror}).", where=where, remedy="Give the path of an .onnx file.") from error
    except (DecodeError, ValueError) as error:
        if isinstance(error, NarrowsError):
            raise
        raise NarrowsError("not an ONNX file, or a damaged one.", where=where, remedy="Export or download it again.") from error
    try:
        return _file(model, where)
    except NarrowsError as error:
        raise error.inside(where) from error


def _file(model: "onnx.ModelProto", where: str) -> File:
    opset = max((o.version for o in model.opset_import if o.domain in STANDARD), default=0)
    again = "Export the model again."
    if not model.graph.node:
        raise NarrowsError("it holds no nodes.", where="graph", remedy=again)
    if opset < OPSET:
        raise NarrowsError(f"opset {opset} is too old.", where="opset_import", remedy=f"Export with opset {OPSET} or newer.")
    if model.functions or model.graph.sparse_initializer:
        what = "functions" if model.functions else "sparse initializers"
        raise NarrowsError(f"it has {what}, which are not read.", where="model", remedy="Inline them with onnx.inliner, or export dense.")
    constants = {t.name: stored_tensor(t, t.name) for t in model.graph.initializer}
    nodes = []
    for index, proto in enumerate(model.graph.node):
        node = _node(proto, index)
        if node.op == "Constant":
            constants[node.outputs[0]] = _constant(node)
        else:
            nodes.append(node)
    inputs = []
    for entry in model.graph.input:
        if entry.name in constants:
            continue
        if entry.type.WhichOneof("value") != "tensor_type" or not entry.type.tensor_type.HasField("shape"):
            raise NarrowsError("the input is no tensor of known rank.", where=entry.name, remedy=again)
        dims = tuple(d.dim_value if d.WhichOneof("value") == "dim_value" else d.dim_param for d in entry.type.tensor_type.shape.dim)
        inputs.append((entry.name, entry.type.tensor_type.elem_type, dims))
    return File(where, tuple(nodes), constants, tuple(inputs), opset)


def _node(proto: "onnx.NodeProto", index: int) -> Node:
    from onnx import AttributeProto, helper

    name = proto.name or f"{proto.op_type}_{index}"
    attrs = {}
    for attr in proto.attribute:
        if attr.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            remedy = "Export without control flow (a decoder: the file without the merged branches)."
            raise NarrowsError(f"{proto.op_type} holds a subgraph, which is not read.", where=name, remedy=remedy)
        try:
            attrs[attr.name] = helper.get_attribute_value(attr)
        except ValueError as error:
            raise NarrowsError(f"attribute {attr.name} is damaged.", where=name, remedy="Export the model again.") from error
    if not proto.output:
        raise NarrowsError("the node has no output.", where=name, remedy="Export the model again.")
    return Node(proto, name, _module(proto), proto.op_type, tuple(proto.input), tuple(proto.output), attrs)


def _module(proto: "onnx.NodeProto") -> str:
    """The path of the layer: from the exporter's scopes, or from a name like /model/layers.0/mlp/up_proj/MatMul."""
    import ast

    for entry in proto.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            try:
                scopes = ast.literal_eval(entry.value)  # a list of strings; literals only, no code
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                break
            return str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else ""
    return ".".join(part for part in proto.name.split("/")[:-1] if part)


def stored_tensor(proto: "onnx.TensorProto", where: str) -> Tensor:
    """A stored tensor: its shape from its dims, its numbers only if they are few and lie in this file."""
    from onnx import numpy_helper

    shape = checked(tuple(proto.dims), where)
    numel = math.prod(shape)
    outside = proto.data_location == 1 or len(proto.external_data) > 0
    bits = {23: 4, 21: 4, 22: 4}.get(proto.data_type, 8 * np.dtype(_width(proto.data_type)).itemsize)
    if proto.HasField("raw_data") and not outside and proto.data_type != 8 and len(proto.raw_data) != math.ceil(numel * bits / 8):
        problem = f"{len(proto.raw_data)} bytes are stored for shape {list(shape)}."
        raise NarrowsError(problem, where=where, remedy="The file is damaged: export or download it again.")
    value = None
    if not outside and numel <= MAX_VALUES and proto.data_type != 8:
        try:
            value = numpy_helper.to_array(proto)
        except (ValueError, TypeError, KeyError) as error:
            raise NarrowsError("its numbers do not fit its shape.", where=where, remedy="Export or download it again.") from error
    parameter = proto.data_type in _FLOATS and numel > 1
    stored = _TYPES.get(proto.data_type, FP32)
    return Tensor(shape, proto.data_type, value, proto.name if numel > 1 else "", not parameter, stored)


def _width(elem: int) -> str:
    return {1: "f4", 2: "u1", 3: "i1", 4: "u2", 5: "i2", 6: "i4", 7: "i8", 9: "u1", 10: "f2", 11: "f8", 12: "u4", 13: "u8",
            14: "c8", 15: "c16", 16: "u2"}.get(elem, "u1")  # fmt: skip


def _constant(node: Node) -> Tensor:
    from onnx import TensorProto

    for key, value in node.attrs.items():
        if key == "value" and isinstance(value, TensorProto):
            return replace(stored_tensor(value, node.name), origin=node.outputs[0] if math.prod(value.dims) > 1 else "")
        if key in ("value_int", "value_ints", "value_float", "value_floats"):
            array = np.asarray(value, dtype=np.int64 if "int" in key else np.float32)
            return Tensor(array.shape, 7 if "int" in key else 1, array if array.size <= MAX_VALUES else None, fixed=True)
    raise NarrowsError("the constant has no numbers that are read.", where=node.name, remedy="Export the model again.")


def checked(shape: tuple[int, ...], where: str) -> tuple[int, ...]:
    """The shape, if it is one that can exist."""
    if any(d < 0 for d in shape) or len(shape) > 16 or math.prod(shape) > MAX_ELEMENTS:
        raise NarrowsError(f"shape {list(shape)} is not possible.", where=where, remedy="Export the model again.")
    return shape


# --- sizes of the inputs

_BATCH = {"batch", "batch_size", "n", "b", "bs", "batch_dim", "batchsize"}
_SEQUENCE = {"sequence", "sequence_length", "seq", "seq_len", "seqlen", "seq_length", "t", "tokens", "num_tokens", "decoder_sequence_length"}
_PAST = {"past", "past_sequence", "past_sequence_length", "past_length", "past_len", "past_seq_len", "past_decoder_sequence_length"}
_SOURCE = {"source", "encoder_sequence", "encoder_sequence_length", "encoder_length", "src_len", "source_length"}
_TOTAL = {"total", "total_sequence", "total_sequence_length", "kv_sequence_length", "total_length"}
_ROLES: tuple[tuple[set[str], Callable[[Step], Any]], ...] = (
    (_BATCH, lambda s: s.batch), (_SEQUENCE, lambda s: s.new), (_PAST, lambda s: s.past), (_SOURCE, lambda s: s.source),
    (_TOTAL, lambda s: s.past + s.new),
)  # fmt: skip


def input_tensors(file: File, dims: Mapping[str, int | str]) -> tuple[Callable[[Step], dict[str, Tensor]], bool]:
    """The inputs at a step of one group, and whether any of their sizes follows the step.

    `dims` gives a named dim a number, or a role by another name: `{"height": 224, "s0": "sequence"}`; an unnamed
    dim is called `input.axis`. Raises NarrowsError for a dim that is neither known nor given, and for an unused one.
    """
    used: set[str] = set()

    def size(name: str) -> Callable[[Step], int]:
        parts = []
        for part in (p.strip(" ()") for p in name.split("+")):
            given = dims.get(part, part)
            used.update({part} & set(dims))
            role = next((role for names, role in _ROLES if str(given).lower() in names), None)
            if isinstance(given, int) and given > 0:
                parts.append(lambda step, n=given: n)
            elif role and isinstance(given, str):
                parts.append(lambda step, r=role: int(r(step).flat[0]))
            elif part.isdecimal() and len(part) < 10:
                parts.append(lambda step, n=int(part): n)
            else:
                problem = f"the size {part!r} is {'given as ' + repr(given) if part in dims else 'not known'}."
                remedy = f'Give it: dims={{"{part}": 8}}, or a role: batch, sequence, past, total, source.'
                raise NarrowsError(problem, where="inputs", remedy=remedy)
        return lambda step: sum(part(step) for part in parts)

    shapes: dict[str, tuple[int, tuple[int | Callable[[Step], int], ...]]] = {}
    for name, elem, shape in file.inputs:
        whole = dims.get(name)
        if whole is not None:
            raise NarrowsError(f"{name!r} is an input.", where="dims", remedy=f'Name one of its dims: "{name}.0".')
        sizes = [d if isinstance(d, int) and f"{name}.{i}" not in dims else size(d if isinstance(d, str) and d else f"{name}.{i}")
                 for i, d in enumerate(shape)]  # fmt: skip
        shapes[name] = elem, tuple(sizes)
    unused = sorted(set(dims) - used)
    if unused:
        names = sorted({d for _, _, shape in file.inputs for d in shape if isinstance(d, str)})
        raise NarrowsError(f"no input has a dim {unused[0]!r}.", where="dims", remedy=f"The named dims are {', '.join(names) or 'none'}.")

    def at(step: Step) -> dict[str, Tensor]:
        return {name: Tensor(checked(tuple(d if isinstance(d, int) else d(step) for d in shape), name), elem)
                for name, (elem, shape) in shapes.items()}  # fmt: skip

    return at, any(not isinstance(d, int) for _, shape in shapes.values() for d in shape)


# --- shapes and small values of results


def infer(file: File, node: Node, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """The outputs' types and shapes of a node of the standard operators, for inputs of known shape."""
    import onnx
    from onnx import defs, helper, numpy_helper, shape_inference

    try:
        schema = defs.get_schema(node.op, file.opset, "")
    except defs.SchemaError as error:
        raise NarrowsError(f"{node.op} is not an operator of opset {file.opset}.", where=node.name, remedy="Export it again.") from error
    types, data = {}, {}
    for name, tensor in zip(node.inputs, inputs, strict=True):
        if tensor is not None:
            types[name] = helper.make_tensor_type_proto(tensor.elem, tensor.shape)
            if tensor.value is not None and tensor.value.size <= 64:
                data[name] = numpy_helper.from_array(tensor.value)
    proto = node.proto
    if proto.op_type != node.op or proto.domain:
        proto = onnx.NodeProto()
        proto.CopyFrom(node.proto)
        proto.op_type, proto.domain = node.op, ""
    opsets = [helper.make_opsetid("", file.opset)]
    try:
        found = shape_inference.infer_node_outputs(schema, proto, types, data, opset_imports=opsets)
    except (shape_inference.InferenceError, RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
        first = str(error).strip().splitlines()[-1:] or ["no reason given"]
        raise NarrowsError(f"shapes do not fit {node.op} ({first[0][:160]}).", where=node.name, remedy="Export it again.") from error
    out = []
    for name in node.outputs:
        if not name:
            out.append(Tensor((), 1))
            continue
        kind = found.get(name)
        if kind is None or kind.WhichOneof("value") != "tensor_type" or not kind.tensor_type.HasField("shape") or any(
            d.WhichOneof("value") != "dim_value" for d in kind.tensor_type.shape.dim
        ):  # fmt: skip
            problem = f"the shape of {node.op}'s result depends on data."
            raise NarrowsError(problem, where=node.name, remedy="Fold its constants, or export it with fixed sizes.")
        shape = tuple(d.dim_value for d in kind.tensor_type.shape.dim)
        out.append(Tensor(checked(shape, node.name), kind.tensor_type.elem_type))
    return out


def _slice(v: list[Any], n: Node) -> Any:
    starts, ends = v[1], v[2]
    axes = v[3] if len(v) > 3 and v[3] is not None else np.arange(starts.size)
    steps = v[4] if len(v) > 4 and v[4] is not None else np.ones(starts.size, np.int64)
    index: list[slice] = [slice(None)] * v[0].ndim
    for start, end, axis, stride in zip(starts.flat, ends.flat, axes.flat, steps.flat, strict=True):
        stop = None if stride < 0 and end < -v[0].shape[int(axis)] else int(end)  # past the first element, going down
        index[int(axis)] = slice(int(start), stop, int(stride))
    return v[0][tuple(index)]


def _divide(v: list[Any], n: Node) -> Any:
    whole = np.issubdtype(v[0].dtype, np.integer)
    return np.trunc(np.divide(v[0], v[1])).astype(v[0].dtype) if whole else np.divide(v[0], v[1])


def _axes(v: list[Any], n: Node) -> tuple[int, ...] | None:
    axes = tuple(int(a) for a in v[1].flat) if len(v) > 1 and v[1] is not None else n.ints("axes")
    return axes or None


# what shape arithmetic is made of; anything else has a shape but no value
_FOLD: dict[str, Callable[[list[Any], Node], Any]] = {
    "Identity": lambda v, n: v[0], "Cast": lambda v, n: v[0].astype(_width(n.int("to"))), "Concat": lambda v, n: np.concatenate(v, n.int("axis")),
    "Gather": lambda v, n: np.take(v[0], v[1].astype(np.int64), n.int("axis")), "Slice": _slice, "Div": _divide,
    "Unsqueeze": lambda v, n: np.expand_dims(v[0], _axes(v, n) or 0), "Squeeze": lambda v, n: np.squeeze(v[0], _axes(v, n)),
    "Add": lambda v, n: np.add(v[0], v[1]), "Sub": lambda v, n: np.subtract(v[0], v[1]), "Mul": lambda v, n: np.multiply(v[0], v[1]),
    "Mod": lambda v, n: np.mod(v[0], v[1]), "Neg": lambda v, n: -v[0], "Sqrt": lambda v, n: np.sqrt(v[0]), "Ceil": lambda v, n: np.ceil(v[0]),
    "Floor": lambda v, n: np.floor(v[0]), "Min": lambda v, n: np.minimum.reduce(v), "Max": lambda v, n: np.maximum.reduce(v),
    "Equal": lambda v, n: v[0] == v[1], "Less": lambda v, n: v[0] < v[1], "Greater": lambda v, n: v[0] > v[1], "Not": lambda v, n: ~v[0],
    "And": lambda v, n: v[0] & v[1], "Or": lambda v, n: v[0] | v[1], "Where": lambda v, n: np.where(v[0], v[1], v[2]),
    "ReduceProd": lambda v, n: np.prod(v[0], _axes(v, n), keepdims=bool(n.int("keepdims", 1))),
    "Range": lambda v, n: np.arange(v[0].item(), v[1].item(), v[2].item(), v[0].dtype),
}  # fmt: skip


def fold(node: Node, inputs: Sequence[Tensor | None], out: Tensor) -> NDArray[Any] | None:
    """The numbers of a result of shape arithmetic, or None where they are many or not that simple."""
    if node.op in ("Shape", "Size") and inputs[0] is not None:
        whole = np.array(inputs[0].shape, np.int64)
        return whole.prod() if node.op == "Size" else whole[node.int("start") : node.attrs.get("end")]
    values = [None if t is None else t.value for t in inputs]
    if out.numel > MAX_VALUES or not inputs or any(v is None and t is not None for v, t in zip(values, inputs, strict=True)):
        return None
    if node.op in ("Reshape", "Expand"):
        shaped = np.broadcast_to if node.op == "Expand" else np.reshape
        return shaped(values[0], out.shape)  # type: ignore[arg-type]
    if node.op == "ConstantOfShape":
        given = node.attrs.get("value")
        filled = stored_tensor(given, node.name).value if given is not None else np.zeros(1, np.float32)
        return None if filled is None else np.broadcast_to(filled.flat[0], out.shape)
    rule = _FOLD.get(node.op)
    with np.errstate(all="ignore"):
        result = None if rule is None else np.asarray(rule(values, node))
    return result if result is not None and result.shape == out.shape else None
