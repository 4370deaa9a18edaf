"""Applying a plan to a model directory larger than memory: one block at a time is read, changed and written.

Blocks are the parts of the model's module lists; all else (embeddings, last norm, output layer) is one more piece. A
technique whose card says `blockwise` needs no more of a model than one piece. Where it calibrates, each block is run on
what it is given in the unchanged model, so that the result is that of applying it to the whole model, bit for bit: the
calibration data goes once through the model, as far as the block at work.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from narrows import formats
from narrows.directory import (
    Manifest,
    architecture,
    blank,
    check_directory,
    check_installed,
    described,
    edit_config,
    load_tokenizer,
    offline,
    require_original,
    sealed,
    unreadable,
)  # fmt: skip
from narrows.errors import NarrowsError
from narrows.headers import TensorInfo
from narrows.plan import Plan
from narrows.progress import Tell, silent
from narrows.staging import replacing
from narrows.step import Step
from narrows.technique import No, Rewrites
from narrows.weight_files import INDEX, WHOLE, mapped

if TYPE_CHECKING:
    from torch import Tensor, nn

Batches = Sequence[Mapping[str, "Tensor"]]
SHARD_BYTES = 2**29  # of a written file, at least
WHOLE_MODEL = "Apply the plan to the whole model in memory."


def stream(
    source: str | Path,
    out: str | Path,
    plan: Plan,
    data: Batches = (),
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    tell: Tell = silent,
) -> Manifest:
    """Apply a plan to a model directory and write the directory that `load` reads: all of it, or nothing.

    Memory holds one block, before and after, one file's worth of results, and what `data` is between two blocks. Raises
    NarrowsError for a technique that must see the whole model, and for weights that transformers renames when it loads them.
    """
    check_installed()
    path = Path(source)
    with unreadable(path), offline():
        tensors, _ = check_directory(path)
        require_original(path, plan)
        kind = architecture(path)
        config = kind.config_class.from_pretrained(path, local_files_only=True)
        plain, changed = blank(kind, config), blank(kind, config)
    steps = _steps(plan, plain, path)
    pieces = _Pieces(kind, config, tensors, path)
    count = len(pieces.blocks) + 1
    touched = [_touched(step, changed, pieces) for step in steps]
    with replacing(out, overwrite, "config.json") as staging, offline():
        shards = _Shards(staging, shard_bytes)
        for i, piece in enumerate(_applied(pieces, steps, touched, data)):
            tell("writing blocks", i, count)
            config.dtype = next((p.dtype for p in piece.parameters() if p.is_floating_point()), config.dtype)
            shards.add(formats.to_state(piece))
        shards.close()
        config.architectures = [kind.__name__]
        config.save_pretrained(staging)
        if (path / "generation_config.json").exists():
            shutil.copyfile(path / "generation_config.json", staging / "generation_config.json")
        edit_config(staging, described(changed, plan))
        return sealed(staging, load_tokenizer(path, ""), plan, str(source))


def _steps(plan: Plan, model: "nn.Module", path: Path) -> list[Rewrites]:
    """The steps of a plan that applies block by block; raises NarrowsError with the reason of one that does not."""
    from narrows.capture.torch import from_module

    step = Step.forward(1, 128)
    verdict = plan.check(replace(from_module(model, step), eager=True), None, step)
    if isinstance(verdict, No):
        raise NarrowsError(f"the plan does not apply: {verdict.reason}.", where=str(path), remedy="Change the plan.")
    for one in plan:
        if not isinstance(one, Rewrites) or not one.card.blockwise:
            raise NarrowsError(f"{one.card.slug} must see the whole model.", where="plan", remedy=WHOLE_MODEL)
    return cast(list[Rewrites], list(plan))


def _touched(step: Rewrites, model: "nn.Module", pieces: "_Pieces") -> set[str]:
    """The pieces whose structure a step changes, which it does to the blank model; all of them where it changes none's."""
    before = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    step.restructure(model)
    after = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {pieces.of(name) for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return found or {"", *pieces.blocks}


class _Pieces:
    """The blocks of a model by path, on the meta device until they are filled, and all that is beside them."""

    def __init__(self, kind: Any, config: Any, tensors: Mapping[str, TensorInfo], path: Path) -> None:
        from accelerate import init_empty_weights
        from torch import nn

        from narrows.modules.calibration import Passed

        self.tensors, self.path, self.dtype = tensors, path, getattr(config, "dtype", None)
        with init_empty_weights(include_buffers=False):  # tables that no file holds are real
            self.rest: Any = kind(config).eval()
        lists = [name for name, m in self.rest.named_modules() if isinstance(m, nn.ModuleList) and list(m.parameters())]
        outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
        self.blocks = {f"{name}.{i}": block for name in outer for i, block in enumerate(self.rest.get_submodule(name))}
        for name in self.blocks:
            self.rest.set_submodule(name, Passed())

    def of(self, tensor: str) -> str:
        """The block that a tensor of this name is in, or ''."""
        return next((block for block in self.blocks if tensor.startswith(f"{block}.")), "")

    def filled(self, module: "nn.Module", tied: Mapping[str, str]) -> "nn.Module":
        """A module with its weights; of two `tied` names one suffices. Raises NarrowsError for one that no file holds."""
        state: dict[str, Tensor] = {}
        for name in module.state_dict().keys() & self.tensors.keys():
            tensor = mapped(self.tensors[name])
            state[name] = tensor.to(self.dtype if self.dtype and tensor.is_floating_point() else tensor.dtype, copy=True)
            del tensor  # pages of the file that were read count, too
        for one, other in tied.items():
            found = state.get(other, state.get(one))
            state.update({} if found is None else {one: found, other: found})
        lacking = sorted(module.state_dict().keys() - state.keys())
        if lacking:
            problem = f"{lacking[0]} is in none of its files; transformers makes some tensors as it loads them."
            raise NarrowsError(problem, where=str(self.path), remedy=WHOLE_MODEL)
        with unreadable(self.path):
            module.load_state_dict(state, assign=True)
        for one, other in tied.items():
            owner, _, leaf = one.rpartition(".")
            setattr(module.get_submodule(owner), leaf, module.get_parameter(other))
        return module


def _applied(pieces: _Pieces, steps: Sequence[Rewrites], touched: Sequence[set[str]], data: Batches) -> "Iterator[nn.Module]":
    """Each piece after all steps, as a model that holds nothing else: what is beside the blocks, then the blocks."""
    from narrows.modules.calibration import Alone, Stream, after, entering

    rest = pieces.filled(pieces.rest, getattr(pieces.rest, "all_tied_weights_keys", {}))
    streams: dict[int, list[Stream]] = {}  # of each calibrated step: in the model as it is before that step
    for k, step in enumerate(steps):
        if "calibration" in step.card.needs:
            if "" in touched[k]:
                problem = f"{step.card.slug} calibrates a layer beside the blocks."
                raise NarrowsError(problem, where=str(pieces.path), remedy=WHOLE_MODEL)
            with unreadable(pieces.path):
                streams[k] = [entering(rest, list(pieces.blocks), batch) for batch in data]
        elif "" in touched[k]:
            Plan((step,)).apply(rest)
    yield rest
    for name in list(pieces.blocks):
        block = pieces.filled(Alone(name, pieces.blocks.pop(name)), {}).eval()
        for k, step in enumerate(steps):
            seen = [stream.batch(name) for stream in streams.get(k, ())]
            left = [after(block, batch) for batch in seen]
            if name in touched[k]:
                Plan((step,)).apply(block, seen)
            for stream, now in zip(streams.get(k, ()), left, strict=True):
                stream.now = now
        yield block


class _Shards:
    """Files that fill a directory, each of at least so many bytes of tensors."""

    def __init__(self, folder: Path, least_bytes: int) -> None:
        self.folder, self.least_bytes = folder, least_bytes
        self.waiting: dict[str, Tensor] = {}
        self.held: list[tuple[str, ...]] = []  # tensors by file
        self.bytes = 0

    def add(self, tensors: "Mapping[str, Tensor]") -> None:
        self.waiting.update(tensors)
        if sum(t.nbytes for t in self.waiting.values()) >= self.least_bytes:
            self._write()

    def _write(self) -> None:
        from safetensors.torch import save_file

        save_file(self.waiting, self.folder / f"{len(self.held)}.part", metadata={"format": "pt"})
        self.held.append(tuple(self.waiting))
        self.bytes += sum(t.nbytes for t in self.waiting.values())
        self.waiting.clear()

    def close(self) -> None:
        """Write what is left, give the files their names, and say which holds what."""
        if self.waiting:
            self._write()
        count = len(self.held)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else [WHOLE]
        for i, name in enumerate(names):
            (self.folder / f"{i}.part").rename(self.folder / name)
        if count > 1:
            places = {tensor: name for name, tensors in zip(names, self.held, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": self.bytes}, "weight_map": places}
            (self.folder / INDEX).write_text(json.dumps(index, indent=1))
