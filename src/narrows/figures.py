"""Figures that carry their source: the checks on them, and finding, reading and writing the TOML files that hold them.

In a file every number is `{ value = 989.4e12, source = "datasheet" }`, where `source` is a key of the file's table `[sources]`.
Every error is a NarrowsError that names the dotted field and the remedy; the reader of a file puts its path before that.
"""

import math
import os
import re
import stat
import tomllib
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, NoReturn, TypeVar

from narrows.errors import NarrowsError, closest

_DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data")
_LARGEST_FILE = 1_000_000  # bytes; ours have about 4,000
_T = TypeVar("_T")


class Frozen(dict[str, Any]):
    """A mapping that cannot change, so that what holds it can be hashed, cached and pickled."""

    def __hash__(self) -> int:  # type: ignore[override]
        if not self.__dict__:
            self.__dict__["hash"] = hash(frozenset(self.items()))
        return int(self.__dict__["hash"])

    def __reduce__(self) -> tuple[Any, ...]:
        return Frozen, (dict(self),)

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("Figures do not change; use scaled() or dataclasses.replace().")

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = __ior__ = _refuse


def shown(value: object) -> str:
    """A value as it appears in an error: its repr, shortened."""
    try:
        text = repr(value)
    except ValueError:  # an int of more than 4,300 digits, which TOML can hold in hexadecimal
        return f"this {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def number(value: object, field: str) -> float:
    """The value as a positive finite float, else NarrowsError; a bool is not a number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise NarrowsError(f"{shown(value)} is not a number.", where=field, remedy="Write a positive number in SI units.")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not (math.isfinite(found) and found > 0):
        raise NarrowsError(f"{shown(value)} is not above zero and finite.", where=field, remedy="Write it in SI units.")
    return found


def whole(value: object, field: str) -> int:
    """The value as a positive int, else NarrowsError."""
    number(value, field)
    if not isinstance(value, Integral):
        raise NarrowsError(f"{shown(value)} is not a whole number.", where=field, remedy="Write it without a decimal point.")
    return int(value)


def text(value: object, field: str) -> str:
    """The value as one printable, not empty line, else NarrowsError."""
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        remedy = "Write one line of printable text in quotes."
        raise NarrowsError(f"{shown(value)} is not a line of text.", where=field, remedy=remedy)
    return value


def one_of(value: object, known: tuple[str, ...], field: str) -> str:
    """The value if it is one of those known, else NarrowsError."""
    if not isinstance(value, str) or value not in known:
        raise NarrowsError(f"{shown(value)} is not one of the values there are.", where=field, remedy=f"Use {', '.join(known)}.")
    return value


def listed(value: object, field: str) -> list[Any]:
    """The value as a list (empty for None), else NarrowsError."""
    if value is not None and not isinstance(value, list):
        raise NarrowsError(f"{shown(value)} is not a list.", where=field, remedy="See a bundled file for the form.")
    return value or []


class Table:
    """One table of a file, taken key by key: what is missing, of a wrong type, unsourced or left over is an error.

    `cited` collects the source text of every figure taken, by dotted name.
    """

    def __init__(self, values: object, place: str, texts: Mapping[str, str], cited: dict[str, str]) -> None:
        if not isinstance(values, dict):
            raise NarrowsError(f"{shown(values)} is not a table.", where=place, remedy="See a bundled file for the form.")
        self.values, self.place, self.texts, self.cited = dict(values), place, texts, cited

    def at(self, key: str) -> str:
        """The dotted name of a key of this table."""
        return f"{self.place}.{key}" if self.place else key

    def take(self, key: str, *, optional: bool = False) -> Any:
        """The value of a key, which is then done with; None if it is optional and missing."""
        if key not in self.values and not optional:
            raise NarrowsError("missing.", where=self.at(key), remedy="Add it.")
        return self.values.pop(key, None)

    def figure(self, key: str, *, optional: bool = False) -> Any:
        """The value of a figure, not yet checked; its source is noted in `cited`."""
        entry = self.take(key, optional=optional)
        if entry is None:
            return None
        if not isinstance(entry, dict) or set(entry) != {"value", "source"}:
            remedy = 'Write { value = ..., source = "a key of [sources]" }.'
            raise NarrowsError(f"{shown(entry)} is not a value with its source.", where=self.at(key), remedy=remedy)
        source = entry["source"]
        if not isinstance(source, str) or source not in self.texts:
            raise NarrowsError(f"the source {shown(source)} is unknown.", where=self.at(key), remedy="Add it to [sources].")
        self.cited[self.at(key)] = self.texts[source]
        return entry["value"]

    def figures(self) -> dict[str, Any]:
        """All that is left, as figures."""
        return {key: self.figure(key) for key in list(self.values)}

    def table(self, key: str, *, optional: bool = False) -> "Table | None":
        """The table under a key; None if it is optional and missing."""
        found = self.take(key, optional=optional)
        return None if found is None else Table(found, self.at(key), self.texts, self.cited)

    def tables(self, key: str) -> "list[Table]":
        """The tables of a list [[key]]; each one's place ends in its name."""
        found = []
        for entry in listed(self.take(key, optional=True), self.at(key)):
            name = entry.get("name") if isinstance(entry, dict) else None
            place = f"{self.at(key)}.{name}" if isinstance(name, str) and name.isprintable() and len(name) < 40 else self.at(key)
            found.append(Table(entry, place, self.texts, self.cited))
        return found

    def finish(self) -> None:
        """Refuse the keys that nobody took."""
        if self.values:
            key = next(iter(self.values))
            raise NarrowsError("unknown key.", where=self.at(key), remedy="Remove it, or check its spelling and its table.")


def names(folder: str) -> list[str]:
    """The bundled files of a folder of data, without .toml, sorted."""
    return sorted(entry[:-5] for entry in os.listdir(os.path.join(_DATA, folder)) if entry.endswith(".toml"))


def find(folder: str, name_or_path: object) -> tuple[str, bool]:
    """The file meant by a bundled name, an alias (any case) or a path, and whether it is bundled; NarrowsError if none is."""
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise NarrowsError(f"{shown(name_or_path)} is neither a name nor a path.", remedy=f"See narrows.machine.{folder}().")
    asked = os.fspath(name_or_path)
    if not isinstance(name_or_path, str) or asked.endswith(".toml") or "/" in asked or os.sep in asked:
        return asked, False
    word = re.sub(r"[\s_]+", "-", asked.strip().lower())
    known = names(folder)
    found = [word] if word in known else [name for name in known if word in _aliases(folder, name, word)]
    if len(found) == 1:
        return os.path.join(_DATA, folder, f"{found[0]}.toml"), True
    found = found or [name for name in known if word and name.startswith(word)]
    if found:
        raise NarrowsError(f"{shown(asked)} is not the name of one of the {folder}.", remedy=f"Say which: {' or '.join(found)}.")
    remedy = f"{closest(word[:60], known)} One of your own is given by the path of its .toml file."
    raise NarrowsError(f"there is no {folder[:-1]} {shown(asked)}.", remedy=remedy)


def _aliases(folder: str, name: str, word: str) -> list[str]:
    """The aliases in a bundled file; one that does not have the word in quotes is not parsed."""
    with open(os.path.join(_DATA, folder, f"{name}.toml"), encoding="utf-8") as file:
        content = file.read()
    return list(tomllib.loads(content).get("aliases", [])) if f'"{word}"' in content else []


def load(path: str, build: Callable[[Table], _T]) -> _T:
    """What `build` makes of the file's top table; NarrowsErrors name the file."""
    try:
        values = _parse(path)
        texts = values.pop("sources", None)
        if not isinstance(texts, dict):
            remedy = 'Add a table [sources] with lines like datasheet = "title, year, URL".'
            raise NarrowsError("the table of sources is missing.", where="sources", remedy=remedy)
        top = Table(values, "", {key: text(line, f"sources.{key}") for key, line in texts.items()}, {})
        for alias in listed(top.take("aliases", optional=True), "aliases"):  # only names among bundled files, see machine.py
            text(alias, "aliases")
        made = build(top)
        top.finish()
        return made
    except NarrowsError as error:
        raise error.inside(path) from None


def _parse(path: str) -> dict[str, Any]:
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST_FILE:
            raise NarrowsError(f"not a file of at most {_LARGEST_FILE} bytes.", remedy="Give the path of a machine's TOML file.")
        with open(path, "rb") as file:
            content = file.read(_LARGEST_FILE).decode("utf-8")
    except UnicodeDecodeError:
        raise NarrowsError("not a text file.", remedy="Write it as TOML in UTF-8.") from None
    except OSError as error:
        raise NarrowsError(f"cannot be read ({error.strerror}).", remedy="Check the path.") from None
    except ValueError as error:
        if isinstance(error, NarrowsError):
            raise
        raise NarrowsError(f"not a path ({error}).", remedy="Check the path.") from None
    try:
        return tomllib.loads(content)
    except (ValueError, RecursionError) as error:  # broken TOML; integers or nesting beyond Python's limits
        raise NarrowsError(f"not valid TOML ({error}).", remedy="Mend it; the bundled files show the form.") from None


def quoted(line: str) -> str:
    """A printable line as a TOML string: nothing in it but backslash and quote needs an escape."""
    escaped = line.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def write(path: str | os.PathLike[str], content: str) -> None:
    """Put a text file in place, whole or not at all: a staging file beside it, fsync, rename. NarrowsError if that fails."""
    target = os.path.realpath(os.fspath(path))
    staging = f"{target}.{os.getpid()}-{os.urandom(4).hex()}.part"
    try:
        with open(staging, "x", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, target)
    except (OSError, ValueError) as error:
        raise NarrowsError(f"cannot be written ({error}).", where=target, remedy="Choose a folder you may write to.") from None
    finally:
        if os.path.lexists(staging):
            os.unlink(staging)
