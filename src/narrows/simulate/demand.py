"""What clients ask of a service and must get, and how much of it a deployment can serve."""

import math
from dataclasses import dataclass, replace

from narrows.simulate.fleet import Group, serve
from narrows.simulate.outcome import Outcome
from narrows.simulate.serving import Request
from narrows.simulate.step_times import PS

NEAR = 1.02  # rates this close together count as one


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
class Limit:
    """What this share of the clients must get: at most so many `seconds` of an Outcome's `ttft`, `tpot`, `tbt`, `queue` or `e2e`."""

    measure: str
    share: float
    seconds: float

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
    limits: tuple[Limit, ...] = ()

    @property
    def rate(self) -> float:
        """Requests per second as they stand."""
        span = self.requests[-1].arrival - self.requests[0].arrival
        return (len(self.requests) - 1) * PS / span if span else math.inf

    def play(self, deployment: Deployment, rate: float = 0.0) -> Outcome:
        """What the clients see, at a rate (requests per second; 0: as the requests stand)."""
        stretch = self.rate / rate if rate else 1.0
        requests = (replace(r, arrival=round(r.arrival * stretch)) for r in self.requests)
        return serve(requests, deployment.group, deployment.prefill)

    def kept(self, outcome: Outcome) -> bool:
        """Whether the clients got what they must get."""
        return outcome.requests > 0 and all(limit.kept(outcome) for limit in self.limits)

    def capacity(self, deployment: Deployment, near: float = NEAR) -> float:
        """Requests per second up to which its clients get what they must, to a factor `near`; 0 where they never do."""
        low, high, rate = 0.0, math.inf, 1.0
        while 1e-3 < rate < 1e6 and high > low * near:
            if self.kept(self.play(deployment, rate)):
                low = rate
            else:
                high = rate
            rate = math.sqrt(low * high) if 0 < low < high < math.inf else low * 2 if low else high / 2
        return low
