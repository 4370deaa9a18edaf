"""Speculative decoding in an engine: a draft proposes tokens, the model checks them all in one step and keeps those it would say.

What the model says is unchanged (Leviathan et al., ICML 2023). If each proposed token is kept with probability a, one
after another, k proposed ones give (1 - a^(k + 1)) / (1 - a) tokens a step in the mean, the model's own one included. The engine
then counts in tokens: every one takes its share of such a step, so that means hold, and that several come at once shows in the
time between tokens (`Pace`). What the last step gives beyond an answer is not counted: answers end less than a step early.
"""

from dataclasses import dataclass

from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.simulate.step_times import Overlap, Segment, Shelf, StepTimes


@dataclass(frozen=True, slots=True)
class Speculation:
    """`ahead` tokens are proposed a step, each kept with probability `acceptance`; by text that repeats where `draft` is None."""

    ahead: int
    acceptance: float
    draft: Graph | None = None

    def __post_init__(self) -> None:
        if self.ahead < 1 or not 0 <= self.acceptance < 1:
            raise NarrowsError(f"{self.ahead} tokens ahead, of which {self.acceptance:g} are kept.", where="speculation",
                               remedy="Give 1 token or more, and a share from 0 and below 1.")  # fmt: skip

    def __str__(self) -> str:
        return f"draft={self.draft.name if self.draft else 'ngram'} ahead={self.ahead}"

    @property
    def taken(self) -> float:
        """Tokens that a step gives in the mean."""
        return (1 - self.acceptance ** (self.ahead + 1)) / (1 - self.acceptance)


class Speculative(StepTimes):
    """The times of steps of a model whose tokens are proposed; a `draft` model runs on the same devices, one step a token.

    A step checks `ahead` + 1 rows of every sequence; what changes a step otherwise changes those of the check and of the draft.
    """

    def __init__(self, speculation: Speculation, graph: Graph, machine: Machine, devices: int, most_rows: int,
                 most_sequences: int, factor: float, step_seconds: float, sequence_seconds: float,
                 overlap: Overlap | None = None, shelf: Shelf | None = None, cap_watts: float = 0.0) -> None:  # fmt: skip
        self.speculation, self._brings, self.taken = speculation, speculation.ahead + 1, speculation.taken
        draft, most = speculation.draft, most_sequences * self._brings
        how = overlap, shelf, cap_watts
        super().__init__(graph, machine, devices, most_rows, most, factor, step_seconds, sequence_seconds, *how)
        self.draft = StepTimes(draft, machine, devices, most_rows, most_sequences, factor, 0.0, 0.0, *how) if draft else None

    def _a_token(self, checks: int, proposes: int) -> int:
        """A token's share of what a check takes and the proposals before it, each `proposes`."""
        return round((checks + self.speculation.ahead * proposes) / self.taken)

    def rows(self, rows: int) -> int:
        return self._a_token(super().rows(rows * self._brings), self.draft.rows(rows) if self.draft else 0)

    def outputs(self, outputs: int) -> int:
        return self._a_token(super().outputs(outputs * self._brings), self.draft.outputs(outputs) if self.draft else 0)

    def communication(self, rows: int) -> int:
        return self._a_token(super().communication(rows * self._brings), self.draft.communication(rows) if self.draft else 0)

    def host(self, decoding: int, pieces: int = 0) -> int:
        alone = super().host(0, pieces)  # no token shares a step of prompts
        return self._a_token(super().host(decoding), 0) + alone - super().host(0) if decoding else alone

    def reading(self, tokens: int, decoding: int) -> int:
        checked = decoding * self._brings
        alone = super().rows(checked) if decoding else 0
        return super().rows(tokens + checked) - alone + (self.draft.rows(tokens) if self.draft else 0)

    def ending(self, done: int, decoding: int) -> int:
        checked = decoding * self._brings
        return super().outputs(done + checked) - super().outputs(checked)

    def prompt(self, new: int, past: int) -> int:
        return super().prompt(new, past) + (self.draft.prompt(new, past) if self.draft else 0)

    def held(self, rows: int) -> int:
        return self._a_token(super().held(rows * self._brings), self.draft.held(rows) if self.draft else 0)

    def held_reading(self, tokens: int, decoding: int) -> int:
        checked = decoding * self._brings
        more = super().held(tokens + checked) - super().held(checked)
        return max(more, 0) + (self.draft.held(tokens) if self.draft else 0)

    def held_prompt(self, new: int, past: int) -> int:
        return super().held_prompt(new, past) + (self.draft.held_prompt(new, past) if self.draft else 0)

    def decoding(self, sequences: int, context: int, rows: int) -> Segment:
        own = super().decoding(sequences, context, rows + sequences * self.speculation.ahead)
        if not self.draft:
            return Segment(own.start, own.end, self._a_token(own.base, 0), self._a_token(own.slope, 0))
        other = self.draft.decoding(sequences, context, sequences)
        start, end = max(own.start, other.start), min((e for e in (own.end, other.end) if e), default=0)
        bases = (one.base + one.slope * (start - one.start) for one in (own, other))
        return Segment(start, end, self._a_token(*bases), self._a_token(own.slope, other.slope))
