"""Typed reading of a config's fields: every value is checked where it is read, and an error names the field."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from narrows.errors import NarrowsError, closest

LARGEST = 10**8  # no width, vocabulary or head count of a network comes near
MOST_LAYERS = 10_000
_MISSING: Any = object()
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Fields:
    """One JSON object of a config. A field may have several names, tried in order; `null` counts as absent."""

    values: Mapping[str, Any]
    where: str

    def wrong(self, name: str, problem: str, remedy: str = "") -> NarrowsError:
        """The error for a field, to be raised by the caller."""
        return NarrowsError(problem, where=f"{self.where}: {name}", remedy=remedy)

    def get(self, *names: str, default: Any = _MISSING) -> Any:
        """The raw value of the first of `names` that is there."""
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        if default is _MISSING:
            others = f" (or {', '.join(names[1:])})" if names[1:] else ""
            raise self.wrong(names[0], "the field is missing.", f"Give {names[0]}{others}.")
        return default

    def has(self, *names: str) -> bool:
        return any(self.values.get(name) is not None for name in names)

    def size(self, *names: str, default: Any = _MISSING, least: int = 1, most: int = LARGEST) -> int:
        """A whole number between `least` and `most`."""
        value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(self._name(names), f"{_short(value)} is not a size.", f"Give a whole number from {least} to {most}.")
        return value

    def maybe(self, *names: str, least: int = 1) -> int | None:
        """A size, or None where the field is absent or null."""
        return self.size(*names, least=least) if self.has(*names) else None

    def layers(self, *names: str, default: Any = _MISSING) -> int:
        return self.size(*names, default=default, most=MOST_LAYERS)

    def flag(self, *names: str, default: Any = _MISSING) -> bool:
        value = self.get(*names, default=default)
        if not isinstance(value, bool):
            raise self.wrong(self._name(names), f"{_short(value)} is not a flag.", "Give true or false.")
        return value

    def number(self, *names: str, default: Any = _MISSING) -> float:
        value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > LARGEST:
            raise self.wrong(self._name(names), f"{_short(value)} is not a number.", "Give a finite number.")
        return value

    def word(self, *names: str, default: Any = _MISSING) -> str:
        value = self.get(*names, default=default)
        if not isinstance(value, str) or len(value) > 200:
            raise self.wrong(self._name(names), f"{_short(value)} is not a name.", "Give a string.")
        return value

    def choice(self, table: Mapping[str, Choice], *names: str, default: Any = _MISSING) -> Choice:
        """The entry of `table` that a string names."""
        word = self.word(*names, default=default)
        if word not in table:
            raise self.wrong(self._name(names), f"{_short(word)} is not known here.", closest(word, list(table)))
        return table[word]

    def words(self, *names: str) -> tuple[str, ...]:
        """A list of strings, empty where the field is absent."""
        value = self.get(*names, default=())
        if not _is_list(value) or not all(isinstance(v, str) and len(v) <= 200 for v in value):
            raise self.wrong(self._name(names), f"{_short(value)} is not a list of names.", "Give a list of strings.")
        return tuple(value)

    def sizes(self, name: str, least: int = 0) -> tuple[int, ...]:
        """A list of whole numbers, empty where the field is absent."""
        value = self.get(name, default=())
        if not _is_list(value):
            raise self.wrong(name, f"{_short(value)} is not a list.", "Give a list of whole numbers.")
        return tuple(Fields({name: v}, self.where).size(name, least=least) for v in value)

    def within(self, name: str, default: Mapping[str, Any] | None = None) -> "Fields":
        """The object under a field."""
        value = self.get(name, default=_MISSING if default is None else default)
        if not isinstance(value, Mapping):
            raise self.wrong(name, f"{_short(value)} is not an object.", "Give a JSON object.")
        return Fields(value, f"{self.where}: {name}")

    def divides(self, part: int, whole: int, name: str, of: str) -> int:
        """`whole / part`, which must be exact."""
        if whole % part:
            raise self.wrong(name, f"{part} does not divide {of} {whole}.", f"Give a {name} that divides {of}.")
        return whole // part

    def _name(self, names: Sequence[str]) -> str:
        return next((n for n in names if self.values.get(n) is not None), names[0])


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) <= LARGEST


def _short(value: Any) -> str:
    """A value as an error shows it: never long, whatever the file holds."""
    if isinstance(value, str):
        return repr(value[:40])
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return repr(value) if value is None or isinstance(value, int | float) else f"a {type(value).__name__}"
