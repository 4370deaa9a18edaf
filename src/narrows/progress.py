"""How long work tells of itself: the one signature by which it reports what it does now."""

from typing import Protocol


class Tell(Protocol):
    """Called with what is being done now and, where it is known, how many of how many parts are done."""

    def __call__(self, what: str, done: int = 0, of: int = 0) -> None: ...


def silent(what: str, done: int = 0, of: int = 0) -> None:
    """Tells nobody."""
