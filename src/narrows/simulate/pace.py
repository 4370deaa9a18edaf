"""The time between the tokens of sequences that decode together: a few numbers a run of steps, however many tokens it gives."""

from collections.abc import Callable

Tell = Callable[[int, int, int, float], None]


class Pace:
    """Hands `tell` what passes between tokens: picoseconds, how much more each time, how many times, in how many sequences.

    Sequences that gave a token in the last step wait the same; those that gave their first one since have waited less. Where
    `taken` tokens come at once in the mean, one of them waits for the whole step and the others for nothing.
    """

    def __init__(self, tell: Tell | None, taken: float = 1.0) -> None:
        self._tell, self._taken = tell, taken
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

    def steps(self, now: int, each: int, slope: int, n: int, sequences: int, own: int | None = None) -> None:
        """n steps begin now in which all `sequences` give a token: the first takes `each`, the others ever `slope` more.

        `own` is what the first takes without prompts beside it (None: all).
        """
        if not self._tell:
            return
        at, own = now + each, each if own is None else own
        for since in self._fresh.values():
            self._waited(self._tell, at - since, 0, 1, 1, own)
        if sequences > len(self._fresh):
            self._waited(self._tell, at - self._last, 0, 1, sequences - len(self._fresh), own)
        self._fresh.clear()
        if n > 1:
            self._waited(self._tell, each + slope, slope, n - 1, sequences, each + slope)
        self._last = now + n * each + slope * (n * (n - 1) // 2)

    def _waited(self, tell: Tell, first: int, slope: int, n: int, sequences: int, own: int) -> None:
        """As `tell`, for a token that took `own` of the wait: its whole step took `taken` times as long, and gave as many.

        Those that came with it are told later, as tokens that waited for a whole step: as many are taken back here.
        """
        if self._taken == 1.0:
            tell(first, slope, n, sequences)
            return
        whole, steeper, with_it = round(own * self._taken), round(slope * self._taken), sequences - sequences / self._taken
        if first == own:
            tell(whole, steeper, n, sequences - with_it)
        else:
            tell(first - own + whole, 0, 1, sequences)
            tell(whole, 0, 1, -with_it)
        tell(0, 0, n, with_it)
