"""Let nearly all layers attend to the keys and values of one high layer, which alone are made and kept.

The lowest and the highest layer stay as they are; the last of those between makes keys and values, and all of these attend to
them. What a layer asks for, of the tokens before its own, has been made when tokens come one by one. Where several are new at
once (prompts, training), the layers run several times, each pass on the keys and values of the one before, until these settle;
of the passes in training only the last have gradients.

## When it helps
Serving in large batches or long contexts: the cache is that of three layers, so that the batch which fits is many times as
large. Steps lose the products that make keys and values as well.

## When it does not
Models as they are: `apply` changes what they say, and they must be trained anew, in about the time of `passes` / 3 plain
trainings. Prompts cost `passes` times the work of the layers between. Single sequences of short context: every layer still
reads keys and values, though the same ones. Passes fewer than tokens are an approximation, which narrows to nothing in a
trained model within a few passes. Padded batches are not masked exactly: the mask is shifted by a token.

## Reference
Wu and Tu: Layer-Condensed KV Cache, arXiv 2405.10637 (2024): warm-up layers below and above, no layer sees a token's own keys
of the pass, m = 7 passes to settle and b = 2 with gradients; as in the authors' later code the layer that makes keys and values
attends to its own.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Dim, Graph, Op, Size
from narrows.machine import Machine
from narrows.modules.caching import attentions, cacheable
from narrows.parallel import is_layer, layer_count
from narrows.step import Step
from narrows.technique import Card, Claim, Example, No, Rewrites, Stage, Verdict, choice

if TYPE_CHECKING:
    import torch

_MADE = (".k_proj", ".v_proj")
_FOR_KEYS = (*_MADE, ".k_norm")  # what a layer without keys and values of its own lacks


@dataclass(frozen=True)
class LCKV(Rewrites):
    """Condense the cache of all layers but `below` and `above` to that of one of them."""

    below: int = choice(1, 2, help="lowest layers with a cache of their own")
    above: int = choice(1, 2, help="highest layers with a cache of their own")
    passes: int = choice(9, 5, help="how often the layers between run where several tokens are new")
    learning: int = choice(2, 1, help="passes in training that have gradients")

    card: ClassVar[Card] = Card(
        "lckv-layer-condensed-kv-cache",
        relieves=(Limit.CAPACITY, Limit.BANDWIDTH),
        phases=("decode",),
        exact=False,
        price="training from scratch, in several passes; prompts are read in several passes",
        stage=Stage.CACHE,
        touches=("cache",),
        needs=("training",),
        claims=(
            Claim("settled", "nats", None, "Llama of 8 layers trained on letters: what a held-out letter costs token by token, "
                  "off what it costs in passes", "the method: passes converge", "run",
                  "a thousandth; one pass, in which no layer has seen another token, is off by more", at_most=0.001),
            Claim("nats", "x", None, "over the same Llama with all its caches, as many steps, decoded token by token",
                  "abstract: competitive", "run", "5 % more at most; infinite where passes do not settle. A weak test: layers "
                  "between that see no other token cost 1 % here, letters need little", at_most=1.05),
            Claim("cache_share", "of the bytes", None, "where nats pass", "the method: (w + 1) / L", "run",
                  "3 of 8 layers, and the bytes must be those of the graph", at_least=0.375, at_most=0.375),
            Claim("batch", "x", 32.0, "sequences of 8,192 tokens that Llama-2-7B has room for on an RTX 3090, where nats pass; "
                  "paper: up to", "introduction", "simulated", "32 layers' caches become 3; 1 where nats do not pass",
                  at_least=10.0, at_most=32.0),
            Claim("throughput", "x", 26.0, "tokens/s of that batch; paper: up to, of 1B to 30B", "abstract", "simulated",
                  "a direction: each layer still reads keys and values, which in our forecast bounds a step of such a batch; "
                  "1 where nats do not pass", at_least=2.0),
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not (min(self.below, self.above, self.learning) >= 1 and self.passes >= 1):
            raise NarrowsError(f"{self} is not possible.", where=self.card.slug, remedy="Give counts from 1 on.")

    def baseline(self) -> "LCKV":
        return replace(self, passes=1)  # the layers between see no other token

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        verdict, graph = cacheable(graph), graph.fold()
        if not verdict:
            return verdict
        layers = attentions(graph)
        made = Counter(end for op in graph.forward for end in _MADE if op.name.endswith(end) for _ in range(op.repeat))
        if layers != layer_count(graph) or any(made[end] != layers for end in _MADE):
            return No(f"of its {layer_count(graph)} layers not all have one attention with a k_proj and a v_proj")
        if layers < self.below + self.above + 2:
            return No(f"{layers} layers with {self.below} below and {self.above} above leave none to condense")
        return True

    def rewrite(self, graph: Graph) -> Graph:
        graph, before = graph.fold(), Counter[str]()
        whole = self.below + self.above
        heads, few = (float(graph.find("attention")[0][dim]) for dim in ("heads", "kv_heads"))  # type: ignore[arg-type]
        queries = heads / (heads + few)

        def change(op: Op) -> Op | list[Op]:
            if not is_layer(op) or op.phase != "forward":
                return op
            first = before[op.name]
            before[op.name] += op.repeat
            kept = min(max(whole - first, 0), op.repeat)
            top = int(kept < op.repeat and first + kept == whole)  # the one that makes keys and values for the others
            again = op.but(**{name: self._passes(dim) for name, dim in dict(op.dims).items()})
            counts = ((op, kept), (again, top), (_reading(again, queries), op.repeat - kept - top))
            return [replace(one, repeat=n) for one, n in counts if one is not None and n]

        return graph.map(change)

    def _passes(self, dim: Dim) -> Dim:
        """A size of a layer that runs once for one new token and `passes` times for several."""
        if not isinstance(dim, Size):
            return dim
        more, total = self.passes - 1, Size.of(dict(dim.terms))
        for field, one in (("tokens", "sequences"), ("pairs", "context")):  # what the field is where one token is new
            factor = dict(dim.terms).get(field, 0.0)
            total = total + Size.of({field: more * factor, one: -more * factor})
        return total

    def apply(self, model: "torch.nn.Module", data: Sequence[Mapping[str, "torch.Tensor"]] = ()) -> "torch.nn.Module":
        from narrows.modules.condensed import condense
        from narrows.modules.eviction import attention_layers

        layers = attention_layers(model, self.card.slug)
        if len(layers) < self.below + self.above + 2 or len(layers) != len(model.model.layers):  # type: ignore[arg-type,union-attr]
            problem = f"{len(layers)} attention layers cannot be condensed by {self}."
            raise NarrowsError(problem, where=self.card.slug, remedy="Use a deeper decoder of the llama kind.")
        changed: torch.nn.Module = condense(model, self.below, self.above, self.passes, self.learning)
        return changed

    def restructure(self, model: "torch.nn.Module") -> "torch.nn.Module":
        return self.apply(model)

    @classmethod
    def example(cls) -> Example:
        from narrows.samples import tiny_llama

        model, data = tiny_llama(6, tokens=24)
        return Example(model.eval(), data, Step.decode(2, 24))


def _reading(op: Op, queries: float) -> Op | None:
    """An op of a layer as it is where keys and values come from another; `queries`: their share of what is turned by position."""
    if op.name.endswith(_FOR_KEYS):
        return None
    if op.kind == "attention":
        return op.but(held=0)
    if op.kind == "elementwise" and any(name.endswith(_FOR_KEYS) for name in op.inputs):
        return op.but(elements=op["elements"] * queries, reads=op["reads"] * queries)
    return op
