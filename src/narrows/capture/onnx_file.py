"""An ONNX file read without trust: its nodes, its constants and the dims of its inputs.

Nothing outside the file is opened (weights kept beside it stay there: their shapes are in the file), and what is
damaged or hostile ends in a NarrowsError that names the file and the node or tensor.
"""

import math
import stat
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from narrows.errors import NarrowsError
from narrows.graph import BF16, DTYPES, FP8, FP16, FP32, INT8, DType

if TYPE_CHECKING:
    import onnx

MAX_FILE = 2 * 10**9  # bytes; protobuf itself ends at 2 GiB
MAX_ELEMENTS = 2**56
MAX_VALUES = 4096  # larger constants are weights or tables: their shape is enough
OPSET = 13
STANDARD, MICROSOFT = ("", "ai.onnx"), "com.microsoft"

# element types of TensorProto; an index or a mask takes the type of its byte size that machines have a peak for
_BYTE, _NIBBLE, _LONG, _FP8 = INT8, DTYPES["int4"], DTYPES["fp64"], FP8
_TYPES = {1: FP32, 2: _BYTE, 3: _BYTE, 4: FP16, 5: FP16, 6: FP32, 7: _LONG, 9: _BYTE, 10: FP16, 11: _LONG, 12: FP32, 13: _LONG,
          16: BF16, 17: _FP8, 18: _FP8, 19: _FP8, 20: _FP8, 21: _NIBBLE, 22: _NIBBLE, 23: DTYPES["fp4"],
          24: _FP8, 25: DType("int2", 2), 26: DType("int2", 2), 27: DType("fp6", 6), 28: DType("fp6", 6)}  # fmt: skip
_NUMPY = {1: "f4", 2: "u1", 3: "i1", 4: "u2", 5: "i2", 6: "i4", 7: "i8", 9: "?", 10: "f2", 11: "f8", 12: "u4", 13: "u8", 14: "c8",
          15: "c16", 16: "u2"}  # fmt: skip
_FLOATS = {1, 10, 11, 16, 17, 18, 19, 20, 23, 27, 28}
_BITS = {21: 4, 22: 4, 23: 4, 25: 2, 26: 2, 27: 6, 28: 6}  # of those packed into bytes
_TEXT = 8
_DATA = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def damaged(problem: str, where: str) -> NarrowsError:
    """The error for what no exporter writes."""
    return NarrowsError(problem, where=where, remedy="Export or download the model again.")


def text(value: str | bytes, what: str) -> str:
    """A string of the file; damaged ones come as bytes."""
    if not isinstance(value, str):
        raise damaged(f"{value!r} is no text.", what)
    return value


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
    settings: bytes = b""  # the attributes as they are stored

    def number(self, key: str, default: int = 0) -> int:
        value = self.attrs.get(key, default)
        return value if isinstance(value, int) else self._wrong(key)

    def numbers(self, key: str, default: Sequence[int] = ()) -> tuple[int, ...]:
        value = self.attrs.get(key, default)
        return tuple(value) if isinstance(value, Sequence) and all(isinstance(v, int) for v in value) else self._wrong(key)

    def _wrong(self, key: str) -> Any:
        raise damaged(f"attribute {key} is {self.attrs.get(key)!r}.", self.name)


@dataclass(frozen=True)
class File:
    """What `read` gives: nodes in order, tensors that are stored or constant, and inputs with their dims."""

    path: str
    nodes: tuple[Node, ...]
    constants: Mapping[str, Tensor]
    inputs: tuple[tuple[str, int, tuple[int | str, ...]], ...]
    opset: int
    known: dict[Hashable, list[Tensor]] = field(default_factory=dict)  # results found before: layers repeat


def read(path: str | Path) -> File:
    """Parse and check a file. Raises NarrowsError for a missing extra, and for what is no ONNX model of opset 13 or newer."""
    where = str(path)
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError as error:
        raise NarrowsError("reading ONNX needs the onnx package.", where=where, remedy="pip install 'narrows[onnx]'") from error
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE:
            problem = f"it has {status.st_size} bytes." if stat.S_ISREG(status.st_mode) else "it is no regular file."
            raise NarrowsError(problem, where=where, remedy="Give an .onnx file of at most 2 GB; weights may lie beside it.")
        model = onnx.ModelProto.FromString(Path(path).read_bytes())
    except OSError as error:
        remedy = "Give the path of an .onnx file."
        raise NarrowsError(f"cannot be read ({error.strerror}).", where=where, remedy=remedy) from error
    except DecodeError as error:
        raise damaged("not an ONNX file, or a damaged one.", where) from error
    try:
        return _checked(model, where)
    except NarrowsError as error:
        raise error.inside(where) from error


def _checked(model: "onnx.ModelProto", where: str) -> File:
    opset = max((o.version for o in model.opset_import if o.domain in STANDARD), default=0)
    if not model.graph.node:
        raise damaged("it holds no nodes.", "graph")
    if opset < OPSET:
        raise NarrowsError(f"opset {opset} is too old.", where="opset_import", remedy=f"Export with opset {OPSET} or newer.")
    if model.functions or model.graph.sparse_initializer:
        what = "functions" if model.functions else "sparse initializers"
        remedy = "Inline them with onnx.inliner, or export dense tensors."
        raise NarrowsError(f"it has {what}, which are not read.", where="model", remedy=remedy)
    constants = {text(t.name, "initializer"): stored_tensor(t, t.name) for t in model.graph.initializer}
    nodes = []
    for index, proto in enumerate(model.graph.node):
        node = _node(proto, index)
        if node.op == "Constant":
            constants[node.outputs[0]] = _constant(node)
        else:
            nodes.append(node)
    made = Counter(name for node in nodes for name in node.outputs if name)
    made.update(constants.keys())
    twice = [name for name, count in made.items() if count > 1]
    if twice:
        raise damaged(f"{twice[0]!r} is made twice.", "graph")
    inputs = []
    for entry in model.graph.input:
        if entry.name in constants:
            continue
        kind = entry.type.tensor_type
        if entry.type.WhichOneof("value") != "tensor_type" or not kind.HasField("shape"):
            remedy = "Export it with tensors as inputs, of known rank."
            raise NarrowsError("the input is no tensor of known rank.", where=entry.name, remedy=remedy)
        dims = tuple(d.dim_value if d.WhichOneof("value") == "dim_value" else text(d.dim_param, "dim") for d in kind.shape.dim)
        inputs.append((text(entry.name, "input"), kind.elem_type, dims))
    return File(where, tuple(nodes), constants, tuple(inputs), opset)


def _node(proto: "onnx.NodeProto", index: int) -> Node:
    from onnx import AttributeProto, helper

    op = text(proto.op_type, f"node {index}")
    name = text(proto.name, f"node {index}") or f"{op}_{index}"
    text(proto.domain, name)
    inputs, outputs = (tuple(text(n, name) for n in names) for names in (proto.input, proto.output))
    attrs = {}
    for attr in proto.attribute:
        if attr.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            remedy = "Export without control flow (a decoder: the file without the merged branches)."
            raise NarrowsError(f"{proto.op_type} holds a subgraph, which is not read.", where=name, remedy=remedy)
        try:
            attrs[text(attr.name, name)] = helper.get_attribute_value(attr)
        except ValueError as error:
            raise damaged(f"attribute {attr.name} is damaged.", name) from error
    if not outputs:
        raise damaged("the node has no output.", name)
    return Node(proto, name, _module(proto), op, inputs, outputs, attrs, b"".join(a.SerializeToString() for a in proto.attribute))


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
    bits = _BITS.get(proto.data_type, 8 * np.dtype(numpy_type(proto.data_type)).itemsize)
    data = proto.HasField("raw_data") or any(len(getattr(proto, name)) for name in _DATA)  # a file may come without its weights
    readable = data and not outside and proto.data_type != _TEXT
    if readable and proto.HasField("raw_data") and len(proto.raw_data) != math.ceil(numel * bits / 8):
        raise damaged(f"{len(proto.raw_data)} bytes are stored for shape {list(shape)}.", where)
    value = None
    if readable and numel <= MAX_VALUES:
        try:
            value = numpy_helper.to_array(proto)
        except (ValueError, TypeError, KeyError) as error:
            raise damaged("its numbers do not fit its shape.", where) from error
    parameter = proto.data_type in _FLOATS and numel > 1
    stored = _TYPES.get(proto.data_type, FP32)
    return Tensor(shape, proto.data_type, value, proto.name if numel > 1 else "", not parameter, stored)


def numpy_type(elem: int) -> str:
    """The numpy type of an element type; types of a byte or less are bytes."""
    return _NUMPY.get(elem, "u1")


def _constant(node: Node) -> Tensor:
    from onnx import TensorProto

    for key, value in node.attrs.items():
        if key == "value" and isinstance(value, TensorProto):
            return replace(stored_tensor(value, node.name), origin=node.outputs[0] if math.prod(value.dims) > 1 else "")
        if key in ("value_int", "value_ints", "value_float", "value_floats"):
            array = np.asarray(value, dtype=np.int64 if "int" in key else np.float32)
            return Tensor(array.shape, 7 if "int" in key else 1, array if array.size <= MAX_VALUES else None, fixed=True)
    raise damaged("the constant has no numbers that are read.", node.name)


def checked(shape: tuple[int, ...], where: str) -> tuple[int, ...]:
    """The shape, if it is one that can exist."""
    if any(d < 0 for d in shape) or len(shape) > 16 or math.prod(shape) > MAX_ELEMENTS:
        raise damaged(f"shape {list(shape)[:16]} is not possible.", where)
    return shape


def need(node: Node, ins: Sequence[Tensor | None], index: int) -> Tensor:
    """An input that the operator cannot do without."""
    tensor = ins[index] if index < len(ins) else None
    if tensor is None:
        raise damaged(f"{node.op} lacks input {index}.", node.name)
    return tensor


def turned(tensor: Tensor, swap: int) -> tuple[int, ...]:
    """Its shape, with the last two axes swapped if asked."""
    return (*tensor.shape[:-2], *tensor.shape[:-3:-1]) if swap else tensor.shape
