"""What is inside weight files, read from their headers alone: bounded by the file, never by what it claims.

safetensors, gguf and PyTorch's `.bin` (see `torch_archive`), whole or in shards with an index, without torch and without
touching the data; `mapped` alone needs torch.
"""

import json
import math
import mmap
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from narrows.errors import NarrowsError
from narrows.staging import Explained

if TYPE_CHECKING:
    pass

LONGEST = 100 * 10**6  # bytes of a header, as the safetensors format sets it, and of any other JSON
DAMAGED = "Get the file again: it is damaged or was not written to its end."
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64, "F64": 64, "F32": 32,
         "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "F6_E2M3": 6,
         "F6_E3M2": 6, "F4": 4, "C64": 64}  # fmt: skip
_GGUF_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_TEXT, _GGUF_ARRAY = 8, 9


class TensorInfo(NamedTuple):
    """A tensor as a header tells it: the format's name of its dtype, its shape, and its bytes [begin, end) of `file`.

    stride: numbers between neighbours along each axis; () where they follow row by row, as in all files but `.bin`.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    file: Path
    stride: tuple[int, ...] = ()


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """What a safetensors or gguf file holds, by name, without its data and without torch.

    Raises NarrowsError naming file and tensor for a header that is truncated, too long, ambiguous, or that disagrees with
    the file: every tensor's shape and dtype must fill its bytes, and all of them together the file.
    """
    path = Path(path)
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        read = _read_gguf if path.suffix == ".gguf" else _read_safetensors
        tensors, start, slack = read(file, path, size)
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].begin):
        if not 0 <= tensor.begin - at <= slack:
            problem = "overlaps another tensor" if tensor.begin < at else f"leaves {tensor.begin - at} bytes unused before it"
            raise damaged(path, name, problem)
        at = tensor.end
        if at > size:
            raise damaged(path, name, f"ends at byte {at} of {size}")
    if size - at > slack:
        raise damaged(path, "", f"{size - at} bytes follow the last tensor")
    return tensors


def damaged(path: Path, name: str, problem: str) -> NarrowsError:
    """The error of a file that is not what was written, naming the tensor or field if there is one."""
    return NarrowsError(f"{problem}.", where=f"{path}: {name}" if name else str(path), remedy=DAMAGED)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file to read; a pipe or a device would block or never end."""
    with Explained(path, "Check the path and its permissions."):
        if not stat.S_ISREG(path.stat().st_mode):
            raise NarrowsError("is not a regular file.", where=str(path), remedy="Give a file.")
        with path.open("rb") as file:
            yield file


def _parse_json(text: bytes, where: Path) -> Any:
    """JSON in which every name is there once, without NaN; raises NarrowsError naming the file."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"{next(k for k, _ in pairs if [n for n, _ in pairs].count(k) > 1)!r} is there twice")
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text.decode(), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise damaged(where, "", f"is not valid JSON ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file of its own."""
    with opened(path) as file:
        text = file.read(LONGEST + 1)
    found = _parse_json(text, path) if len(text) <= LONGEST else None
    if not isinstance(found, dict):
        raise damaged(path, "", "is not a JSON object, or a very long one")
    return found


def is_count(value: Any) -> bool:
    """Whether a value from a file is a whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_safetensors(file: BinaryIO, path: Path, size: int) -> tuple[dict[str, TensorInfo], int, int]:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, LONGEST):
        raise damaged(path, "", f"a header of {length} bytes does not fit a file of {size}")
    header = _parse_json(file.read(length), path)
    if not isinstance(header, dict):
        raise damaged(path, "", "its header is not a JSON object")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(v, str) for v in notes.values()):
        raise damaged(path, "__metadata__", "is not a table of strings")
    tensors = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise damaged(path, name, "does not have just dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise damaged(path, name, f"its dtype {dtype!r} is not known")
        if not isinstance(shape, list) or not all(map(is_count, shape)):
            raise damaged(path, name, "its shape is not a list of sizes")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
            raise damaged(path, name, "its data_offsets are not two positions")
        bits = math.prod(shape) * _BITS[dtype]
        if bits != (offsets[1] - offsets[0]) * 8:
            raise damaged(path, name, f"{shape} of {dtype} do not fill {offsets[1] - offsets[0]} bytes")
        tensors[name] = TensorInfo(dtype, tuple(shape), 8 + length + offsets[0], 8 + length + offsets[1], path)
    return tensors, 8 + length, 0


class _Values:
    """Little-endian values of a gguf header, one after the other and never beyond its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.end = data, 0, min(len(data), LONGEST)

    def skip(self, count: int) -> int:
        """Go on by `count` bytes; gives where they began."""
        if count > self.end - self.at:
            raise ValueError("it ends within the header")
        self.at += count
        return self.at - count

    def take(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        begin = self.skip(self.take("Q"))
        return self.data[begin : self.at].decode()

    def value(self, kind: int) -> Any:
        """A value of metadata; arrays are passed over."""
        if kind == _GGUF_TEXT:
            return self.text()
        if kind != _GGUF_ARRAY:
            return self.take(_GGUF_VALUES[kind])
        kind, count = self.take("I"), self.take("Q")
        if kind == _GGUF_TEXT:
            for _ in range(count):
                self.skip(self.take("Q"))
        else:
            self.skip(count * struct.calcsize("<" + _GGUF_VALUES[kind]))
        return None


def _read_gguf(file: BinaryIO, path: Path, size: int) -> tuple[dict[str, TensorInfo], int, int]:
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise NarrowsError("reading gguf needs its package.", where=str(path), remedy="pip install 'narrows[hf]'") from error
    if size < 24:
        raise damaged(path, "", f"{size} bytes hold no gguf header")
    notes, tensors = {}, {}
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        values, name = _Values(data), ""
        try:
            magic, version, tensor_count, note_count = values.take("4s"), values.take("I"), values.take("Q"), values.take("Q")
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError(f"it begins with {magic!r}, version {version}")
            for _ in range(note_count):
                name = values.text()
                notes[name] = values.value(values.take("I"))
            for _ in range(tensor_count):
                name = values.text()
                shape = tuple(values.take("Q") for _ in range(min(values.take("I"), 9)))
                kind, offset = GGMLQuantizationType(values.take("I")), values.take("Q")
                block, block_bytes = GGML_QUANT_SIZES[kind]
                if name in tensors or len(shape) > 8 or (shape[0] if shape else 1) % block:
                    raise ValueError(f"{shape} of {kind.name} is no tensor, or it is there twice")
                length = math.prod(shape) // block * block_bytes
                # gguf writes the last axis first
                tensors[name] = TensorInfo(kind.name, shape[::-1], offset, offset + length, path)
        except (ValueError, KeyError) as error:
            raise damaged(path, name, f"its gguf header is not valid ({error})") from error
        end = values.at
    align = notes.get("general.alignment", 32)
    layers = [v for k, v in notes.items() if k.endswith(".block_count")]
    if not is_count(align) or not 0 < align <= 2**16 or not all(is_count(n) and n <= len(tensors) for n in layers):
        raise damaged(path, "", f"an alignment of {align} or {layers} layers in {len(tensors)} tensors is not possible")
    start = -(-end // align) * align
    placed = {n: t._replace(begin=t.begin + start, end=t.end + start) for n, t in tensors.items()}
    return placed, start, align - 1
