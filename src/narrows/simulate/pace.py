"""The time between the tokens of sequences that decode together: a few numbers a run of steps, however many tokens it gives."""

from collections.abc import Callable

Tell = Callable[[int, int, int, int], None]


class Pace:
    """Hands `tell` what passes between tokens: picoseconds, how much more each time, how many times, in how many sequences.

    Sequences that gave a token in the last step wait the same; those that gave their first one since have waited less.
    """

    def __init__(self, tell: Tell | None) -> None:
        self._tell = tell
        self._last = 0
        self._fresh: dict[object, int] = {}
        self._lost: dict[object, int] = {}

    def begin(self, sequence: object, now: int) -> None:
        """A sequence has given its first token, or the next after it lost its room."""
        if self._tell:
            if sequence in self._lost:
                self._tell(now - self._lost.pop(sequence), 0, 1, 1)
            self._fresh[sequence] = now

    def lose(self, sequence: object) -> None:
        """A sequence loses its room."""
        if self._tell:
            self._lost[sequence] = self._fresh.get(sequence, self._last)

    def end(self, sequence: object) -> None:
        """A sequence is no longer among those that decode."""
        self._fresh.pop(sequence, None)

    def steps(self, now: int, each: int, slope: int, n: int, sequences: int) -> None:
        """n steps begin now in which all `sequences` give a token: the first takes `each`, the others ever `slope` more."""
        if not self._tell:
            return
        at = now + each
        for since in self._fresh.values():
            self._tell(at - since, 0, 1, 1)
        if sequences > len(self._fresh):
            self._tell(at - self._last, 0, 1, sequences - len(self._fresh))
        self._fresh.clear()
        if n > 1:
            self._tell(each + slope, slope, n - 1, sequences)
        self._last = now + n * each + slope * (n * (n - 1) // 2)
