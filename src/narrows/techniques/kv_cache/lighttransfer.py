"""Turn the lazy half of the attention layers, those that look at the first and the last tokens alone, into streaming attention.

How lazy a layer is shows while it reads the prompt: the share of attention that the prompt's last queries spend on the
first and the most recent tokens. The laziest layers keep only these tokens from then on; the others keep all.

## When it helps
Long contexts of any length: half of the layers' cache stops growing, so that half as many bytes are read per token and about
twice as many sequences fit.

## When it does not
On SmolLM2-135M a passage from the middle of the prompt can no longer be repeated, whichever half streams: its layers look
lazy on average although single heads of them search. Prose loses an eighth of perplexity at a window of 64.
Prompts near the window save nothing. Which layers are lazy is decided by each prompt, for all sequences of its batch
together. What a layer is worth is not measured, only where it looks. The scores are not counted in the graph; models with
sliding layers are refused, being hybrids already.

## Reference
Zhang et al.: LightTransfer, arXiv 2410.13846 (2024), section 5, LightTransfer-Test. Fine-tuning the hybrid
(LightTransfer-Train, for long reasoning) is not done here.
"""

import random
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

ORDERS = ("laziness", "diligence", "random")


@dataclass(frozen=True)
class LightTransfer(Rewrites):
    """Let the laziest `share` of the layers keep `window` tokens, the first four and the last."""

    share: float = choice(0.5, 0.25, help="share of the layers that turn to streaming attention")
    window: int = choice(1024, 64, 256, help="tokens that such a layer keeps, the first four among them")
    asking: int = choice(16, help="last prompt tokens whose attention tells how lazy a layer is")
    by: str = choice("laziness", help="laziness; or, to compare with, diligence (the least lazy) or random")

    card: ClassVar[Card] = Card(
        "lighttransfer",
        relieves=(Limit.CAPACITY, Limit.BANDWIDTH),
        phases=("decode",),
        exact=False,
        price="layers that stream no longer see the middle of the context",
        stage=Stage.CACHE,
        touches=("cache",),
        claims=(
            Claim("perplexity", "x", None, "SmolLM2-135M, half of the layers at 64 of 480 tokens; paper: scores, -1.5 %",
                  "abstract", "run", "a small model has less to spare; the least lazy half costs 1.18", at_most=1.15),
            Claim("loss_of_the_others", "of the nats", None, "the lazy half over the other half", "abstract", "run",
                  "a clear order: a quarter less is lost", at_most=0.75),
            Claim("cache_share", "of the bytes", 0.5, "where perplexity passes; the window's tokens come on top", "abstract",
                  "run", "half, and of the other half 64 of 480 tokens: 0.567, which the graph must say as well", at_most=0.57),
            Claim("throughput", "x", 2.17, "Llama-3.1-8B, A100, 32,768 tokens, largest batch, perplexity kept", "abstract",
                  "simulated", "30 % either way of the paper's figure, whose batch is not stated", at_least=1.52, at_most=2.82),
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not (0 < self.share < 1 and self.window > 4 and self.asking >= 1 and self.by in ORDERS):
            remedy = "Give a share between 0 and 1, a window > 4, asking >= 1 and by=laziness."
            raise NarrowsError(f"{self} is not possible.", where="lighttransfer", remedy=remedy)

    def baseline(self) -> "LightTransfer":
        return replace(self, by="diligence")

    def lazy(self, layers: int) -> int:
        """How many of the layers stream."""
        return round(self.share * layers)

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        verdict = cacheable(graph)
        if not verdict:
            return verdict
        if not self.lazy(attentions(graph)):
            return No(f"{self.share:g} of its {attentions(graph)} attention layers is none")
        longest = float((step.past + step.new).max())
        return True if longest > self.window else No(f"{longest:g} tokens fit the window of {self.window}")

    def rewrite(self, graph: Graph) -> Graph:
        layers = attentions(graph)  # all alike: which of them stream makes no difference here
        return capped(graph, [self.window] * self.lazy(layers) + [None] * (layers - self.lazy(layers)))

    def apply(self, model: "torch.nn.Module", data: Sequence[Mapping[str, "torch.Tensor"]] = ()) -> "torch.nn.Module":
        from narrows.modules.eviction import attention_layers
        from narrows.modules.watched_cache import Rolling, Watch

        modules = attention_layers(model, self.card.slug)
        by = {
            "laziness": lambda index, laziness: laziness,
            "diligence": lambda index, laziness: -laziness,
            "random": lambda index, laziness: random.Random(index).random(),
        }[self.by]
        rolling = Rolling(len(modules), self.lazy(len(modules)), self.window, self.asking, by)
        for index, module in enumerate(modules):
            Watch(module, rolling.layer(index))
        return model

    def restructure(self, model: "torch.nn.Module") -> "torch.nn.Module":
        return self.apply(model)

    @classmethod
    def example(cls) -> Example:
        from narrows.samples import tiny_llama

        model, data = tiny_llama(4, tokens=300)
        return Example(model.eval(), data, Step.decode(2, 300))

    @classmethod
    def example_instance(cls) -> "LightTransfer":
        return cls(window=64)
