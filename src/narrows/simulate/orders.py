"""The fixed pipeline orders: GPipe, 1F1B, interleaved and interlaced 1F1B, and DualPipe-V."""

from collections import Counter, defaultdict, deque

from narrows.errors import NarrowsError
from narrows.simulate.pipeline import Order, Pass


def gpipe(stages: int, microbatches: int) -> Order:
    """All forward passes, then all backward passes in reverse (Huang et al., 2019)."""
    return Order(
        tuple(
            tuple(Pass("F", s, m) for m in range(microbatches)) + tuple(Pass("B", s, m) for m in reversed(range(microbatches)))
            for s in range(stages)
        )
    )


def one_f_one_b(stages: int, microbatches: int, more: int = 0) -> Order:
    """As many forward passes as stages from here on, and `more`, then backward and forward in turn (PipeDream-Flush)."""
    rows = []
    for stage in range(stages):
        forward, backward = ([Pass(kind, stage, m) for m in range(microbatches)] for kind in "FB")
        rows.append(tuple(_woven(forward, backward, min(stages - stage - 1 + more, microbatches))))
    return Order(tuple(rows))


def interleaved(ranks: int, microbatches: int, chunks: int) -> Order:
    """1F1B over `chunks` stages on each rank, round and round (Narayanan et al., SC 2021, section 2.2).

    Raises NarrowsError where there are several chunks and the ranks do not divide the microbatches.
    """
    if chunks == 1:
        return one_f_one_b(ranks, microbatches)
    if microbatches % ranks:
        raise NarrowsError(f"{ranks} ranks do not divide {microbatches} microbatches.", where="interleaved",
                           remedy="Give a multiple of the ranks, or one chunk.")  # fmt: skip
    turns = [(k // ranks % chunks, k // (ranks * chunks) * ranks + k % ranks) for k in range(microbatches * chunks)]
    rows = []
    for rank in range(ranks):
        forward = [Pass("F", chunk * ranks + rank, m) for chunk, m in turns]
        backward = [Pass("B", (chunks - 1 - chunk) * ranks + rank, m) for chunk, m in turns]
        rows.append(tuple(_woven(forward, backward, min(2 * (ranks - rank - 1) + (chunks - 1) * ranks, len(turns)))))
    return Order(tuple(rows))


def interlaced(stages: int, microbatches: int) -> Order:
    """1F1B whose stages share the vocabulary and stop together for each microbatch's pass S (Lin et al., OSDI 2024).

    Between two S every rank does one forward and one backward pass, the last first backward and the others in turn, so that
    a stage holds one and a half microbatches more than the next. `together` says what S waits for.
    """
    rows = []
    for stage in range(stages):
        after, row = stages - 1 - stage, list[Pass]()
        for slot in range(-(after // 2), microbatches + after + 1):
            pair = [Pass("B", stage, slot - 1 - after), Pass("F", stage, slot + after // 2)]
            row += [one for one in (pair[::-1] if after % 2 else pair) if 0 <= one.microbatch < microbatches]
            row += [Pass("S", stage, slot)] if 0 <= slot < microbatches else []
        rows.append(tuple(row))
    return Order(tuple(rows))


def together(order: Order, kind: str = "S") -> dict[Pass, list[Pass]]:
    """What each pass waits for where those of a kind begin and end on all ranks at once, after the last stage's forward pass."""
    waits: dict[Pass, list[Pass]] = defaultdict(list)
    last, meet = len(order.ranks) - 1, defaultdict[int, list[Pass]](list)
    for one in (one for row in order.ranks for one in row if one.kind == kind):
        meet[one.microbatch].append(one)
    for row in order.ranks:
        for before, one, after in zip((None, *row), row, (*row[1:], None)):
            if one.kind != kind:
                continue
            for other in meet[one.microbatch]:
                waits[other] += [before] if before else []
            waits[one].append(Pass("F", last, one.microbatch))
            if after:
                waits[after] += meet[one.microbatch]
    return waits


def _woven(forward: list[Pass], backward: list[Pass], ahead: int) -> list[Pass]:
    """`ahead` forward passes, then one forward and one backward in turn, then the backward passes that are left."""
    row = forward[:ahead]
    for i, one in enumerate(forward[ahead:]):
        row += [one, backward[i]]
    return row + backward[len(forward) - ahead :]


def dualpipe_v(ranks: int, microbatches: int) -> Order:
    """Two stages on each rank as a V, forward and backward passes in pairs (DeepSeek-AI, DualPipe, cut in half).

    A pair runs its two passes at once on a device that overlaps them; here one after the other.
    Raises NarrowsError for fewer microbatches than stages.
    """
    if microbatches < 2 * ranks:
        raise NarrowsError(f"{microbatches} microbatches for {2 * ranks} stages.", where="dualpipe_v",
                           remedy="Give as many microbatches as stages, or more.")  # fmt: skip
    rows = []
    for rank in range(ranks):
        left = ranks - rank - 1
        ending = ["B1", "B0"] * (rank + 1)
        words = (
            ["F0"] * (2 * left)
            + ["F0", "F1"] * (rank + 1)
            + ["I1", "W", "F1"] * left
            + ["F0", "B1", "F1", "B0"] * (microbatches - 2 * ranks + rank + 1)
            + ["B1", "F1", "B0"] * left
            + ending[: rank + 1]
            + [word.replace("B", "I") for word in ending[rank + 1 :]]
            + ["W", "I0"] * left
            + ["W"] * (rank + 1)
        )
        row, pending, done = list[Pass](), deque[Pass](), Counter[str]()
        for word in words:
            if word == "W":  # of the oldest I that has none yet
                row.append(pending.popleft())
                continue
            turn = word.replace("I", "B")
            row.append(Pass(word[0], rank if word[1] == "0" else 2 * ranks - 1 - rank, done[turn]))
            done[turn] += 1
            if word[0] == "I":
                pending.append(row[-1]._replace(kind="W"))
        rows.append(tuple(row))
    return Order(tuple(rows))
