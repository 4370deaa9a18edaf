"""What a picture of a served load needs, in memory that does not grow: who was where over time, and the slowest."""

from heapq import heappush, heapreplace
from itertools import accumulate

from narrows.simulate.requests import Answer
from narrows.simulate.step_times import PS

STATES = ("waiting", "being read", "being answered")
BINS = 400  # of equal time: when the load lasts longer, two become one
SLOWEST = 12


class Watch:
    """Hears every answer (`add`); gives mean numbers of requests in each state over time, and the slowest requests."""

    def __init__(self) -> None:
        self._width = PS // 100  # picoseconds of a bin
        self._changes = {state: [0] * (BINS + 1) for state in STATES}  # of the picoseconds spent there, bin by bin
        self._slowest: list[tuple[int, int, Answer]] = []
        self._seen = 0

    def add(self, answer: Answer) -> None:
        """One request more."""
        while answer.last >= BINS * self._width:
            self._widen()
        for state, (begin, end) in answer.phases.items():
            self._change(state, begin, 1)
            self._change(state, end, -1)
        self._seen += 1
        one = answer.last - answer.request.arrival, -self._seen, answer
        if len(self._slowest) < SLOWEST:
            heappush(self._slowest, one)
        elif one > self._slowest[0]:
            heapreplace(self._slowest, one)

    def _change(self, state: str, at: int, sign: int) -> None:
        """From `at` on one request more, or fewer: the rest of its bin, and the whole of those after it."""
        bin_, inside = divmod(at, self._width)
        self._changes[state][bin_] += sign * (self._width - inside)
        self._changes[state][bin_ + 1] += sign * inside

    def _widen(self) -> None:
        self._width *= 2
        for state, changes in self._changes.items():
            spent = list(accumulate(changes))[:BINS]
            pairs = [a + b for a, b in zip(spent[::2], spent[1::2], strict=True)] + [0] * (BINS - BINS // 2 + 1)
            self._changes[state] = [after - before for before, after in zip([0, *pairs], pairs, strict=False)]

    @property
    def bin_seconds(self) -> float:
        """How long a bin lasts."""
        return self._width / PS

    def inside(self) -> dict[str, list[float]]:
        """Mean number of requests in each state, bin by bin from time zero to the last that saw any."""
        found = {state: [n / self._width for n in accumulate(c)][:BINS] for state, c in self._changes.items()}
        last = max((i + 1 for row in found.values() for i, n in enumerate(row) if n), default=0)
        return {state: row[:last] for state, row in found.items()}

    @property
    def slowest(self) -> list[Answer]:
        """The requests that took longest, the longest first; of equals the first."""
        return [answer for _, _, answer in sorted(self._slowest, key=lambda one: one[:2], reverse=True)]
