"""Speculative decoding in an engine: a draft proposes tokens, the model checks them all in one step and keeps those it would say.

What the model says is unchanged (Leviathan et al., ICML 2023). If each proposed token is kept with probability a, one
after another, k proposed ones give (1 - a^(k + 1)) / (1 - a) tokens a step in the mean, the model's own one included. The engine
then counts in tokens: every one takes its share of such a step, so that means hold; that several come at once is not seen.
"""

from dataclasses import dataclass

from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.simulate.step_times import Segment, StepTimes


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
    """The times of steps of a model whose tokens are proposed; a `draft` model runs on the same devices, one step a token."""

    def __init__(self, speculation: Speculation, graph: Graph, machine: Machine, devices: int, most_rows: int,
                 most_sequences: int, factor: float, step_seconds: float, sequence_seconds: float) -> None:  # fmt: skip
        self.speculation, self._brings = speculation, speculation.ahead + 1
        draft, most = speculation.draft, most_sequences * self._brings
        super().__init__(graph, machine, devices, most_rows, most, factor, step_seconds, sequence_seconds)
        self.draft = StepTimes(draft, machine, devices, most_rows, most_sequences, factor) if draft else None

    def _a_token(self, checks: int, proposes: int) -> int:
        """A token's share of what a check takes and the proposals before it, each `proposes`."""
        return round((checks + self.speculation.ahead * proposes) / self.speculation.taken)

    def rows(self, rows: int) -> int:
        return self._a_token(super().rows(rows * self._brings), self.draft.rows(rows) if self.draft else 0)

    def outputs(self, outputs: int) -> int:
        return self._a_token(super().outputs(outputs * self._brings), self.draft.outputs(outputs) if self.draft else 0)

    def communication(self, rows: int) -> int:
        return self._a_token(super().communication(rows * self._brings), self.draft.communication(rows) if self.draft else 0)

    def host(self, sequences: int) -> int:
        return self._a_token(super().host(sequences), 0)

    def reading(self, tokens: int, decoding: int) -> int:
        checked = decoding * self._brings
        alone = super().rows(checked) if decoding else self.host(0) - super().host(0)  # no token shares a step of prompts
        return super().rows(tokens + checked) - alone + (self.draft.rows(tokens) if self.draft else 0)

    def ending(self, done: int, decoding: int) -> int:
        checked = decoding * self._brings
        return super().outputs(done + checked) - super().outputs(checked)

    def prompt(self, new: int, past: int) -> int:
        return super().prompt(new, past) + (self.draft.prompt(new, past) if self.draft else 0)

    def decoding(self, sequences: int, context: int, rows: int) -> Segment:
        own = super().decoding(sequences, context, rows)
        other = self.draft.decoding(sequences, context, rows) if self.draft else Segment(own.start, own.end, 0, 0)
        return Segment(own.start, own.end, self._a_token(own.base, other.base), self._a_token(own.slope, other.slope))
