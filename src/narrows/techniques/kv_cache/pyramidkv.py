"""Give low layers a large KV budget and high layers a small one, and keep in each the tokens that the prompt's end looks at.

The budgets fall arithmetically with depth at a fixed total. After the prompt, each layer keeps per KV head the tokens with
the most attention from the last `window` queries (smoothed over neighbours), and those queries' own tokens; what is
decoded later is kept whole.

## When it helps
Long prompts with short answers: cache bytes and cache reads are capped however long the prompt is. More sequences fit.

## When it does not
On SmolLM2-135M equal budgets (`beta=1`, which is SnapKV) find more than the pyramid at the same bytes, and the more so the
smaller they are: the funnel of larger models is not in it. On plain prose keeping the recent tokens costs no more perplexity.
Prompts near the budget save nothing. What is asked only later in the conversation may have been dropped. The scores cost a
`window` of queries over the prompt in every layer, which is not counted in the graph; models with sliding layers are refused.

## Reference
Cai et al.: PyramidKV, arXiv 2406.02069 (2024), section 4, with the selection of SnapKV (arXiv 2404.14469). Where the authors'
code rounds the step between layers down, and so keeps more than the budget, the total here is exact; budgets do not adapt to
prompts shorter than the largest of them.
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


@dataclass(frozen=True)
class PyramidKV(Rewrites):
    """Keep `budget` tokens of the prompt per layer on average, more below than above."""

    budget: int = choice(128, 64, 256, 512, 1024, 2048, help="tokens kept per layer, as a mean over the layers")
    beta: int = choice(20, 5, 1, help="the highest layer keeps (budget - window) / beta tokens beside the window; 1: flat")
    window: int = choice(16, help="last prompt tokens, which choose and which stay")
    kernel: int = choice(15, help="neighbours over which attention is smoothed, odd; 7 in the paper")
    by: str = choice("attention", help="attention, or recency: the first four tokens and the last")

    card: ClassVar[Card] = Card(
        "pyramidkv",
        relieves=(Limit.CAPACITY, Limit.BANDWIDTH),
        phases=("decode",),
        exact=False,
        price="what the end of the prompt does not look at is forgotten",
        stage=Stage.CACHE,
        touches=("cache",),
        claims=(
            Claim(
                "retrieval",
                "of the whole",
                0.99,
                "pass keys, 12.5 % of the cache; paper: LongBench",
                "abstract",
                "run",
                "20 digits: one lost is 5 %; recency finds none of those that it has dropped",
                at_least=0.9,
            ),
            Claim(
                "points_over_recency",
                "points",
                20.5,
                "pass keys, 6 % of the cache; paper: TREC, 0.7 %, over other methods",
                "abstract",
                "run",
                "the paper's own margin, at equal measured bytes",
                at_least=20.5,
            ),
            Claim(
                "cache_share",
                "of the bytes",
                0.12,
                "what finds 95 % of the digits; paper: LongBench",
                "abstract",
                "run",
                "an eighth, and the bytes must be those of the graph",
                at_most=0.126,
            ),
        ),
    )

    def __post_init__(self) -> None:
        sizes = self.budget > self.window >= 1 and self.beta >= 1 and self.kernel >= 1 and self.kernel % 2 == 1
        if not sizes or self.by not in ("attention", "recency"):
            remedy = "Give budget > window >= 1, beta >= 1, an odd kernel and by=attention."
            raise NarrowsError(f"{self} is not possible.", where="pyramidkv", remedy=remedy)

    def baseline(self) -> "PyramidKV":
        return replace(self, beta=1, by="recency")

    def budgets(self, layers: int) -> tuple[int, ...]:
        """Tokens of the prompt that each layer keeps, lowest first; their sum is layers x budget.

        The highest keeps b = (budget - window) / beta beside its window, the lowest 2 (budget - window) - b.
        """
        free = self.budget - self.window
        least = free // self.beta
        spread = 2 * (free - least)
        # of two layers as far from the middle as each other one is rounded down and the other up
        lower = [2 * free - least - (i * spread + (layers - 1) // 2) // max(layers - 1, 1) for i in range(layers // 2)]
        middle = [free] if layers % 2 else []
        return tuple(self.window + n for n in (*lower, *middle, *(2 * free - n for n in reversed(lower))))

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        verdict = cacheable(graph)
        if not verdict:
            return verdict
        layers = attentions(graph)
        longest = float((step.past + step.new).max())
        if longest <= min(self.budgets(layers)):
            return No(f"{longest:g} tokens fit the smallest of its budgets, {min(self.budgets(layers))}")
        return True

    def rewrite(self, graph: Graph) -> Graph:
        return capped(graph, self.budgets(attentions(graph)))

    def apply(self, model: "torch.nn.Module", data: Sequence[Mapping[str, "torch.Tensor"]] = ()) -> "torch.nn.Module":
        from narrows.modules.eviction import Eviction, attention_layers

        layers = attention_layers(model, "pyramidkv")
        for layer, budget in zip(layers, self.budgets(len(layers)), strict=True):
            layer.eviction = Eviction(budget, self.window, self.kernel, self.by)
            layer.register_forward_pre_hook(layer.eviction.before, with_kwargs=True)
            layer.register_forward_hook(layer.eviction.after, with_kwargs=True)
        return model

    def restructure(self, model: "torch.nn.Module") -> "torch.nn.Module":
        return self.apply(model)

    @classmethod
    def example(cls) -> Example:
        from narrows.samples import tiny_llama

        model, data = tiny_llama(5, tokens=300)
        return Example(model.eval(), data, Step.decode(2, 300))
