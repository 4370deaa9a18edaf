"""What clients ask of a service and must get, and how much of it a deployment can serve."""

import math
from dataclasses import dataclass, replace

from narrows.errors import NarrowsError, closest
from narrows.simulate.fleet import Group, serve
from narrows.simulate.outcome import Outcome
from narrows.simulate.requests import Request
from narrows.simulate.step_times import PS

NEAR = 1.02  # rates this close together count as one
MEASURES = ("ttft", "tpot", "tbt", "queue", "e2e")
SAMPLE = 2000  # requests that a capacity is found on: the first of a longer load


@dataclass(frozen=True)
class Deployment:
    """What is run: replicas, and where prompts are read apart (`prefill`) those that read them."""

    group: Group
    prefill: Group | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.group, self.prefill) if self.prefill else (self.group,)

    @property
    def devices(self) -> int:
        return sum(g.devices * g.replicas for g in self.groups)


@dataclass(frozen=True, slots=True)
class Objective:
    """What this share of them must keep: at most so many `seconds` of one of MEASURES, an Outcome's."""

    measure: str
    share: float
    seconds: float

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise NarrowsError(f"{self.measure!r} is no measure.", where="demand", remedy=closest(self.measure, list(MEASURES)))

    def kept(self, outcome: Outcome) -> bool:
        """Whether they got it; a request that is rejected did not."""
        served = outcome.requests >= self.share * (outcome.requests + outcome.rejected)
        return served and not getattr(outcome, self.measure).quantile(self.share) > self.seconds


@dataclass(frozen=True)
class Demand:
    """A load on what is there (`group`), and what its clients must get.

    requests   at any rate: `play` and `capacity` stretch their arrivals
    """

    group: Group
    requests: tuple[Request, ...]
    objectives: tuple[Objective, ...] = ()

    def __post_init__(self) -> None:
        if not self.requests:
            raise NarrowsError("it has no requests.", where="demand", remedy="Give at least one.")

    @property
    def rate(self) -> float:
        """Requests per second as they stand; 0 where all arrive at once."""
        span = self.requests[-1].arrival - self.requests[0].arrival
        return (len(self.requests) - 1) * PS / span if span else 0.0

    def play(self, deployment: Deployment, rate: float = 0.0) -> Outcome:
        """What the clients see, at a rate (requests per second; 0: as the requests stand)."""
        stretch = self.rate / rate if rate else 1.0
        requests = (replace(r, arrival=round(r.arrival * stretch)) for r in self.requests)
        return serve(requests, deployment.group, deployment.prefill)

    def kept(self, outcome: Outcome) -> bool:
        """Whether the clients got what they must get."""
        return outcome.requests > 0 and all(one.kept(outcome) for one in self.objectives)

    def capacity(self, deployment: Deployment, near: float = NEAR) -> float:
        """Requests per second up to which its clients get what they must, to a factor `near`; 0 where they never do."""
        low, high, rate, sample = 0.0, math.inf, 1.0, replace(self, requests=self.requests[:SAMPLE])
        while 1e-3 < rate < 1e6 and high > low * near:
            if self.kept(sample.play(deployment, rate)):
                low = rate
            else:
                high = rate
            rate = math.sqrt(low * high) if 0 < low < high < math.inf else low * 2 if low else high / 2
        return low

    def reading(self) -> "Demand":
        """Its prompts alone, up to the first token, with the limits on it."""
        requests = tuple(replace(r, output=1, also=()) for r in self.requests)
        return replace(self, requests=requests, objectives=tuple(one for one in self.objectives if one.measure == "ttft"))

    def answering(self) -> "Demand":
        """Its answers alone, whose prompts were read elsewhere, with the limits on what comes after the first token."""
        requests = tuple(replace(r, read=True) for r in self.requests if r.longest > 1)
        return replace(self, requests=requests, objectives=tuple(one for one in self.objectives if one.measure != "ttft"))


def split(budget: float, read: tuple[float, float], answer: tuple[float, float]) -> tuple[tuple[float, float, float], int, int]:
    """How many replicas should read prompts and how many answer, for a budget.

    `read` and `answer`: requests per second and price of one replica. Returns what they serve, the price of both with a
    minus, and what the phase with more room could serve (more of each is better, in this order); readers; writers.
    """
    found = ((0.0, 0.0, 0.0), 0, 0)
    for readers in range(1, int((budget - answer[1]) / read[1]) + 1):
        for writers in range(1, int((budget - readers * read[1]) / answer[1]) + 1):
            rates = readers * read[0], writers * answer[0]
            price = readers * read[1] + writers * answer[1]
            found = max(found, ((min(rates), -price, max(rates)), readers, writers))
    return found
