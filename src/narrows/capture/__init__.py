"""From a model, in whatever form it comes, to a Graph.

A bundled name (`llama-3.1-8b`), a `config.json` or its directory, a graph file, an ONNX file, `package.module:factory`,
or a live `nn.Module`: `capture` tells them apart. Only modules, and families without a reading of their own, need torch.
"""

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrows.errors import NarrowsError, closest, require
from narrows.graph import Graph
from narrows.step import Step

if TYPE_CHECKING:
    import torch

__all__ = ["bundled", "capture"]

_LARGEST_GRAPH = 64_000_000


@cache
def bundled() -> tuple[str, ...]:
    """The names of the models that ship with narrows."""
    folder = files("narrows.data").joinpath("models")
    return tuple(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")))


def capture(
    model: "str | Path | torch.nn.Module", step: Step | None = None, dims: Mapping[str, int | str] | None = None
) -> Graph:
    """The Graph of a model given by name, path, `package.module:factory`, or as an `nn.Module`.

    Graphs read from files are symbolic: one serves every step. A module is traced at `step` (by default one sequence
    of 128 tokens, or one image), and its graph is of that step alone. `dims` gives an ONNX file's own dims a value, or a
    role (`batch`, `sequence`). Raises NarrowsError that names the field, op or
    module at fault and what to do.
    """
    if not isinstance(model, str | Path):
        return _traced(model, step, type(model).__name__)
    name = str(model)
    if name.lower() in bundled():
        return _read(Path(str(files("narrows.data").joinpath("models", f"{name.lower()}.json"))), name.lower())
    path = Path(name)
    if path.exists():
        if not (path.is_file() or path.is_dir()):  # a pipe would be waited for
            raise NarrowsError("it is neither a file nor a directory.", where=name, remedy="Give a config.json or its directory.")
        if path.suffix == ".onnx":
            from narrows.capture.onnx import from_onnx

            return from_onnx(path, dims=dims)
        return _read(
            path / "config.json" if path.is_dir() else path, path.resolve().stem if path.is_file() else path.resolve().name
        )
    if ":" in name and os.sep not in name:
        return _traced(_made(name), step, name)
    raise NarrowsError(f"{name!r} is neither a bundled model nor a file.", where="model", remedy=closest(name, list(bundled())))


def _read(path: Path, name: str) -> Graph:
    """A config.json or a graph file, told apart by what is in it."""
    from narrows.capture.config import read_config

    if path.exists() and not path.is_file():
        raise NarrowsError("it is not a file.", where=str(path), remedy="Give a config.json or its directory.")
    if path.exists() and path.stat().st_size <= _LARGEST_GRAPH:
        with path.open("rb") as file:
            if b'"narrows-graph-' in file.read(200):
                file.seek(0)
                return Graph.from_json(file.read().decode("utf-8", "replace"), str(path))
    config = read_config(path)
    noted = config.get("quantization_config")
    if isinstance(noted, dict) and isinstance(noted.get("narrows"), str):  # the plan by which narrows changed the structure
        from narrows.plan import Plan

        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        return Plan.parse(noted["narrows"]).rewrite(_of(plain, name, str(path)))
    return _of(config, name, str(path))


def _of(config: dict[str, Any], name: str, where: str) -> Graph:
    """The graph of a config, by whoever knows its family."""
    from narrows.capture.config import FAMILIES, from_config

    family = config.get("model_type", "")
    foreign = isinstance(family, str) and family not in FAMILIES
    if "_class_name" in config:
        require(where, "diffusers", "torch", "diffusers")
        from narrows.capture.hf import from_diffusers

        return from_diffusers(config, name, where=where)
    if foreign and importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
        from narrows.capture.hf import from_transformers

        return from_transformers(config, name, where)
    return from_config(config, name, where)


def _made(name: str) -> "torch.nn.Module":
    """What `package.module:factory` gives, built on the meta device so that no weight is allocated."""
    require(name, "torch", "torch")
    import torch

    module, _, factory = name.partition(":")
    sys.path.insert(0, os.getcwd())  # the user's own package, as `python -m` would find it
    try:
        found: Any = getattr(importlib.import_module(module), factory)
        if not isinstance(found, torch.nn.Module):
            inspect.signature(found).bind()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise NarrowsError(
            f"it is no factory ({error}).", where=name, remedy="Give package.module:factory, a factory without arguments."
        ) from error
    finally:
        sys.path.pop(0)
    if isinstance(found, torch.nn.Module):
        return found
    with torch.device("meta"):
        made = found()
    if not isinstance(made, torch.nn.Module):
        raise NarrowsError(f"it gives a {type(made).__name__}.", where=name, remedy="The factory must give an nn.Module.")
    return made


def _traced(module: "torch.nn.Module", step: Step | None, name: str) -> Graph:
    from narrows.capture.torch import from_module

    return from_module(module, step or Step.forward(1, 128), name=name)
