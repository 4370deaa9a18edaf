"""The schedule engine: plays tasks that need each other on resources that run one at a time, and says what ran when.

It knows nothing of pipelines: a training step, a ring of messages and an offloaded optimizer are all lists of tasks.
Equal replicas need not be played twice: play one, with its share of the links, however many ranks the others fill.
"""

import math
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from narrows.errors import NarrowsError
from narrows.simulate.timeline import Resource, Span, Timeline

Need = tuple[int, float]


class Task(NamedTuple):
    """Something that takes one resource for a while.

    name, kind   what is shown of it; a name may be any value that prints
    resource     a rank (int) or anything else (str); None takes none: a delay, a barrier
    needs        (place of another task in the list, seconds from its end until this may start)
    priority     None: it runs after the tasks listed before it on its resource that have none either;
                 a number: it runs as soon as its resource is free, of several the lowest, then the first listed
    takes_bytes  memory of its resource that it takes when it starts
    frees_bytes  memory that it frees when it ends, of what it or an earlier task took
    """

    name: object
    kind: str
    resource: Resource | None
    seconds: float
    needs: tuple[Need, ...] = ()
    priority: float | None = None
    takes_bytes: float = 0.0
    frees_bytes: float = 0.0


def play(tasks: Sequence[Task]) -> Timeline:
    """Run every task as early as its needs and its resource allow; spans are in the order of the tasks.

    Events go by (time, priority, place), so the same list gives the same timeline. Raises NarrowsError for a task that
    takes a negative time, needs one that is not there, or takes part in a cycle, which it names.
    """
    needs = _chained(tasks)
    followers: list[list[Need]] = [[] for _ in tasks]
    missing = [len(wanted) for wanted in needs]
    for i, wanted in enumerate(needs):
        for other, lag in wanted:
            followers[other].append((i, lag))
    number = {name: i for i, name in enumerate(dict.fromkeys(task.resource for task in tasks))}
    on = [number[task.resource] for task in tasks]
    rank = [0.0 if task.priority is None else task.priority for task in tasks]
    endless = number.get(None, -1)
    free, holder = [0.0] * len(number), [-1] * len(number)
    queues: list[list[tuple[float, int]]] = [[] for _ in number]  # tasks that are ready and find their resource taken
    start, end, after = [0.0] * len(tasks), [-1.0] * len(tasks), [-1] * len(tasks)
    events = [(0.0, rank[i], i) for i, count in enumerate(missing) if not count]
    events.sort()
    while events:
        now, _, i = heappop(events)
        if i >= len(tasks):  # a resource that has a queue is free again
            at = i - len(tasks)
            _, i = heappop(queues[at])
            after[i] = holder[at]
        else:
            at = on[i]
            if at != endless and (free[at] > now or queues[at]):
                if not queues[at]:
                    heappush(events, (free[at], math.inf, len(tasks) + at))
                heappush(queues[at], (rank[i], i))
                continue
        start[i], end[i] = now, now + tasks[i].seconds
        if at != endless:
            free[at], holder[at] = end[i], i
            if queues[at]:
                heappush(events, (end[i], math.inf, len(tasks) + at))
        for other, lag in followers[i]:
            ready = end[i] + lag
            if ready > start[other] or after[other] < 0:
                start[other], after[other] = ready, i
            missing[other] -= 1
            if not missing[other]:
                heappush(events, (start[other], rank[other], other))
    if -1.0 in end:
        raise _deadlock(tasks, needs, end)
    spans = tuple(Span(t.name, t.kind, t.resource, s, e, a) for t, s, e, a in zip(tasks, start, end, after, strict=True))
    return Timeline(spans, _peaks(tasks, start, end))


def _chained(tasks: Sequence[Task]) -> list[tuple[Need, ...]]:
    """The needs of each task, with the one listed before it on its resource where it keeps its place; checked."""
    last: dict[Resource, int] = {}
    found: list[tuple[Need, ...]] = []
    for i, task in enumerate(tasks):
        if not 0 <= task.seconds < math.inf:
            raise NarrowsError(f"it takes {task.seconds} s.", where=_place(task), remedy="Give a finite time from zero up.")
        for other, lag in task.needs:
            if not 0 <= other < len(tasks):
                raise NarrowsError(
                    f"it needs task {other} of {len(tasks)}.", where=_place(task), remedy="Give a place in the list."
                )
            if not 0 <= lag < math.inf:
                raise NarrowsError(f"a need takes {lag} s.", where=_place(task), remedy="Give a finite time from zero up.")
        wanted = task.needs
        if task.priority is None and task.resource is not None:
            if task.resource in last:
                wanted = ((last[task.resource], 0.0), *wanted)
            last[task.resource] = i
        found.append(wanted)
    return found


def _peaks(tasks: Sequence[Task], start: Sequence[float], end: Sequence[float]) -> dict[Resource, float]:
    """The most bytes held at once on each resource; what one task frees another may take at the same moment."""
    changes: dict[Resource, list[tuple[float, bool, float]]] = {}
    for task, begins, ends in zip(tasks, start, end, strict=True):
        if task.resource is None:
            continue
        if task.takes_bytes:
            changes.setdefault(task.resource, []).append((begins, True, task.takes_bytes))
        if task.frees_bytes:
            changes.setdefault(task.resource, []).append((ends, False, -task.frees_bytes))
    peaks = {}
    for name, found in changes.items():
        held = peak = 0.0
        for _, _, change in sorted(found):
            held += change
            peak = max(peak, held)
        peaks[name] = peak
    return peaks


def _deadlock(tasks: Sequence[Task], needs: Sequence[Sequence[Need]], end: Sequence[float]) -> NarrowsError:
    """The error that names a cycle among the tasks that could not start."""
    path, at = list[int](), end.index(-1.0)
    while at not in path:
        path.append(at)
        at = next(other for other, _ in needs[at] if end[other] < 0)
    cycle = path[path.index(at) :]
    words = ", which waits for ".join(_place(tasks[i]) for i in (*cycle[:6], cycle[0]))
    return NarrowsError(f"deadlock: {words}.", where="schedule", remedy="Move one of them in the order of its resource.")


def _place(task: Task) -> str:
    if task.resource is None:
        return str(task.name)
    return f"{task.name} on {'rank ' if isinstance(task.resource, int) else ''}{task.resource}"
