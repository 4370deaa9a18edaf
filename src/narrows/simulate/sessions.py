"""Sessions of several turns: each turn's prompt is the whole talk so far, and it comes some time after the answer before."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from narrows.errors import NarrowsError
from narrows.simulate.requests import Request, chained
from narrows.simulate.step_times import PS
from narrows.simulate.workload import Lengths, bundled, draw_length


@dataclass(frozen=True, slots=True)
class Talks:
    """How sessions go on after their first answer.

    turns   in the mean: after each answer there is another one with the same probability (geometric)
    think   mean seconds from an answer's last token to the next turn; `think_spread` its coefficient of variation (log-normal)
    lengths   new words of a further turn, and its answer
    """

    turns: float
    think: float
    think_spread: float
    lengths: Lengths

    def __post_init__(self) -> None:
        if not (self.turns >= 1 and self.think >= 0 and self.think_spread >= 0):
            raise NarrowsError(f"{self.turns:g} turns, {self.think:g} s apart.", where="sessions",
                               remedy="Give 1 turn or more, and seconds from 0.")  # fmt: skip

    @classmethod
    def like(cls, name: str) -> "Talks":
        """As in a bundled load; raises NarrowsError where it is not known how its sessions go on."""
        c = bundled(name)
        if "turns" not in c:
            raise NarrowsError(f"nothing is known of the sessions of {name}.", where="sessions", remedy="Say how they go on.")
        lengths = Lengths(c["words"], c["output"], c["words_spread"], c["output_spread"])
        return cls(c["turns"], c["think"], c["think_spread"], lengths)


def in_turns(requests: Iterable[Request], talks: Talks, seed: int = 0) -> Iterator[Request]:
    """Each request as the first turn of a session, whose further turns have as many answers. The same seed, the same talks."""
    draw, like = random.Random(seed), talks.lengths
    for session, first in enumerate(requests, 1):
        turns = [first]
        while draw.random() * talks.turns >= 1:
            think = draw_length(draw, talks.think * 1e6, talks.think_spread) * (PS // 10**6) if talks.think else 0
            words = draw_length(draw, like.prompt, like.prompt_spread)
            answers = [draw_length(draw, like.output, like.output_spread) for _ in range(1 + len(first.also))]
            prompt = turns[-1].prompt + turns[-1].output + words
            turns.append(Request(think, prompt, answers[0], also=tuple(answers[1:])))
        yield chained(session, turns)
