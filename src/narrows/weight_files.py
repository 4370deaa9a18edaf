"""The weight files of a model directory: which there are, what they hold, and their tensors as views of them."""

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from narrows.errors import NarrowsError
from narrows.headers import DAMAGED, TensorInfo, damaged, read_header, read_json
from narrows.torch_archive import read_archive

if TYPE_CHECKING:
    from torch import Tensor

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ARCHIVE, ARCHIVES = "pytorch_model.bin", "pytorch_model.bin.index.json"  # read where a directory has no safetensors
_TORCH = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
          "U64": "uint64", "I64": "int64", "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
          "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}  # fmt: skip


def inside(directory: Path, name: str, where: Path) -> Path:
    """The file of that name, which must be in the directory; a link of the Hugging Face cache (into `blobs`) counts as in it."""
    root = Path(os.path.realpath(directory))
    homes = (root, root.parent.parent / "blobs") if root.parent.name == "snapshots" else (root,)
    try:
        place = Path(os.path.realpath(directory / name))
    except ValueError:  # no file can have this name
        place = Path()
    if Path(name).is_absolute() or ".." in Path(name).parts or place == root or not any(place.is_relative_to(h) for h in homes):
        raise NarrowsError(f"{name!r} leaves the directory.", where=str(where), remedy="Put a copy of the file into it.")
    return directory / name


def headers(directory: str | Path) -> dict[str, TensorInfo]:
    """What the weight files of a model directory hold, by tensor name: safetensors, else `.bin`; one, or those of an index.

    Raises NarrowsError where the index names a file outside, a tensor is missing or in two files, or a header is bad.
    """
    directory = Path(directory)
    for whole, index, read in ((WHOLE, INDEX, read_header), (ARCHIVE, ARCHIVES, read_archive)):
        if (directory / whole).exists():
            return read(inside(directory, whole, directory))
        if (directory / index).exists():
            return _of_shards(directory, directory / index, read)
    pickles = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in directory.glob(kind))
    problem = f"has no {WHOLE}" + f", and {pickles[0]} is not read" * bool(pickles)
    raise NarrowsError(f"{problem}.", where=str(directory), remedy=f"Give its weights as {WHOLE}, or as {ARCHIVE}.")


def _of_shards(directory: Path, index: Path, read: Callable[[Path], dict[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """What the files that an index names hold, each tensor where the index says."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        raise NarrowsError("is not a table of file names.", where=f"{index}: weight_map", remedy=DAMAGED)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(places.values())):
        held = read(inside(directory, shard, index))
        twice = tensors.keys() & held.keys()
        if twice:
            raise damaged(directory / shard, min(twice), "is in another file, too")
        tensors.update(held)
    missing = next((n for n, shard in places.items() if n not in tensors or tensors[n].file != directory / shard), None)
    if missing is not None:
        raise damaged(index, missing, f"is not in {places[missing]}")
    return tensors


def mapped(tensor: TensorInfo) -> "Tensor":
    """The numbers of a tensor, as a view of its file: read when they are used, and never written back."""
    import torch

    if tensor.dtype not in _TORCH:
        raise NarrowsError(
            f"torch has no {tensor.dtype} numbers.", where=str(tensor.file), remedy="Store them in another format."
        )
    dtype: torch.dtype = getattr(torch, _TORCH[tensor.dtype])
    if tensor.begin == tensor.end:
        return torch.empty(tensor.shape, dtype=dtype)
    with tensor.file.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    flat = torch.frombuffer(pages, dtype=torch.uint8, offset=tensor.begin, count=tensor.end - tensor.begin)
    flat = (flat.clone() if tensor.begin % dtype.itemsize else flat).view(dtype)  # kernels want whole numbers at whole places
    return flat.as_strided(tensor.shape, tensor.stride) if tensor.stride else flat.view(tensor.shape)
