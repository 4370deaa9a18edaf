"""What ran where and when: spans on resources, what they waited for, and the trace file that Chrome and Perfetto open."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from narrows.errors import NarrowsError
from narrows.figures import write

Resource = int | str  # a rank is an int; anything else, such as a link, is a str
IDLE = ("warm-up", "message", "wait", "drain")


class Span(NamedTuple):
    """One task as it ran, in seconds; `resource` None took no device (a delay, a barrier).

    after   the span that it started after, by place in the timeline: the last of what it needed, or what held its
            resource; -1 where nothing kept it. `start` less that one's end is the message between them.
    """

    name: object
    kind: str
    resource: Resource | None
    start: float
    end: float
    after: int = -1


@dataclass(frozen=True)
class Timeline:
    """What a simulation or a recording says ran on each resource.

    peak_bytes   the most memory held at once on each resource, where the tasks say what they hold
    """

    spans: tuple[Span, ...]
    peak_bytes: Mapping[Resource, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.spans:
            raise NarrowsError("nothing ran.", where="timeline", remedy="Give at least one task.")

    @cached_property
    def seconds(self) -> float:
        """From zero to the end of the last span: the makespan."""
        return max(span.end for span in self.spans)

    @cached_property
    def lanes(self) -> dict[Resource, list[int]]:
        """The spans of each resource in order of start, by place; ranks first, in order."""
        found: dict[Resource, list[int]] = {}
        for i, span in enumerate(self.spans):
            if span.resource is not None:
                found.setdefault(span.resource, []).append(i)
        for lane in found.values():
            lane.sort(key=lambda i: (self.spans[i].start, self.spans[i].end, i))
        return dict(sorted(found.items(), key=lambda item: (isinstance(item[0], str), item[0])))

    @property
    def ranks(self) -> list[int]:
        """Its ranks in order; raises NarrowsError where every resource is something else."""
        found = [name for name in self.lanes if isinstance(name, int)]
        if not found:
            raise NarrowsError("no rank ran anything.", where="timeline", remedy="Name a rank by a number.")
        return found

    @cached_property
    def busy_seconds(self) -> dict[Resource, float]:
        """Seconds that each resource works."""
        return {name: sum(self.spans[i].end - self.spans[i].start for i in lane) for name, lane in self.lanes.items()}

    @property
    def bubble(self) -> float:
        """Share of all ranks' time until the last ends in which they do nothing."""
        whole = len(self.ranks) * self.seconds
        return 1 - sum(self.busy_seconds[rank] for rank in self.ranks) / whole if whole else 0.0

    @property
    def longest_seconds(self) -> float:
        """The longest that a rank takes from its own first start to its own last end.

        It is the time of a step where each rank goes on with the next step on its own, as zero-bubble schedules do.
        """
        spans = self.spans
        return max(max(spans[i].end for i in self.lanes[r]) - spans[self.lanes[r][0]].start for r in self.ranks)

    @property
    def bubble_rate(self) -> float:
        """Share of the longest rank's time (`longest_seconds`) that the busiest rank does not work: the zero-bubble papers'."""
        whole = self.longest_seconds
        return 1 - max(self.busy_seconds[rank] for rank in self.ranks) / whole if whole else 0.0

    def idle(self) -> dict[int, dict[str, float]]:
        """Idle seconds of each rank by cause; with its busy seconds they add up to `seconds`.

        warm-up  before its first span    drain  after its last
        message  the last thing that a span waited for was on its way    wait  another rank had still to compute it
        """
        found = {}
        for rank in self.ranks:
            lane = [self.spans[i] for i in self.lanes[rank]]
            causes = dict.fromkeys(IDLE, 0.0)
            causes["warm-up"], causes["drain"] = lane[0].start, self.seconds - max(span.end for span in lane)
            free = lane[0].end
            for span in lane[1:]:
                gap = max(span.start - free, 0.0)
                sent = span.start - self.spans[span.after].end if span.after >= 0 else 0.0
                causes["message"] += min(gap, sent)
                causes["wait"] += gap - min(gap, sent)
                free = max(free, span.end)
            found[rank] = causes
        return found

    def critical_path(self) -> list[int]:
        """The chain of spans, by place and first to last, none of which could be longer without all ending later."""
        at = max(range(len(self.spans)), key=lambda i: (self.spans[i].end, -i))
        path = [at]
        while (at := self.spans[at].after) >= 0:
            path.append(at)
        return path[::-1]

    def trace(self) -> dict[str, Any]:
        """The timeline in the Trace Event Format (microseconds): one thread for each resource."""
        events: list[dict[str, Any]] = [
            {"name": "process_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": "narrows"}},
        ]
        for tid, (name, lane) in enumerate(self.lanes.items()):
            label = f"rank {name}" if isinstance(name, int) else name
            events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": tid, "args": {"name": label}})
            events.append({"name": "thread_sort_index", "ph": "M", "pid": 0, "tid": tid, "args": {"sort_index": tid}})
            for span in (self.spans[i] for i in lane):
                events.append({"name": str(span.name), "cat": span.kind, "ph": "X", "pid": 0, "tid": tid,
                               "ts": span.start * 1e6, "dur": (span.end - span.start) * 1e6})  # fmt: skip
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def save_trace(self, path: Path) -> None:
        """Write `trace()` as JSON, whole or not at all; ui.perfetto.dev and chrome://tracing open it."""
        write(path, json.dumps(self.trace()))
