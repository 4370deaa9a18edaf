"""Let a few layers of each decoding step attend to all tokens and choose the best; the layers above attend to these alone.

The same tokens matter to neighbouring layers. The first two layers attend to all; the third does as well and chooses the
`budget` old tokens that it attended to the most; so does one in the middle; every other layer reads only those.

## When it helps
Long contexts at batch sizes where the cache, not the weights, is most of what a decoding step reads.

## When it does not
The cache stays whole: no byte is freed. Prompts are read with full attention; a later chunk of a prompt is not, if it comes
as a step of its own. Choosing is not counted in the graph: a fused kernel has the scores at hand, the module here computes
them once more. Models with sliding layers are refused.

## Reference
Yang et al.: TidalDecode, arXiv 2410.05076 (2024), section 3 and the authors' code (layers 0, 1 and 2 in full, re-selection at
layer 13 of 32 for Llama-2-7B; the default here is what suits SmolLM2-135M). All heads of a layer choose together, where the
authors' choose each for itself: with few KV heads those of one layer do not match those of the next. No cache correction.
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

WHOLE = frozenset({0, 1})  # layers that attend to all and choose nothing
FIRST = 2


@dataclass(frozen=True)
class TidalDecode(Rewrites):
    """Attend to `budget` old tokens in all layers but four: two that read all, and two that read all and choose."""

    budget: int = choice(256, 64, 128, 512, 1024, help="old tokens that a sparse layer attends to")
    again: float = choice(0.57, 0.4, 0.0, help="depth of the layer that chooses again, as a share of the layers; 0: none does")
    by: str = choice("attention", help="attention; or, to compare with, recency (the first four and the last) or random")

    card: ClassVar[Card] = Card(
        "tidaldecode",
        relieves=(Limit.BANDWIDTH,),
        phases=("decode",),
        exact=False,
        price="sparse layers miss what the choosing layers did not look at",
        stage=Stage.CACHE,
        touches=("cache",),
        claims=(
            Claim("perplexity", "x", None, "SmolLM2-135M, prose, a tenth of 480 tokens read", "abstract", "run",
                  "the paper's models are 50 times larger; recent tokens alone cost 1.47", at_most=1.25),
            Claim("repeats", "x", None, "SmolLM2-135M, a passage repeated from the prompt, a tenth read", "abstract",
                  "run", "the passage must be found: recent tokens alone cost 21", at_most=1.25),
            Claim("decode_speed", "x", 2.1, "Llama-2-7B at 100,000 tokens, a tenth read, where repeats passes; paper: up to",
                  "abstract", "simulated", "30 % either way of the paper's figure; 1 where passages are lost",
                  at_least=1.47, at_most=2.73),
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not (self.budget > 4 and 0 <= self.again < 1 and self.by in ("attention", "recency", "random")):
            remedy = "Give a budget > 4, again from 0 to below 1 and by=attention."
            raise NarrowsError(f"{self} is not possible.", where="tidaldecode", remedy=remedy)

    def baseline(self) -> "TidalDecode":
        return replace(self, by="recency")

    def selecting(self, layers: int) -> frozenset[int]:
        """The layers that attend to all tokens and choose."""
        return frozenset({FIRST, max(FIRST, int(self.again * layers))})

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        verdict = cacheable(graph)
        if not verdict:
            return verdict
        if attentions(graph) <= FIRST + 1:
            return No(f"of its {attentions(graph)} attention layers the first {FIRST + 1} read everything")
        longest = float(step.past.max())
        return True if longest > self.budget else No(f"{longest:g} old tokens fit the budget of {self.budget}")

    def rewrite(self, graph: Graph) -> Graph:
        layers = attentions(graph)
        full = WHOLE | self.selecting(layers)
        return capped(graph, [None if index in full else self.budget for index in range(layers)], hold=True)

    def apply(self, model: "torch.nn.Module", data: Sequence[Mapping[str, "torch.Tensor"]] = ()) -> "torch.nn.Module":
        from narrows.modules.eviction import attention_layers
        from narrows.modules.watched_cache import Persisting, Watch

        modules = attention_layers(model, self.card.slug)
        persisting = Persisting(self.budget, WHOLE, self.selecting(len(modules)), self.by)
        for index, module in enumerate(modules):
            Watch(module, persisting.layer(index))
        return model

    def restructure(self, model: "torch.nn.Module") -> "torch.nn.Module":
        return self.apply(model)

    @classmethod
    def example(cls) -> Example:
        from narrows.samples import tiny_llama

        model, data = tiny_llama(6, tokens=300)
        return Example(model.eval(), data, Step.decode(2, 300))
