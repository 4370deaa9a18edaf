"""Tensors of a PyTorch checkpoint (a saved state dict) as data: its pickle is read like a text, never run.

A pickle is a program. The standard library's lexer tells its instructions apart, the few that a table of tensors consists
of are followed, names of classes are compared with a short list; nothing is imported or called, and any other instruction
or name is refused. Read are zip archives (torch 1.6 and later, uncompressed as torch writes them) and the older files of
five pickles and then the data.
"""

import io
import math
import os
import struct
import zipfile
from pathlib import Path
from pickletools import genops
from typing import Any, BinaryIO, NamedTuple

from narrows.errors import NarrowsError
from narrows.headers import TensorInfo, is_count, opened

LONGEST = 2**22  # bytes of pickle: some 20,000 tensors
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # what the first two pickles of an older file say
_SAVED = "save its weights as safetensors"
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32", "Short": "I16",
    "Char": "I8", "Byte": "U8", "Bool": "BOOL",
}  # fmt: skip
_STORED = {f"torch {kind}Storage": dtype for kind, dtype in _STORAGES.items()}
_TABLE, _TENSOR, _PARAMETER = "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
# what the lexer, the zip reader and an empty stack raise; names with odd escapes are a warning to the lexer, or an error
_MALFORMED = (
    ValueError, IndexError, KeyError, OverflowError, NotImplementedError, zipfile.BadZipFile, struct.error, DeprecationWarning,
)  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")


class _Name(NamedTuple):
    """A class or function that a pickle names."""

    name: str


class _Storage(NamedTuple):
    """A run of numbers that tensors are views of; `key` says where its bytes are."""

    dtype: str
    key: str
    numbers: int


class _View(NamedTuple):
    """A tensor as a pickle tells it, offset and strides in numbers."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_archive(path: str | Path) -> dict[str, TensorInfo]:
    """What a `.bin` file of a state dict holds, by name, without its data and without torch.

    Raises NarrowsError for an instruction or a name that no state dict needs, for tensors that do not lie within their
    storage, and for a file that is truncated or of another kind.
    """
    path = Path(path)
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            views, places = (_zipped if file.read(2) == b"PK" else _in_a_row)(file, size)
            return {name: _placed(view, places, path) for name, view in views.items()}
        except NarrowsError as error:
            raise error.inside(str(path)) from error
        except _MALFORMED as error:
            problem = f"is not a state dict that torch saved whole ({error})."
            raise NarrowsError(problem, where=str(path), remedy=f"Get the file again, or {_SAVED}.") from error


def _placed(view: _View, places: dict[str, tuple[int, int]], path: Path) -> TensorInfo:
    """Where in the file a tensor is; no two of its numbers may be the same one, which bounds its size by the file's."""
    dtype, key, stored = view.storage
    begin, length = places[key]
    numbers = math.prod(view.shape)
    span = 1 + sum((n - 1) * step for n, step in zip(view.shape, view.stride, strict=True)) if numbers else 0
    if numbers > span or view.offset + span > min(stored, length // _BYTES[dtype]):
        raise ValueError(f"{list(view.shape)} numbers do not lie within storage {key!r}")
    begin += view.offset * _BYTES[dtype]
    rows = tuple(math.prod(view.shape[axis + 1 :]) for axis in range(len(view.shape)))
    plain = all(n == 1 or step == row for n, step, row in zip(view.shape, view.stride, rows, strict=True))
    return TensorInfo(dtype, view.shape, begin, begin + span * _BYTES[dtype], path, () if plain else view.stride)


def _zipped(file: BinaryIO, size: int) -> tuple[dict[str, _View], dict[str, tuple[int, int]]]:
    """The tensors of a zip archive, and the (first byte, bytes) of each storage."""
    found: dict[str, tuple[int, int]] = {}
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            file.seek(max(entry.header_offset, 0))
            mark, name_bytes, extra_bytes = struct.unpack("<4s22xHH", file.read(30))
            begin, length, name = file.tell() + name_bytes + extra_bytes, entry.file_size, entry.filename
            if mark != b"PK\3\4" or entry.compress_type or entry.flag_bits & 1 or begin + length > size or name in found:
                raise ValueError(f"{name!r} is damaged, there twice, compressed or encrypted")
            found[name] = begin, length
    (root,) = (name.removesuffix("data.pkl") for name in found if name.endswith("/data.pkl"))
    if f"{root}byteorder" in found and _bytes_of(file, *found[f"{root}byteorder"]) != b"little":
        raise ValueError("its numbers are big-endian")
    views = _tensors(_read_pickle(io.BytesIO(_bytes_of(file, *found[f"{root}data.pkl"]))))
    return views, {name.removeprefix(f"{root}data/"): place for name, place in found.items()}


def _bytes_of(file: BinaryIO, begin: int, length: int) -> bytes:
    if length > LONGEST:
        raise ValueError(f"a pickle of {length} bytes is too long")
    file.seek(begin)
    return file.read(length)


def _in_a_row(file: BinaryIO, size: int) -> tuple[dict[str, _View], dict[str, tuple[int, int]]]:
    """The same of an older file: magic number, protocol, about the system, tensors, keys; then each storage behind its count."""
    head = io.BytesIO(_bytes_of(file, 0, min(size, LONGEST)))
    if (_read_pickle(head), _read_pickle(head)) != (MAGIC, PROTOCOL):
        raise ValueError("it does not begin with torch's number")
    system = _read_pickle(head)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("its numbers are big-endian")
    views, keys = _tensors(_read_pickle(head)), _read_pickle(head)
    dtypes = {view.storage.key: view.storage.dtype for view in views.values()}
    if not isinstance(keys, list) or len(keys) != len(dtypes) or not all(isinstance(key, str) for key in keys):
        raise ValueError("its storages are not those of its tensors")
    places, at = {}, head.tell()
    for key in keys:
        file.seek(at)
        length = int.from_bytes(file.read(8), "little") * _BYTES[dtypes[key]]
        places[key] = at + 8, length
        at += 8 + length
        if at > size:
            raise ValueError(f"storage {key!r} ends at byte {at} of {size}")
    return views, places


def _tensors(found: Any) -> dict[str, _View]:
    odd = next((name for name, value in found.items() if not isinstance(value, _View)), None) if isinstance(found, dict) else ""
    if odd is not None:
        raise ValueError(f"{odd!r} is no tensor" if odd else "it is not a table of tensors")
    return dict(found)


def _read_pickle(file: BinaryIO) -> Any:
    """What the next pickle of a file says: constants, texts, tuples, lists, tables by text, and tensors as `_View`."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def cut(begin: int) -> list[Any]:
        items = stack[begin:]
        del stack[begin:]
        return items

    value: Any
    for instruction, value, _ in genops(file):
        name = instruction.name
        if name == "STOP":
            return stack.pop()
        if name in _LITERALS:
            stack.append(value)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(cut(marks.pop() if name == "TUPLE" else -int(name[-1]))))
        elif name in ("APPEND", "APPENDS"):
            items = cut(marks.pop() if name == "APPENDS" else -1)
            _typed(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = cut(marks.pop() if name == "SETITEMS" else -2)
            keys = (_typed(key, str) for key in items[::2])
            _typed(stack[-1], dict).update(zip(keys, items[1::2], strict=True))
        elif name == "GLOBAL" and value in (_TABLE, _TENSOR, _PARAMETER, *_STORED):
            stack.append(_Name(value))
        elif name == "BINPERSID":
            stack.append(_storage(*_typed(stack.pop(), tuple)))
        elif name == "REDUCE":
            arguments = _typed(stack.pop(), tuple)
            stack.append(_made(_typed(stack.pop(), _Name).name, arguments))
        elif name == "BUILD":  # attributes of a table: versions of modules
            stack.pop()
            _typed(stack[-1], dict)
        elif name != "PROTO":
            what = f"names {value!r}" if name == "GLOBAL" else f"has the instruction {name}"
            problem = f"{what}, which no state dict needs, and could run code."
            raise NarrowsError(problem, where="its pickle", remedy=f"If you trust its source, {_SAVED}.")
    raise ValueError("its pickle has no end")


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"its pickle has a {type(value).__name__} for a {kind.__name__}")
    return value


def _storage(*about: Any) -> _Storage:
    if len(about) not in (5, 6) or about[5:] not in ((), (None,)) or type(about[1]) is not _Name or not is_count(about[4]):
        raise ValueError("it stores something else than numbers")
    return _Storage(_STORED[about[1].name], _typed(about[2], str), about[4])


def _made(name: str, arguments: tuple[Any, ...]) -> Any:
    """What a call would give: a table, or a tensor."""
    if name == _TABLE and not arguments:
        return {}
    if name == _PARAMETER and arguments:
        return _typed(arguments[0], _View)
    if name != _TENSOR or len(arguments) < 4:
        raise ValueError(f"{name} is not called like this")
    storage, offset, shape, stride = arguments[:4]
    sizes = (offset, *_typed(shape, tuple), *_typed(stride, tuple))
    if len(shape) != len(stride) or len(shape) > 64 or not all(is_count(n) and n < 2**63 for n in sizes):
        raise ValueError("a tensor's sizes are no sizes")
    return _View(_typed(storage, _Storage), offset, shape, stride)
