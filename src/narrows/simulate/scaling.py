"""Replicas that come and go with the load: when to start one, how long that takes, when it goes."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from narrows.diagnose import prepared
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.simulate.serving import Engine
from narrows.simulate.step_times import PS
from narrows.step import Step

SOURCES = ("disk", "host", "peer")
DISK_BYTES_PER_S = 6.5e9  # of an NVMe disk, where the machine's file names none: Intel P5510, datasheet
TENSORS_SECONDS = 0.3  # to lay out a model's tensors before its weights come (DeepServe, arXiv 2501.14417, section 6.2)
ENGINE_SECONDS = 30.0  # of process, libraries, device and captured graphs: an assumption, of the order of what vLLM logs


def start_seconds(graph: Graph, machine: Machine, devices: int, source: str, warm: bool = False) -> float:
    """Seconds until a new replica serves: its engine starts, unless it is `warm`, then each device loads its weights.

    Errors and sources are those of `source_bytes_per_s`.
    """
    own = float(prepared(graph, Step.decode(1, 1), machine, devices).weight_bytes)
    return own / source_bytes_per_s(machine, devices, source) + TENSORS_SECONDS + (0.0 if warm else ENGINE_SECONDS)


def source_bytes_per_s(machine: Machine, devices: int, source: str) -> float:
    """Bytes a second that each of so many devices of a replica gets, all at once.

    source   disk; host: the host's memory, over the link to it; peer: a replica that runs, over the link between devices.
    Raises NarrowsError for another source and for a machine without that link.
    """
    if source not in SOURCES:
        raise NarrowsError(f"nothing comes from {source!r}.", where="autoscaling", remedy=f"Give {', '.join(SOURCES)}.")
    link = machine.host_link if source == "host" else machine.link or machine.host_link
    if source == "disk":
        rate = machine.storage.bandwidth_bytes_per_s if machine.storage else DISK_BYTES_PER_S
        return rate / devices  # which all read the same disk
    if link is None:
        raise NarrowsError(f"{machine.name} has no link.", where=source, remedy="Load from disk, or give a link.")
    return link.bandwidth_bytes_per_s


@dataclass(frozen=True, slots=True)
class Scaling:
    """When replicas come and go, looked at as requests arrive; a group's `replicas` are the most there can be.

    least    that are always there (0: the first request starts one)
    load     requests inside a replica, those that start counted too, above which one more is started
    start_seconds   until a new one serves
    idle_seconds    for which fewer would have done, after which one takes no more requests and goes when its last is answered
    """

    least: int = 1
    load: float = 32.0
    start_seconds: float = ENGINE_SECONDS
    idle_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not (self.least >= 0 and self.load > 0 and self.start_seconds >= 0 and self.idle_seconds >= 0):
            raise NarrowsError(f"{self} cannot be.", where="autoscaling", remedy="Give a load above 0, the rest from 0.")


class Replicas:
    """The replicas of a load that come and go.

    `engine(ready)` makes one that serves from then on (picoseconds); `gone` hears of each that is done.
    """

    def __init__(self, scaling: Scaling, most: int, engine: Callable[[int], Engine], gone: Callable[[Engine], None]) -> None:
        if scaling.least > most:
            raise NarrowsError(f"{scaling.least} are always there, and {most} at the most.", where="autoscaling",
                               remedy="Raise the most, or lower the least.")  # fmt: skip
        self._scaling, self._most, self._engine, self._gone = scaling, most, engine, gone
        self._taking = [engine(0) for _ in range(scaling.least)]  # that take requests
        self._leaving: dict[Engine, int] = {}  # that take none, since when
        self._since = dict.fromkeys(self._taking, 0)
        self._wanted: deque[tuple[int, int]] = deque()  # (when, how many), falling, of the last idle_seconds
        self.starts = 0
        self.paid = 0  # picoseconds of all replicas, from their start to their end

    @property
    def engines(self) -> Sequence[Engine]:
        """All that are there."""
        return list(self._since)

    def at(self, now: int) -> Sequence[Engine]:
        """Those that a request of this moment may go to: all that serve, else the one that will first."""
        taking, leaving, scaling = self._taking, self._leaving, self._scaling
        for engine in self._since:
            engine.advance(now)
        for engine in [engine for engine in leaving if not engine.load]:
            self._end(engine, leaving.pop(engine))
        inside = sum(engine.load for engine in taking) + 1
        wanted = min(max(math.ceil(inside / scaling.load), scaling.least), self._most)
        for _ in range(wanted - len(taking)):
            taking.append(leaving.popitem()[0] if leaving else self._start(now))
        for _ in range(len(taking) - self._lately(now, wanted)):
            engine = min(taking, key=lambda engine: engine.load)
            taking.remove(engine)
            leaving[engine] = now
        return [engine for engine in taking if engine.ready <= now] or [min(taking, key=lambda engine: engine.ready)]

    def _lately(self, now: int, wanted: int) -> int:
        """The most that were wanted in the last idle_seconds."""
        while self._wanted and self._wanted[-1][1] <= wanted:
            self._wanted.pop()
        self._wanted.append((now, wanted))
        while self._wanted[0][0] < now - round(self._scaling.idle_seconds * PS):
            self._wanted.popleft()
        return self._wanted[0][1]

    def _start(self, now: int) -> Engine:
        engine = self._engine(now + round(self._scaling.start_seconds * PS))
        self.starts += 1
        self._since[engine] = now
        return engine

    def _end(self, engine: Engine, left: int) -> None:
        self.paid += max(engine.now, left) - self._since.pop(engine)
        self._gone(engine)

    def close(self) -> None:
        """The load is over: all is answered, and who takes requests stays until the last answer, or until it has started."""
        for engine in self._since:
            engine.advance()
        end = max((engine.now for engine in self._since if engine.now > engine.ready), default=0)
        for engine, left in self._leaving.items():
            self._end(engine, left)
        for engine in self._taking:
            self._end(engine, end)
