"""What else to ask of a deployment: where it saturates, what more of a resource gives, how its requests lay in time."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from heapq import heappop, heappush
from itertools import chain, cycle, islice

from narrows.errors import NarrowsError
from narrows.simulate.fleet import Group, Groups, serve, several
from narrows.simulate.outcome import Outcome
from narrows.simulate.requests import Answer, Request
from narrows.simulate.step_times import PS
from narrows.simulate.timeline import Span, Timeline

RESOURCES = ("compute", "bandwidth", "link")
MOST = 5000  # requests of a load that are looked at
TIMES = 4  # that a flood fills what runs at a time


def saturation(requests: Iterable[Request], group: Groups, prefill: Groups | None = None) -> float:
    """Requests a second that a deployment serves when all of them are there at once: a higher rate piles up without end.

    The load is repeated until it fills the replicas a few times. Counted while the middle 60 % of the answers end, so
    that neither filling up nor running dry is in it. Turns of a session are requests of their own.
    """
    ends: list[int] = []
    turns = (turn for first in requests for turn in (first, *first.followers()))
    once = [replace(request, arrival=0, session=0, then=()) for request in islice(turns, MOST)]
    again = [replace(request, hashes=()) for request in once]  # whose prompts nobody has read before
    count = max(len(once), TIMES * sum(one.engines * one.rules.max_sequences for one in several(group)))
    serve(islice(chain(once, cycle(again)), count), group, prefill, each=lambda answer: ends.append(answer.last))
    ends.sort()
    low, high = len(ends) // 5, len(ends) * 4 // 5
    if high <= low or ends[high] == ends[low]:
        raise NarrowsError(f"{len(ends)} answers are too few.", where="saturation", remedy="Give 10 requests or more that fit.")
    return (high - low) * PS / (ends[high] - ends[low])


def what_if(played: Callable[[Groups, Groups | None], Outcome], group: Groups, prefill: Groups | None = None,
            more: float = 1.1) -> dict[str, dict[str, float]]:  # fmt: skip
    """How latencies change with `more` of each resource, as ratios of the means: 0.9 is a tenth less.

    `played` plays the same load on the groups that it is given. Gains of a share more are derivatives: they do not add up.
    """

    def means(outcome: Outcome) -> dict[str, float]:
        return {"ttft": outcome.ttft.mean, "tpot": outcome.tpot.mean, "e2e": outcome.e2e.mean}

    def scaled(groups: Groups, resource: str) -> Groups:
        return tuple(scaled_one(one, resource) for one in several(groups))

    def scaled_one(one: Group, resource: str) -> Group:
        wire = one.wire and replace(one.wire, bandwidth_bytes_per_s=one.wire.bandwidth_bytes_per_s * more)
        machine = one.machine.scaled(**{resource: more})
        return replace(one, machine=machine, wire=wire if resource == "link" else one.wire)

    before = means(played(group, prefill))
    found = {}
    for resource in RESOURCES:
        after = means(played(scaled(group, resource), prefill and scaled(prefill, resource)))
        found[resource] = {name: after[name] / value for name, value in before.items() if value > 0}
    return found


def timeline(answers: Sequence[Answer]) -> Timeline:
    """Requests in time: each waits, is read and is answered in a lane of its own, which others take when it is done."""
    spans: list[Span] = []
    busy: list[tuple[int, int]] = []  # (until, lane)
    for number, answer in enumerate(sorted(answers, key=lambda a: (a.request.arrival, a.last))):
        arrival = answer.request.arrival
        lane = heappop(busy)[1] if busy and busy[0][0] <= arrival else len(busy)
        heappush(busy, (answer.last, lane))
        label = answer.request.name or str(number)
        for state, (begin, end) in answer.phases.items():
            if end > begin:
                spans.append(Span(f"{label} {state}", state, f"lane {lane:04d}", begin / PS, end / PS))
    return Timeline(tuple(spans))
