"""Serve with replicas that come and go in seconds: warm engines without a model, weights from memory or from a running replica.

A cold replica starts a process with its libraries, device and links, then reads its weights from disk. Warm engines wait
without a model; likely models wait in the host's memory; and where a replica runs, new ones copy its weights over the links
between devices, all of them at once, which is faster than any local way. What is left is a second or two, so replicas
follow the load instead of being kept for its peak. Where some replicas do both phases and pairs share them, a heat map made
beforehand tells which kind answers requests of which lengths sooner.

## When it helps
Loads with bursts and quiet hours, many models of which few are asked for at a time, and limits on the first token that a cold
start of half a minute breaks.

## When it does not
A steady load. From nothing there is no replica to copy: weights come from the host's memory or disk. Warm engines and
memory for likely models are kept for all services together; what they cost is not counted here. A request stays in the
replica that it was given to: those that queued before new ones were ready wait on.

## Reference
Hu et al., DeepFlow: Serverless Large Language Model Serving at Scale, 2025, arXiv 2501.14417 (DeepServe at USENIX ATC 2025),
sections 5.3 and 6. Answers' lengths, which it predicts, are taken as known. Its clusters are of Ascend processors; the seconds of
a cold start are an assumption (`simulate/scaling.py`).
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.simulate.demand import Demand, Deployment
from narrows.simulate.fleet import Group, serve
from narrows.simulate.requests import Request
from narrows.simulate.scaling import Scaling, start_seconds
from narrows.simulate.step_times import PS
from narrows.technique import Card, Claim, No, Serves, Verdict, choice

RATES = (0.5, 1.0, 2.0)  # requests a second
SAMPLE = 60  # requests of each


@lru_cache(maxsize=1000)
def _sooner(one: Group, prompt: int, output: int) -> float:
    """By how much of its time a pair answers equal requests sooner than two replicas that do both, mean over RATES."""
    gains = []
    for rate in RATES:
        requests = [Request(round(i / rate * PS), prompt, output) for i in range(SAMPLE)]
        both, pair = serve(requests, replace(one, replicas=2)), serve(requests, one, one)
        gains.append(both.e2e.mean / pair.e2e.mean - 1)
    return sum(gains) / len(gains)


@dataclass(frozen=True)
class DeepFlow(Serves):
    """One replica is always there; more of them, up to the demand's, start warm from it and go when idle."""

    card: ClassVar[Card] = Card(
        "deepflow-serverless-llm",
        relieves=(Limit.SCHEDULING, Limit.STORAGE),
        phases=("prefill", "decode"),
        exact=True,
        price="warm engines and weights of likely models are kept in memory",
        claims=(
            Claim("to_64", "s", None, "simulated, Llama-3.1-8B on H100: from the first of 1,000 requests a second, one replica "
                  "there, until all of 64 decode", "abstract: in seconds", "simulated",
                  "ten seconds, of which the requests that ask for 64 take two to come", at_most=10.0),
            Claim("tail", "x", None, "simulated, the same model, up to 8 replicas, one request a second and for a minute in five "
                  "twenty: 99th percentile of the time to the first token with cold starts from disk over it (the burst and "
                  "the cold start are assumed)", "abstract: cold start latencies are what it addresses", "simulated",
                  "an order of magnitude", at_least=10.0),
            Claim("saved", "of the replica seconds", None, "the same: less than of the fewest replicas, always there, that give "
                  "99 % of first tokens within 2 s; not a number where it does not", "section 6: scaling in place of peaks",
                  "simulated", "a fifth (one replica of the four is always there, and each burst's are kept a minute more)",
                  at_least=0.2),
            Claim("by_phase", "x", None, "simulated, Qwen3-32B on A100, 4 devices a replica: two that do both and a pair, code "
                  "and chats, 5 requests a second: mean time to the last token with as many sent to each at random, over it",
                  "section 5.3, figure 7", "simulated", "half of what it gives here; one where no kind is chosen", at_least=1.03),
        ),
    )  # fmt: skip
    warm: bool = choice(True, False, help="engines wait without a model; without, each starts from nothing")
    source: str = choice("peer", "host", "disk", help="where a new replica's weights come from")
    load: float = choice(32.0, 8.0, help="requests inside a replica above which one more starts")
    by_phase: bool = choice(True, False, help="`apart` tells which requests a pair should serve, a replica for each phase")
    idle: float = choice(60.0, 10.0, help="seconds without a request after which one goes")

    def baseline(self) -> "DeepFlow":
        return replace(self, warm=False, source="disk", by_phase=False)

    def seconds(self, group: Group) -> float:
        """Seconds until a new replica serves."""
        return start_seconds(group.graph, group.machine, group.devices, self.source, self.warm)

    def apart(self, group: Group, request: Request) -> bool:
        """Whether a pair, one of which reads prompts and one decodes, answers such requests sooner than two that do both.

        The sign of the mean over `RATES` of how much sooner equal requests are, as in the paper's heat map; its lengths are
        powers of two.
        """
        if not self.by_phase or request.output < 2:
            return False
        sizes = (2 ** round(math.log2(tokens)) for tokens in (request.prompt, request.output))
        return _sooner(replace(group, replicas=1), *sizes) > 0

    def check(self, demand: Demand) -> Verdict:
        """Refuses a single replica, and a machine without the link that weights are to come over."""
        if demand.group.replicas < 2:
            return No("there is one replica: none can come or go")
        try:
            self.seconds(demand.group)
        except NarrowsError as error:
            return No(error.problem)
        return True

    def deploy(self, demand: Demand) -> Deployment:
        """The demand's replicas at the most."""
        scaling = Scaling(1, self.load, self.seconds(demand.group), self.idle)
        return Deployment(replace(demand.group, scaling=scaling))
