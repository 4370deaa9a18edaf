"""Checkpoints that no layout owns: each rank writes the fragments it has, and any layout reads the slices it needs.

A checkpoint is a folder `step-00000012` of one safetensors file a rank, whose header says of which tensor each fragment is
a part, and where it begins in it; a digest beside each file once that is on the disk; and a manifest that says how many
files there are. Where a digest is missing the checkpoint was torn.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from narrows.errors import NarrowsError
from narrows.figures import write

FORMAT = "narrows-checkpoint-1"
MANIFEST = "manifest.json"
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


@dataclass(frozen=True)
class Fragment:
    """Part of a tensor of the whole model: `name` of the parameter, `state` (weight, or one of the optimizer's), place."""

    name: str
    state: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: Tensor

    @property
    def key(self) -> str:
        return f"{self.name}/{self.state}"


def place_of(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], Tensor]:
    """(shape of the whole tensor, where this rank's part begins in it, that part)."""
    if not isinstance(tensor, DTensor):
        return tuple(tensor.shape), (0,) * tensor.dim(), tensor
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(tensor.shape), tuple(offset), tensor.to_local()


def fragments(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, place: Mapping[str, int]) -> list[Fragment]:
    """What the rank at a place of the mesh writes: of tensors that several hold alike, only the first of them does."""
    found = []
    for name, parameter in parameters.items():
        for state, tensor in {"weight": parameter.data, **optimizer.state.get(parameter, {})}.items():
            split = set[str]()
            if isinstance(tensor, DTensor):
                names = tensor.device_mesh.mesh_dim_names or ()
                split = {axis for axis, how in zip(names, tensor.placements, strict=True) if not how.is_replicate()}
            if any(where for axis, where in place.items() if axis not in split and axis != "pipeline"):
                continue
            shape, offset, values = place_of(tensor)
            if values.numel():
                found.append(Fragment(name, state, shape, offset, values))
    return found


def folder_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return folder / f"step-{step:08}"


def file_of(number: int) -> str:
    """The name of a rank's file."""
    return f"rank-{number:05}.safetensors"


def write_part(target: Path, number: int, parts: Iterable[Fragment]) -> int:
    """One rank's file and its digest, flushed to the disk; its bytes.

    It is written a tensor at a time, which leaves the interpreter to others meanwhile, as `safetensors.save_file` does not.
    """
    own = [(f, f.values.detach().contiguous().reshape(-1)) for f in parts]
    places = {f.key: [f.name, f.state, list(f.shape), list(f.offset)] for f, _ in own}
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "fragments": json.dumps(places)}}
    ends = list(accumulate((flat.numel() * flat.element_size() for _, flat in own), initial=0))
    for (f, _), begin, end in zip(own, ends, ends[1:], strict=False):
        header[f.key] = {"dtype": _DTYPES[f.values.dtype], "shape": list(f.values.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    target.mkdir(parents=True, exist_ok=True)
    file, digest = target / file_of(number), hashlib.sha256()
    with open(file, "wb") as out:
        for data in (len(text).to_bytes(8, "little"), text, *(flat.view(torch.uint8).numpy().data for _, flat in own)):
            out.write(data)
            digest.update(data)
        out.flush()
        os.fsync(out.fileno())
    size = 8 + len(text) + int(ends[-1])
    write(file.with_suffix(".json"), json.dumps({"sha256": digest.hexdigest(), "bytes": size}))
    return size


def declare(target: Path, step: int, files: int) -> None:
    """Say of how many files a checkpoint is made: it is whole once each of them has its digest."""
    target.mkdir(parents=True, exist_ok=True)
    write(target / MANIFEST, json.dumps({"format": FORMAT, "step": step, "files": files}))


def _write(target: Path, step: int, parts: list[Fragment]) -> None:
    if dist.get_rank() == 0:
        declare(target, step, dist.get_world_size())
    write_part(target, dist.get_rank(), parts)


class Saver:
    """Writes this rank's part of checkpoints: between two steps, or lazily beside the steps that follow.

    Lazily, weights and moments are copied to buffers while the next forward and backward pass leave them alone (`guard`
    waits for the copy before the update), and written from there; `close` waits for what is on its way.
    """

    def __init__(self, folder: Path, lazy: bool) -> None:
        self.folder, self.lazy = folder, lazy
        self._threads = ThreadPoolExecutor(1)
        self._buffers: dict[str, Tensor] = {}
        self._copied: Future[list[Fragment]] | None = None
        self._written: Future[None] | None = None

    def save(self, step: int, parts: list[Fragment]) -> float:
        """Begin a checkpoint, or write it; the seconds for which training waited."""
        begin = time.perf_counter()
        self.close()
        target = folder_of(self.folder, step)
        if self.lazy:
            for part in parts:
                self._buffers.setdefault(part.key, torch.empty_like(part.values))
            self._copied = copied = self._threads.submit(self._copy, parts)
            self._written = self._threads.submit(lambda: _write(target, step, copied.result()))
        else:
            _write(target, step, parts)
        return time.perf_counter() - begin

    def guard(self) -> float:
        """Wait until what is to be updated has been copied; the seconds that took."""
        begin = time.perf_counter()
        if self._copied is not None:
            self._copied.result()
        return time.perf_counter() - begin

    def close(self) -> None:
        """Wait for the checkpoint that is on its way to the disk."""
        if self._written is not None:
            self._written.result()
            self._copied = self._written = None

    def _copy(self, parts: list[Fragment]) -> list[Fragment]:
        for part in parts:
            self._buffers[part.key].copy_(part.values.detach())
        return [replace(part, values=self._buffers[part.key]) for part in parts]


def latest(folder: Path) -> int:
    """The steps of the newest checkpoint that is whole; 0 where there is none."""
    for path in sorted(folder.glob(f"step-*/{MANIFEST}"), reverse=True):
        found = _read(path, "Delete its folder.")
        if len(list(path.parent.glob("rank-*.json"))) == found["files"]:
            return int(found["step"])
    return 0


def load(folder: Path, step: int, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer,
         only: str = "") -> None:  # fmt: skip
    """Fill this rank's parameters and optimizer states from a checkpoint of any layout; NarrowsError where it is damaged.

    `only` names the one file of it that is read, as checkpoints do that belong to the layout that wrote them.
    """
    source = Source(folder_of(folder, step), only)
    for name, parameter in parameters.items():
        states = source.states(name)
        _fill(parameter.data, name, "weight", source)
        kept: dict[str, Tensor] = {}
        for state in states - {"weight"}:
            scalar = not source.shape(name, state)
            kept[state] = torch.zeros((), dtype=torch.float32) if scalar else torch.zeros_like(parameter.data)
            _fill(kept[state], name, state, source)
        optimizer.state[parameter] = kept


def _fill(tensor: Tensor, name: str, state: str, source: "Source") -> None:
    shape, offset, local = place_of(tensor)
    if local.numel():
        local.copy_(source.read(name, state, shape, offset, tuple(local.shape)))


class Source:
    """A checkpoint to read slices from. Its files are checked against their digests when it is opened."""

    def __init__(self, folder: Path, only: str = "") -> None:
        self.folder = folder
        manifest = _read(folder / MANIFEST, "It was torn: take an older one.")
        if manifest.get("format") != FORMAT:
            raise NarrowsError(f"format is {manifest.get('format')!r}, not {FORMAT!r}.", where=str(folder),
                               remedy="Read it with the version that wrote it.")  # fmt: skip
        self.places: dict[tuple[str, str], list[tuple[Path, str, tuple[int, ...], tuple[int, ...]]]] = {}
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != manifest["files"]:
            raise NarrowsError(f"{len(files)} files, and its manifest says {manifest['files']}.", where=str(folder),
                               remedy="Take an older checkpoint.")  # fmt: skip
        for file in files:
            if file.name == only or not only:
                self._index(file)

    def _index(self, file: Path) -> None:
        wanted = _read(file.with_suffix(".json"), "Take an older checkpoint.")
        with open(file, "rb") as data:
            found = hashlib.file_digest(data, "sha256").hexdigest()
        if found != wanted.get("sha256"):
            size = file.stat().st_size
            raise NarrowsError(f"{size} bytes do not have its digest (it had {wanted.get('bytes')}).", where=str(file),
                               remedy="Take an older checkpoint.")  # fmt: skip
        with safe_open(file, framework="pt") as parts:
            places = json.loads((parts.metadata() or {})["fragments"])
        for key, (name, state, shape, offset) in places.items():
            self.places.setdefault((name, state), []).append((file, key, tuple(shape), tuple(offset)))

    def states(self, name: str) -> set[str]:
        """The tensors there are for a parameter: its weight, and what the optimizer kept. NarrowsError where there is none."""
        found = {state for other, state in self.places if other == name}
        if not found:
            raise NarrowsError(f"it has no {name}.", where=str(self.folder), remedy="Load it into the model that wrote it.")
        return found

    def shape(self, name: str, state: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.places[name, state][0][2]

    def read(self, name: str, state: str, shape: Sequence[int], offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """A slice of the whole tensor, put together from every fragment that lies in it."""
        pieces = self.places[name, state]
        if tuple(shape) != pieces[0][2]:
            raise NarrowsError(f"{name} has shape {pieces[0][2]}, not {tuple(shape)}.", where=str(self.folder),
                               remedy="Load it into the model that wrote it.")  # fmt: skip
        out, filled = None, 0
        for file, key, _, begins in pieces:
            with safe_open(file, framework="pt") as parts:
                piece = parts.get_slice(key)
                extent = piece.get_shape()
                low = [max(o, b) for o, b in zip(offset, begins, strict=True)]
                high = [min(o + s, b + e) for o, s, b, e in zip(offset, size, begins, extent, strict=True)]
                if any(a >= b for a, b in zip(low, high, strict=True)):
                    continue
                inside = tuple(slice(a - b, c - b) for a, b, c in zip(low, begins, high, strict=True))
                values = piece[inside] if inside else parts.get_tensor(key)
            out = torch.zeros(tuple(size), dtype=values.dtype) if out is None else out
            out[tuple(slice(a - o, c - o) for a, o, c in zip(low, offset, high, strict=True))] = values
            filled += values.numel()
        if out is None or filled != out.numel():
            raise NarrowsError(f"{filled} of {_count(size)} numbers of {name} are there.", where=str(self.folder),
                               remedy="Take an older checkpoint.")  # fmt: skip
        return out


def consolidate(source: Path, target: Path) -> int:
    """Turn a checkpoint of fragments into one of atoms, a file for each parameter with all its states; how many there are."""
    there = Source(source)
    names = sorted({name for name, _ in there.places})
    declare(target, json.loads((source / MANIFEST).read_text())["step"], len(names))
    for number, name in enumerate(names):
        parts = []
        for state in sorted(there.states(name)):
            shape = there.shape(name, state)
            nowhere = (0,) * len(shape)
            parts.append(Fragment(name, state, shape, nowhere, there.read(name, state, shape, nowhere, shape)))
        write_part(target, number, parts)
    return len(names)


def _count(size: Sequence[int]) -> int:
    count = 1
    for side in size:
        count *= side
    return count


def _read(file: Path, remedy: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise NarrowsError("it is missing or damaged.", where=str(file), remedy=remedy) from error
    return found
