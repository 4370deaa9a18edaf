"""Forget the tokens that got little attention, but mix each into the most similar one kept if the two are alike enough.

Layers share a total: those whose attention is spread evenly over the prompt keep more tokens than those that look at few.
A token's score is the attention that it has received so far. The likeness that counts as enough follows a moving average.

## When it helps
Long prompts and long answers: the cache stays at its budget also while decoding, so that its bytes and reads stop growing
and more sequences fit.

## When it does not
On SmolLM2-135M mixing tokens and sharing budgets out together cost more than they give: `spread=false,merge=false`, which is
H2O, predicts prose better at the same bytes (recent tokens alone do so worse). Prompts near the budget save nothing; where a
layer's budget exceeds the prompt, the graph counts the mean of the budgets. What is asked only later may have been dropped.
Budgets follow each prompt, for all sequences of its batch together. The scores take a second pass over a prompt's queries and
keys, which the graph does not count; models with sliding layers are refused.

## Reference
Wan et al.: D2O, arXiv 2406.13035 (2024), section 3; from the authors' code that the first two layers and the last keep all
tokens, and that variances are brought to [0, 1]. The prompt is cut here when it has been read, not a step later.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.modules.caching import attentions, cacheable, capped
from narrows.step import Step
from narrows.technique import Card, Claim, Example, No, Rewrites, Stage, Verdict, choice

if TYPE_CHECKING:
    import torch


def whole(layers: int) -> frozenset[int]:
    """The layers that keep everything: the first two and the last."""
    return frozenset({0, 1, layers - 1})


@dataclass(frozen=True)
class D2O(Rewrites):
    """Keep `budget` tokens per layer on average, by attention received; mix in what is dropped and similar."""

    budget: int = choice(128, 64, 256, 512, 1024, 2048, help="tokens kept per layer, as a mean over the layers")
    recent: float = choice(0.25, 0.5, help="share of a budget that is for the last tokens; 1: these and the first four")
    spread: bool = choice(True, False, help="share budgets out by how evenly a layer looks; or the same for each")
    merge: bool = choice(True, False, help="mix dropped tokens into similar ones; or lose them")
    memory: float = choice(0.5, help="weight of the newest likenesses in what counts as alike")

    card: ClassVar[Card] = Card(
        "d2o",
        relieves=(Limit.CAPACITY, Limit.BANDWIDTH),
        phases=("decode",),
        exact=False,
        price="tokens without attention so far are forgotten, or blurred into others",
        stage=Stage.CACHE,
        touches=("cache",),
        claims=(
            Claim("nats_of_a_passage", "nats a token", None, "SmolLM2-135M repeats passages, a fifth of 480 tokens kept",
                  "abstract", "run", "over recent tokens of the same bytes: a direction, and a small gain", at_least=0.05),
            Claim("throughput", "x", 3.0, "Llama-3.1-8B, A100, 32,768 tokens, a fifth kept, largest batch; paper: more than",
                  "abstract", "simulated", "the paper's bound; 1 where recency keeps a passage as well", at_least=3.0),
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not (self.budget > 8 and 0 < self.recent <= 1 and 0 < self.memory <= 1):
            remedy = "Give a budget > 8, recent and memory up to 1."
            raise NarrowsError(f"{self} is not possible.", where="d2o", remedy=remedy)

    def baseline(self) -> "D2O":
        return replace(self, recent=1.0, spread=False, merge=False)  # StreamingLLM, of the same bytes

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        verdict = cacheable(graph)
        longest = float((step.past + step.new).max())
        if verdict and len(whole(attentions(graph))) == attentions(graph):
            return No(f"of its {attentions(graph)} attention layers the first two and the last keep everything")
        return No(f"{longest:g} tokens fit the budget of {self.budget}") if verdict and longest <= self.budget else verdict

    def rewrite(self, graph: Graph) -> Graph:
        layers = attentions(graph)  # the prompt shifts budgets between layers, not their sum
        return capped(graph, [None if index in whole(layers) else self.budget for index in range(layers)])

    def apply(self, model: "torch.nn.Module", data: Sequence[Mapping[str, "torch.Tensor"]] = ()) -> "torch.nn.Module":
        from narrows.modules.eviction import attention_layers
        from narrows.modules.watched_cache import Merging, Watch

        modules = attention_layers(model, self.card.slug)
        merging = Merging(len(modules), whole(len(modules)), self.budget, self.spread, self.merge, self.recent, self.memory)
        for index, module in enumerate(modules):
            Watch(module, merging.layer(index))
        return model

    def restructure(self, model: "torch.nn.Module") -> "torch.nn.Module":
        return self.apply(model)

    @classmethod
    def example(cls) -> Example:
        from narrows.samples import tiny_llama

        model, data = tiny_llama(6, tokens=300)
        return Example(model.eval(), data, Step.decode(2, 300))
