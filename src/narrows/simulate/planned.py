"""Pipeline orders planned from a pipeline's own times under a memory limit: zero bubble on a line and on a V.

The backward pass is split: I gives the gradients of inputs that the next rank waits for, W those of weights, which can
wait. A plan fixes how forward and I passes mix on each rank, and then walks through time and puts W where the rank would
be idle, or where the memory limit asks for it. Running W sooner never takes memory, so a plan that fits goes on fitting.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import accumulate
from math import inf, isfinite

from narrows.errors import NarrowsError
from narrows.simulate.pipeline import Order, Pass, Work

_ROUNDING = 1e-9  # relative: sums of the same times or bytes in another order
_GAPS = ("fitting", "even", "always")
SHAPES = {"min": (1, 1, 1, 1), "half": (2, 1, 2, 1), "zero": (4, 2, 4, 2)}
Slots = dict[Pass, int]


def zero_bubble(work: Work, limit_bytes: float = inf) -> Order:
    """A plan with one stage on each rank (ZB-1p and ZB-2p of Qi et al., 2023, and any limit between and beyond).

    Before its first I a rank runs as many forward passes as fit into the time until that can arrive and into
    `limit_bytes`; then I and F alternate. Of the ways tried, the one whose longest rank is the shortest. The published
    ZB-1p has the memory of as many activations as there are ranks, ZB-2p twice that.
    Raises NarrowsError where not even one microbatch fits.
    """
    found = list[tuple[Order, float]]()
    for apart in (1, 2):
        ahead = _warm_up(work, limit_bytes, apart)
        rows = [_alternating(stage, ahead[stage], work.microbatches) for stage in range(work.stages)]
        found += [_filled(rows, work, limit_bytes, gaps) for gaps in _GAPS]
    return min(found, key=lambda one: one[1])[0]


def split(order: Order, work: Work, limit_bytes: float = inf) -> Order:
    """The order with each backward pass as I, and W where the rank would be idle, at its end, or where memory asks for it.

    The order of what is not W stays (2BP, Rae et al., 2024). Raises NarrowsError where `limit_bytes` do not hold it, for an
    order that cannot run, and for one whose microbatches take paths of their own.
    """
    order.check(work)
    if order.paths:
        raise NarrowsError("its microbatches take paths of their own.", where="split", remedy="Give an order without paths.")
    rows = [[one._replace(kind="I") if one.kind == "B" else one for one in row] for row in order.ranks]
    return min((_filled(rows, work, limit_bytes, gaps) for gaps in _GAPS), key=lambda one: one[1])[0]


def v_shaped(work: Work, limit_bytes: float = inf, shape: str = "") -> Order:
    """A plan with two stages on each rank, the first and the last on rank 0 (Qi et al., 2024): V-Min, V-Half, V-ZB.

    `shape` is min, half or zero: about a third, half and all of the memory of 1F1B; without one it is the fastest that
    fits into `limit_bytes`. Raises NarrowsError for an odd number of stages, and where none fits.
    """
    if shape and shape not in SHAPES:
        raise NarrowsError(f"{shape!r} is no shape.", where="v_shaped", remedy=f"Use {', '.join(SHAPES)}.")
    if work.stages % 2:
        raise NarrowsError(f"{work.stages} stages do not lie on a V.", where="v_shaped", remedy="Give two stages for each rank.")
    ranks, room, found = work.stages // 2, _room(work, limit_bytes), list[tuple[Order, float]]()
    for name in [shape] if shape else SHAPES:
        slots = _pattern(ranks, work.microbatches, SHAPES[name])
        peak = _peak(_complete(slots, ranks, inf))
        if peak > room:
            continue
        rows = _squeezed(slots, ranks, work.microbatches, peak if shape else room)
        found += [_filled(rows, work, limit_bytes, gaps) for gaps in ("fitting", "even")]
    if not found:
        raise NarrowsError(f"{limit_bytes:g} bytes do not hold it.", where=f"v_shaped {shape}".strip(),
                           remedy="Allow more memory, or use more stages.")  # fmt: skip
    return min(found, key=lambda one: one[1])[0]


def _room(work: Work, limit_bytes: float) -> float:
    """How many stages' activations fit beside what a backward pass works in, counting each as the largest."""
    largest, working = (max(sizes, default=0.0) for sizes in (work.held_bytes, work.working_bytes))
    return (limit_bytes * (1 + _ROUNDING) - working) // largest if largest and isfinite(limit_bytes) else inf


def _warm_up(work: Work, limit_bytes: float, apart: int) -> list[int]:
    """Forward passes of each rank before its first I; a rank has at least `apart` more than the next where memory is short."""
    forward, inputs, m = work.of_kind("F"), work.of_kind("I"), work.microbatches
    start = [0.0]
    for stage in range(1, work.stages):
        start.append(start[-1] + forward[stage - 1] + work.send_seconds(stage - 1, stage))
    ahead = [1] * work.stages
    arrival = start[-1] + forward[-1]
    for stage in reversed(range(work.stages)):
        held, working = work.changes_bytes("F", stage)[0], work.changes_bytes("I", stage)[0]
        if held + working > limit_bytes * (1 + _ROUNDING):
            raise NarrowsError(f"one microbatch holds {held + working:g} bytes of {limit_bytes:g}.", where=f"stage {stage}",
                               remedy="Allow more memory, or use more stages.")  # fmt: skip
        fits = (limit_bytes * (1 + _ROUNDING) - working) // held if held and isfinite(limit_bytes) else m
        timely = (arrival - start[stage]) * (1 + _ROUNDING) // forward[stage] if forward[stage] else m
        ahead[stage] = int(max(1, min(m, fits, timely)))
        ends = max(arrival, start[stage] + ahead[stage] * forward[stage]) + inputs[stage]
        arrival = ends + work.send_seconds(stage, stage - 1) if stage else ends
    for stage in range(1, work.stages):
        ahead[stage] = max(1, min(ahead[stage], ahead[0] - apart * stage, ahead[stage - 1] - 1))
    return ahead


def _alternating(stage: int, ahead: int, microbatches: int) -> list[Pass]:
    """`ahead` forward passes, then I and F in turn."""
    row = [Pass("F", stage, m) for m in range(ahead)]
    for m in range(microbatches):
        row.append(Pass("I", stage, m))
        if ahead + m < microbatches:
            row.append(Pass("F", stage, ahead + m))
    return row


def _filled(rows: Sequence[Iterable[Pass]], work: Work, limit_bytes: float, gaps: str) -> tuple[Order, float]:
    """The rows with W passes put in, and how long the longest rank takes.

    W runs where it fits into a gap, where memory is needed, and at the latest where the row itself has it. Into a gap that
    is too short for it, so that what follows is late, it runs never (`gaps` is fitting), always, or where waiting would
    leave this rank with more idle time than any has had so far (even).
    """
    queue = [deque(row) for row in rows]
    place = {one.stage: rank for rank, row in enumerate(rows) for one in row}
    seconds = {kind: work.of_kind(kind) for kind in "FIW"}
    changes = {(kind, stage): work.changes_bytes(kind, stage) for kind in "FIW" for stage in place}
    send = {(s, t): work.send_seconds(place[s], place[t]) for s in place for t in (s - 1, s + 1) if t in place}
    limit = limit_bytes * (1 + _ROUNDING)
    ranks, last = range(len(rows)), work.stages - 1
    ready: dict[Pass, float] = {Pass("F", 0, m): 0.0 for m in range(work.microbatches)}
    free, idle, held, first = [0.0] * len(rows), [0.0] * len(rows), [0.0] * len(rows), [inf] * len(rows)
    pending: list[deque[Pass]] = [deque() for _ in ranks]
    out: list[list[Pass]] = [[] for _ in ranks]
    heap: list[tuple[float, int]] = []

    def weights(rank: int) -> None:
        one = pending[rank].popleft()
        out[rank].append(one)
        free[rank] += seconds["W"][one.stage]
        held[rank] -= changes["W", one.stage][1]

    def offer(rank: int) -> None:
        """Queue the rank's next forward or I pass, once it is known when that can start."""
        row = queue[rank]
        while row and row[0].kind == "W":
            while row[0] in pending[rank]:
                weights(rank)
            row.popleft()
        if row and row[0] in ready:
            heappush(heap, (max(ready[row[0]], free[rank]), rank))

    offer(place[0])
    while heap:
        _, rank = heappop(heap)
        one = queue[rank].popleft()
        kind, stage, m = one
        at, mine = ready.pop(one), pending[rank]
        takes, frees = changes[kind, stage]
        while mine and held[rank] + takes > limit:
            weights(rank)
        while mine and free[rank] + seconds["W"][mine[0].stage] <= at * (1 + _ROUNDING):
            weights(rank)
        if mine and free[rank] < at and gaps != "fitting" and (gaps == "always" or idle[rank] + at - free[rank] > max(idle)):
            weights(rank)
        start = max(free[rank], at)
        if held[rank] + takes > limit:
            raise NarrowsError(f"{limit_bytes:g} bytes do not hold {one}.", where=f"rank {rank}", remedy="Allow more memory.")
        if out[rank]:
            idle[rank] += start - free[rank]
        else:
            first[rank] = start
        free[rank] = end = start + seconds[kind][stage]
        held[rank] += takes - frees if kind == "I" else takes
        out[rank].append(one)
        if kind == "I":
            mine.append(Pass("W", stage, m))
        step = 1 if kind == "F" else -1
        target = rank
        if kind == "F" and stage == last:
            ready[Pass("I", stage, m)] = end
        elif stage + step >= 0:
            ready[Pass(kind, stage + step, m)] = end + send[stage, stage + step]
            target = place[stage + step]
        offer(rank)
        if target != rank and queue[target] and queue[target][0] == Pass(kind, stage + step, m):
            offer(target)
    for rank in ranks:
        if queue[rank]:
            remedy = "Play the order: it names the cycle."
            raise NarrowsError(f"{queue[rank][0]} never has what it needs.", where=f"rank {rank}", remedy=remedy)
        while pending[rank]:
            weights(rank)
    return Order(tuple(map(tuple, out))), max(end - begin for end, begin in zip(free, first, strict=True))


def _pattern(ranks: int, microbatches: int, strides: tuple[int, int, int, int]) -> Slots:
    """Slots of unit length for F down and up the V, then I down and up, a microbatch every six slots.

    `strides` are the slots from rank to rank on the four legs. A leg starts as soon as none of its passes falls on one of
    an earlier leg, on any rank; two of six slots stay free for W. Of the pauses between F and I the one that holds least.
    """
    tried = [_legs(ranks, strides, pause) for pause in range(6)]
    warm = min(microbatches, tried[-1][-1][0] // 6 + 2)
    legs = min(tried, key=lambda legs: (_peak(_complete(_repeated(legs, warm), ranks, inf)), legs[-1][0]))
    return _repeated(legs, microbatches)


def _legs(ranks: int, strides: tuple[int, int, int, int], pause: int) -> list[list[int]]:
    """The first slot of each leg on each rank, with at least `pause` slots between F and I."""
    legs: list[list[int]] = []
    for leg, stride in enumerate(strides):
        steps = [stride * (ranks - 1 - rank if leg % 2 else rank) for rank in range(ranks)]
        begin = legs[-1][ranks - 1 if leg % 2 else 0] + 1 + pause * (leg == 2) if legs else 0
        while any((begin + steps[r] - other[r]) % 6 == 0 for other in legs for r in range(ranks)):
            begin += 1
        legs.append([begin + step for step in steps])
    return legs


def _repeated(legs: Sequence[Sequence[int]], microbatches: int) -> Slots:
    """The legs of every microbatch, each six slots after the one before."""
    ranks = len(legs[0])
    slots: Slots = {}
    for rank in range(ranks):
        far = 2 * ranks - 1 - rank
        for kind, stage, leg in (("F", rank, 0), ("F", far, 1), ("I", far, 2), ("I", rank, 3)):
            slots.update({Pass(kind, stage, m): legs[leg][rank] + 6 * m for m in range(microbatches)})
    return slots


def _rank(one: Pass, ranks: int) -> int:
    return min(one.stage, 2 * ranks - 1 - one.stage)


def _rows(slots: Slots, ranks: int) -> list[list[tuple[int, Pass]]]:
    """The passes of each rank in order of their slots, without W."""
    rows: list[list[tuple[int, Pass]]] = [[] for _ in range(ranks)]
    for one, slot in slots.items():
        rows[_rank(one, ranks)].append((slot, one))
    return [sorted(row) for row in rows]


def _with_weights(row: Iterable[tuple[int, Pass]], room: float) -> Iterable[tuple[int, Pass]]:
    """A row with each W in the first free slot after its I; earlier, in the slot of the next F, where `room` is short."""
    pending, now, held = deque[Pass](), 0, 0
    for slot, one in row:
        while pending and (now < slot or (one.kind == "F" and held >= room)):
            yield min(now, slot), pending.popleft()
            held -= 1
            now += 1
        now = slot + 1
        held += one.kind == "F"
        yield slot, one
        if one.kind == "I":
            pending.append(one._replace(kind="W"))
    for one in pending:
        yield now, one
        now += 1


def _peak(rows: Iterable[Iterable[Pass]]) -> int:
    """The most activations that a rank holds."""
    return max(max(accumulate({"F": 1, "I": 0, "W": -1}[one.kind] for one in row)) for row in rows)


def _complete(slots: Slots, ranks: int, room: float) -> list[list[Pass]]:
    """Every rank's passes in order of their slots, with W."""
    return [[one for _, one in _with_weights(row, room)] for row in _rows(slots, ranks)]


def _squeezed(slots: Slots, ranks: int, microbatches: int, room: float) -> list[list[Pass]]:
    """Rows with W for the pattern, of which start and end have moved to the earliest free slots that memory allows."""
    begins, ends = slots[Pass("I", 0, 0)], slots[Pass("F", 0, microbatches - 1)]
    for row in _rows(slots, ranks):
        slots.update({one: slot for slot, one in _with_weights(row, inf) if one.kind == "W"})
    _advance(slots, ranks, [(slot, one) for one, slot in slots.items() if slot <= begins], room)
    slots = {one: slot for one, slot in slots.items() if one.kind != "W"}
    rows = _complete(slots, ranks, room)
    _advance(slots, ranks, [(slot, one) for one, slot in slots.items() if slot > ends], inf)
    drained = _complete(slots, ranks, room)
    return drained if _peak(drained) <= room else rows


def _advance(slots: Slots, ranks: int, passes: list[tuple[int, Pass]], room: float) -> None:
    """Move passes to the first slot after what they need that is free on their rank and, for F, leaves memory in `room`."""
    length = max(slots.values()) + 2
    taken = [bytearray(length) for _ in range(ranks)]
    held = [[0] * length for _ in range(ranks)]
    for one, slot in slots.items():
        rank = _rank(one, ranks)
        taken[rank][slot] = 1
        if one.kind != "I":
            held[rank][slot + (one.kind == "W")] += 1 if one.kind == "F" else -1
    for row in held:
        for slot in range(1, length):
            row[slot] += row[slot - 1]
    for now, one in sorted(passes, key=lambda item: (item[0], item[1].kind == "W", item[1])):
        kind, stage, m = one
        rank = _rank(one, ranks)
        before = {"F": Pass("F", stage - 1, m), "I": Pass("I", stage + 1, m), "W": Pass("I", stage, m)}[kind]
        needs = [slots.get(before, -1), slots.get(one._replace(microbatch=m - 1), -1)]
        if kind == "I" and before not in slots:
            needs.append(slots[Pass("F", stage, m)])
        earliest = max(needs) + 1
        if kind == "F":
            lowest = now
            while lowest > earliest and held[rank][lowest - 1] < room:
                lowest -= 1
            earliest = lowest
        slot = taken[rank].find(0, earliest, now)
        if slot < 0:
            continue
        slots[one] = slot
        taken[rank][now], taken[rank][slot] = 0, 1
        if kind != "I":
            late, change = (kind == "W"), 1 if kind == "F" else -1
            for at in range(slot + late, now + late):
                held[rank][at] += change
