"""Decode a long context without loss: the target's own weights with a part of the cache propose, its whole cache checks.

Two levels of speculation. The sparse cache holds the chunks of the prompt whose mean key the prompt's end asks for, and the
tokens said since. It makes `outer` tokens, of which the whole cache takes those that it would have said itself. It is sped
up in turn by a small model with a short window, of whose `inner` guesses it takes those that it would have said.

`generate` runs it; `measure` predicts what a machine gains from it, for the shares that are taken.

## When it helps
One or few sequences whose cache is larger than the weights, and most of all a cache behind a slow link: the whole cache is
read once for several tokens.

## When it does not
Short contexts: there the weights are what a step reads, and each level reads them all. The sparse cache is chosen once, for
the end of the prompt: an answer that moves on to other places of the prompt is proposed worse.

## Reference
Sun et al.: TriForce, arXiv 2404.11912 (2024), section 4, and the authors' code (budget 4,096, chunks of 8, 6 tokens at a time).
Greedy decoding of one sequence here; the authors sample.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from narrows.cost import Limit
from narrows.diagnose import seconds
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.modules.caching import attentions, capped
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

if TYPE_CHECKING:
    import torch

    from narrows.modules.speculation import Speculated


def expected(share: float, count: int) -> float:
    """Tokens that a check of `count` proposals gives, if each is taken with this chance and the checker adds one."""
    return sum(share**i for i in range(count + 1))


@dataclass(frozen=True)
class TriForce(Measures):
    """Speculate with a sparse cache of the target itself, and below it with a small model."""

    budget: int = choice(4096, 1024, 2048, 8192, help="tokens of the prompt in the sparse cache")
    chunk: int = choice(8, 16, 32, help="tokens that are taken into it together")
    outer: int = choice(6, 4, 8, 12, 16, help="tokens that it makes before the whole cache checks them")
    inner: int = choice(1, 2, 4, help="guesses of the small model before the sparse cache checks them")
    draft: str = choice("smollm2-135m", "", help="small model that guesses, as `capture` knows it; none: the sparse cache alone")
    window: int = choice(256, 512, help="last tokens that the small model remembers")
    taken: float = choice(0.9, 0.8, 0.95, help="share of the sparse cache's tokens that the whole one takes")
    agreed: float = choice(0.5, 0.3, 0.7, help="share of the small model's guesses that the sparse cache takes")
    by: str = choice("retrieval", help="retrieval; or, to compare with, recency: the first chunk and the last tokens")

    card: ClassVar[Card] = Card(
        "triforce",
        relieves=(Limit.BANDWIDTH,),
        phases=("decode",),
        exact=True,
        claims=(
            Claim("acceptance", "of the tokens", None, "SmolLM2-135M repeats passages, a quarter of 480 tokens in the cache",
                  "abstract", "run", "recent tokens lack the passage: 0.5; NaN if one token is not plain decoding's",
                  at_least=0.6),
            Claim("speedup", "x", 2.31, "Llama-2-7B, A100, 122,880 tokens, our acceptance; paper: with a small model below",
                  "abstract", "simulated", "a clear gain: what the small model adds is missing; recent tokens give 1.08",
                  at_least=1.3),
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        counts = min(self.chunk, self.outer, self.inner, self.window) >= 1 and self.budget >= 2 * self.chunk
        shares = min(self.taken, self.agreed) >= 0 and max(self.taken, self.agreed) <= 1
        if not (counts and shares and self.by in ("retrieval", "recency")):
            remedy = "Give counts from 1 on, a budget of two chunks or more, shares from 0 to 1 and by=retrieval."
            raise NarrowsError(f"{self} is not possible.", where="triforce", remedy=remedy)

    def baseline(self) -> "TriForce":
        return replace(self, by="recency")

    def generate(
        self, model: "torch.nn.Module", ids: "torch.Tensor", tokens: int, draft: "torch.nn.Module | None" = None
    ) -> "Speculated":
        """Continue ids [1, T] by `tokens`, the same that `model` gives greedily one by one, and say what was taken.

        `draft` guesses; it shares the tokenizer. Raises NarrowsError for models whose attention layers are not alike.
        """
        from narrows.modules.speculation import speculate

        retrieve = self.by == "retrieval"
        found: Speculated = speculate(
            model, ids, tokens, self.budget, self.chunk, self.outer, draft, self.inner, self.window, retrieve
        )
        return found

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """The speed-up of decoding over one token at a time, at the context of the step, and where a round's time goes.

        Checking makes no more than the last token's logits in the graph; the embedding of a few rows is what it lacks.
        """
        from narrows.capture import capture

        context = step.past + (0 if step.phase == "decode" else step.new)
        sparse = capped(graph, [self.budget] * attentions(graph))

        def lasts(of: Graph, new: int, past: object = context) -> float:
            return float(seconds(of, machine, Step(step.batch, new, past, step.source, "decode"))[0])  # type: ignore[arg-type]

        plain = lasts(graph, 1)
        check = lasts(graph, self.outer + 1)
        guesses = self.inner if self.draft else 0
        each = expected(self.agreed, guesses)  # tokens of the sparse cache a step
        rounds = self.outer / each
        propose = rounds * lasts(sparse, guesses + 1)
        small = capped(capture(self.draft), [self.window] * attentions(capture(self.draft))) if self.draft else None
        guess = rounds * guesses * lasts(small, 1) if small else 0.0
        gives = expected(self.taken, self.outer)
        whole = check + propose + guess
        values = {"speedup": plain * gives / whole, "token": whole / gives, "plain_token": plain, "tokens_per_check": gives,
                  "check_share": check / whole, "propose_share": propose / whole}  # fmt: skip
        units = {"speedup": "x", "token": "s", "plain_token": "s", "tokens_per_check": "tokens", "check_share": "of the time",
                 "propose_share": "of the time"}  # fmt: skip
        rows = tuple(
            {"taken": share, "speedup": plain * expected(share, self.outer) / whole}
            for share in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
        )
        return Reading(values, units, rows)
