"""Requests on their way: from clients to replicas, from those that read prompts to those that decode, and what answers bring.

Everything happens in the order of time. Where an answer brings further requests (the next turn of a session, the next
request of a client), the engine that may answer first goes first and no further than that, so that none is ahead of
what may yet arrive; else each engine goes on by itself from arrival to arrival.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from heapq import heappop, heappush
from itertools import count
from typing import Protocol

from narrows.simulate.requests import Request
from narrows.simulate.rules import Rules
from narrows.simulate.serving import Engine
from narrows.simulate.step_times import StepTimes

Route = Callable[[Request, Sequence[Engine]], int]
Follow = Callable[[Request, bool], Iterable[Request]]  # what follows a request that was answered, or not
FOUND = 0.3  # share of a prompt that must be found for a replica to be preferred: the default of SGLang's gateway (cache_aware)
MORE, TIMES = 64, 1.5  # requests more, and times as many, inside one than inside another that are too uneven: the same


def fewest(request: Request, replicas: Sequence[Engine]) -> int:
    """The replica with the fewest requests inside."""
    return min(range(len(replicas)), key=lambda i: replicas[i].load)


def in_turn(request: Request, replicas: Sequence[Engine]) -> int:
    """One replica after another."""
    return min(range(len(replicas)), key=lambda i: replicas[i].pushed)


def sticky(request: Request, replicas: Sequence[Engine]) -> int:
    """The replica that remembers most of the prompt, as after the last turn of its session; the fewest requests where none does.

    Also where that would make the replicas too uneven.
    """
    loads = [engine.load for engine in replicas]
    if max(loads) - min(loads) <= MORE or max(loads) <= TIMES * min(loads):
        found = [engine.found(request) for engine in replicas]
        if max(found) > FOUND * request.prompt:
            return min(range(len(replicas)), key=lambda i: (-found[i], loads[i]))
    return fewest(request, replicas)


def least_work(request: Request, replicas: Sequence[Engine]) -> int:
    """The replica whose requests, with this one, take it the least seconds: each replica's own, and with what it remembers.

    It is told how long answers will be, as clients' limits tell a router.
    """

    def seconds(engine: Engine) -> int:
        reads, gives = _paces(engine.times, engine.rules, engine.blocks)
        prompts = 0 if request.read else engine.prompts + request.prompt - engine.found(request)
        return prompts * reads + (engine.outputs + request.tokens) * gives

    return min(range(len(replicas)), key=lambda i: seconds(replicas[i]))


ROUTES: dict[str, Route] = {"fewest": fewest, "in-turn": in_turn, "sticky": sticky, "least-work": least_work}


@lru_cache
def _paces(times: StepTimes, rules: Rules, blocks: int) -> tuple[int, int]:
    """Picoseconds of a token of a prompt and of an answer, in a full step, with every block in use."""
    tokens, sequences = min(rules.max_tokens, 8192), min(rules.max_sequences, blocks)
    return times.reading(tokens, 0) // tokens, times.decode(sequences, blocks * rules.block)[1] // sequences


def turns(request: Request, answered: bool) -> Iterable[Request]:
    """The requests that it says itself."""
    return request.then if answered else ()


class Replicated(Protocol):
    """Replicas of one role: all that there are, and those that a request of a moment may go to."""

    @property
    def engines(self) -> Sequence[Engine]:
        """All that have something to do or may get it."""

    def at(self, now: int) -> Sequence[Engine]:
        """Those that a request of this moment may go to."""


class Standing:
    """Replicas that are always there."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = engines

    def at(self, now: int) -> Sequence[Engine]:
        """All of them."""
        return self.engines


class Traffic:
    """Requests and the replicas that they go to: `roles` in the order in which a request passes them.

    feeds   answers bring further requests: from the start, or from the first request on that says so
    """

    def __init__(self, roles: Sequence[Replicated], route: Route, feeds: bool) -> None:
        self._roles, self._route, self._feeds = roles, route, feeds
        self._unlike = [len({(one.rules, one.blocks) for one in role.engines}) > 1 for role in roles]
        self._coming: list[tuple[int, int, int, Request, int]] = []  # arrival, sender, number, where to
        self._numbers = count()

    def play(self, requests: Iterable[Request]) -> None:
        """All requests, in the order of their arrival, and what they bring, until the last answer."""
        for request in requests:
            self._until(request.arrival)
            self._push(request, 0)
        self._until(None)

    def send(self, request: Request, sender: int, role: int = 0) -> None:
        """A request is on its way to a role; of two that arrive at once, that of the lower sender is first."""
        heappush(self._coming, (request.arrival, sender, next(self._numbers), request, role))

    def _push(self, request: Request, role: int) -> None:
        self._feeds = self._feeds or bool(request.then)
        there = self._roles[role].at(request.arrival)
        if self._unlike[role]:
            there = [engine for engine in there if not request.refusal(engine.rules, engine.blocks)] or there
        there[self._route(request, there)].push(request)

    def _until(self, end: int | None) -> None:
        """Let all pass that comes before a moment, or all that there is."""
        coming = self._coming
        while True:
            first = coming[0] if coming and (end is None or coming[0][0] < end) else None
            moment, role = (first[0], first[4]) if first else (end, len(self._roles) - 1 if end is None else 0)
            if self._together(moment) if self._feeds else self._apart(moment, role):
                continue  # with what came up before that moment
            if first is None:
                return
            heappop(coming)
            self._push(first[3], first[4])

    def _early(self, moment: int | None) -> bool:
        """Something is to arrive before that."""
        return bool(self._coming) and (moment is None or self._coming[0][0] < moment)

    def _apart(self, moment: int | None, role: int) -> bool:
        """Each engine takes all steps that begin before a moment, role by role; True where a request comes up before it."""
        for one in self._roles[: role + 1]:
            for engine in one.engines:
                engine.advance(moment)
            if self._coming and self._early(moment):
                return True
        return False

    def _together(self, moment: int | None) -> bool:
        """The same where answers bring requests: the engine that may answer first goes first, until it does."""
        engines = [engine for role in self._roles for engine in role.engines]
        bounds = [engine.bound for engine in engines]
        while bounds and (bound := min(bounds)) < (math.inf if moment is None else moment):
            first = bounds.index(bound)
            engines[first].advance(int(bound))
            bounds[first] = engines[first].bound
            if self._early(moment):
                return True
        for engine in engines:
            engine.advance(moment)
        return False
