"""From a Hugging Face `config.json` to a symbolic Graph, without torch, weights or network."""

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from narrows.capture.decoders import DECODERS
from narrows.capture.encoders import ENCODERS
from narrows.capture.fields import Fields
from narrows.capture.mixers import MIXERS
from narrows.capture.quantization import activations, quantization
from narrows.capture.tape import Tape
from narrows.capture.towers import Network
from narrows.errors import NarrowsError
from narrows.graph import Graph

FAMILIES: Mapping[str, Callable[[Fields], Network]] = {**DECODERS, **MIXERS, **ENCODERS}
LARGEST_FILE = 10_000_000
DEEPEST = 20


def from_config(config: Mapping[str, Any], name: str, where: str = "config.json") -> Graph:
    """The Graph of the model that a config describes, as a serving engine or a plain forward pass runs it.

    Its dims are `Size`s: one graph serves prefill, decode, forward and training steps of every size. Ops carry the
    module paths of `transformers`, with `*` for the layer. Raises NarrowsError that names the field at fault
    (`where: field`), and for an unknown family the extra that captures it.
    """
    if not isinstance(config, Mapping):
        raise NarrowsError(
            f"a {type(config).__name__} is not a config.", where=where, remedy="Give a JSON object with a model_type."
        )
    fields = Fields(config, where)
    family = fields.word("model_type")
    if family not in FAMILIES:
        near = difflib.get_close_matches(family, FAMILIES, n=1, cutoff=0.0)[0]
        remedy = f"Capture it through transformers: pip install 'narrows[hf]'. The nearest type known here is {near}."
        raise NarrowsError(f"the family {family!r} is not known here.", where=f"{where}: model_type", remedy=remedy)
    network = FAMILIES[family](fields)
    formats, cache = quantization(fields)
    tape = Tape(activations(fields), formats, cache)
    x = ""
    for tower in network.towers:
        x = tower.emit(tape, x)
    return Graph(name, tuple(tape.ops), "config.json", network.notes)


def read_config(path: str | Path) -> dict[str, Any]:
    """The JSON object in a `config.json`, or in the one of a directory.

    Raises NarrowsError for a file that is missing, over 10 MB, not UTF-8, truncated, nested too deeply, or that holds a
    key twice or a number that JSON does not have.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    where = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise NarrowsError(
            f"cannot be read ({error.strerror}).", where=where, remedy="Give a config.json or its directory."
        ) from error
    if len(data) > LARGEST_FILE:
        raise NarrowsError(
            f"is larger than {LARGEST_FILE // 10**6} MB.", where=where, remedy="Give a config.json, not a weight file."
        )
    return _parse(data, where)


def bundled() -> list[str]:
    """Names of the models whose configs come with narrows."""
    return sorted(name for name, config in _shipped() if "model_type" in config)


def bundled_config(name: str) -> dict[str, Any] | None:
    """The config of a bundled model, or None where there is none of that name."""
    file = files("narrows") / "data" / "models" / f"{name}.json"
    if not name or "/" in name or "\\" in name or not file.is_file():
        return None
    config = _parse(file.read_bytes(), file.name)
    return config if "model_type" in config else None


def _shipped() -> Iterator[tuple[str, str]]:
    """Name and opening of each file beside the configs (shipped graphs lie there too)."""
    for file in (files("narrows") / "data" / "models").iterdir():
        if file.name.endswith(".json"):
            with file.open("rb") as stream:
                opening = stream.read(4096).decode(errors="replace")
            yield file.name.removesuffix(".json"), "" if '"narrows-graph-1"' in opening[:100] else opening


def _parse(data: bytes, where: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise NarrowsError(f"the key {twice[:40]!r} is there twice.", where=where, remedy="Keep one of them.")
        return found

    def refuse(word: str) -> float:
        raise NarrowsError(f"{word} is not JSON.", where=where, remedy="Give a finite number.")

    try:
        config = json.loads(data.decode("utf-8-sig"), object_pairs_hook=once, parse_constant=refuse)
    except NarrowsError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, an integer of thousands of digits
        problem = "nests too deeply" if isinstance(error, RecursionError) else f"is not a JSON file ({str(error)[:80]})"
        raise NarrowsError(f"{problem}.", where=where, remedy="Give the config.json as it was published.") from error
    if not isinstance(config, dict):
        raise NarrowsError(
            f"holds a {type(config).__name__}, not an object.", where=where, remedy="Give the config.json as it was published."
        )
    if _depth(config) > DEEPEST:
        raise NarrowsError("nests too deeply.", where=where, remedy="Give the config.json as it was published.")
    return config


def _depth(value: Any) -> int:
    """How deep lists and objects nest."""
    level, depth = [value], 0
    while level:
        depth += 1
        level = [v for x in level for v in (x.values() if isinstance(x, dict) else x if isinstance(x, list) else ())]
    return depth


def longest(model: str | Path) -> int:
    """Tokens that a request to a model may have, prompt and answer together, by its config; 0 where none says."""
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    found = bundled_config(str(model).lower()) or (read_config(path) if path.name == "config.json" and path.is_file() else {})
    text = found.get("text_config")
    most = (text if isinstance(text, dict) else found).get("max_position_embeddings", 0)
    return most if isinstance(most, int) and most > 0 else 0
