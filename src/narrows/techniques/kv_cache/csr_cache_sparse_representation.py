"""Keep each cached key and value as a few atoms of a dictionary: their numbers and their weights, a byte each.

Matching pursuit takes the atom that is most like the vector, then the one most like what is left, and so on. The dictionary,
256 directions for each KV head of each layer, is learned beforehand from the keys and values of calibration text by gradient
descent. Eight atoms for a vector of 128 numbers are one bit for each.

## When it helps
Long contexts and large batches at rates that rounding does not reach: at two bits a number and below, where each number
rounded by itself has next to nothing left.

## When it does not
Where more bits are at hand, rounding is simpler and as good. Narrow heads: four atoms for 64 numbers, a bit each, are too few
for SmolLM2-135M. The pursuit multiplies every new vector with the whole
dictionary once for each atom, and reading sums the atoms up again: work that the graph does not count, nor the dictionaries'
bytes (a quarter of a megabyte a layer and KV head of 128 numbers, for keys and values). Text unlike that of the calibration
is met worse. Keys are coded as they are cached, turned by their positions, which makes them harder to match.

## Reference
Zhang et al.: CSR, arXiv 2412.11741 (AAAI 2025). Greedy pursuit and a dictionary trained with it by descent on what it leaves;
dictionary size, byte-wide numbers and float8 weights are this module's choice, so that bytes are those on paper.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import DType, Graph, Op
from narrows.machine import Machine
from narrows.modules.caching import cacheable
from narrows.step import Step
from narrows.technique import Card, Claim, Example, No, Rewrites, Stage, Verdict, choice

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CSR(Rewrites):
    """Keep `pairs` atoms and weights of every key and value."""

    pairs: int = choice(8, 4, 6, 12, help="atoms of a vector: 16 bits each")
    steps: int = choice(15, 60, help="training steps of a dictionary, of 512 vectors")
    by: str = choice("descent", help="descent; or, to compare with, chance: directions drawn at random")

    card: ClassVar[Card] = Card(
        "csr-cache-sparse-representation",
        relieves=(Limit.CAPACITY, Limit.BANDWIDTH),
        phases=("decode",),
        exact=False,
        price="what a few atoms cannot say of a key or value is lost",
        stage=Stage.CACHE,
        touches=("cache",),
        needs=("calibration",),
        claims=(
            Claim("squares_over_chance", "x", None, "SmolLM2-135M, prompts not calibrated on: squares of keys and values that "
                  "are left, over those that random directions leave", "abstract: the dictionary", "run",
                  "a clear order after 15 short steps", at_most=0.85),
            Claim("nats_over_rounding", "x", None, "nats that coding 480 tokens adds to the next ones, over those of one bit a "
                  "number with two values a group of 32, both 2 bits in all; paper: comparable to rounding", "abstract", "run",
                  "less than half; infinite where the dictionary is no better than chance", at_most=0.5),
            Claim("bits", "bits", 1.0, "a number of Llama-3.1-8B's cache, heads 128 wide, where nats pass", "title", "simulated",
                  "exactly; 16 where nats do not pass, NaN where SmolLM2's bytes are not those of the graph", at_most=1.0),
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not (1 <= self.pairs <= 64 and self.steps >= 0 and self.by in ("descent", "chance")):
            remedy = "Give 1 to 64 pairs, steps from 0 on and by=descent."
            raise NarrowsError(f"{self} is not possible.", where=self.card.slug, remedy=remedy)

    def baseline(self) -> "CSR":
        return replace(self, by="chance")

    def format(self, width: float) -> DType:
        """How a number of a vector of that width is stored."""
        return DType(f"{self.pairs} atoms of {width:g}", 16 * self.pairs / width)

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        verdict = cacheable(graph)
        if not verdict:
            return verdict
        kept = graph.find("attention")[0]
        bits, now = self.format(float(kept["head_dim"])).bits, (kept.cache or kept.act).bits  # type: ignore[arg-type]
        return True if bits < now else No(f"{self.pairs} atoms of so short vectors are {bits:g} bits a number; it has {now:g}")

    def rewrite(self, graph: Graph) -> Graph:
        def coded(op: Op) -> Op:
            return op.but(cache=self.format(float(op["head_dim"]))) if op.kind == "attention" and op.cache else op  # type: ignore[arg-type]

        return graph.map(coded)

    def apply(self, model: "torch.nn.Module", data: Sequence[Mapping[str, "torch.Tensor"]] = ()) -> "torch.nn.Module":
        from narrows.modules.calibration import require_data
        from narrows.modules.eviction import attention_layers
        from narrows.modules.sparse_cache import by_chance, code, learned, seen

        layers = attention_layers(model, self.card.slug)
        require_data(data, "dictionaries are learned from", self.card.slug)
        found = seen(model, data)
        for layer, made in zip(layers, found, strict=True):
            keys, values = (learned(x, self.pairs, self.steps) if self.by == "descent" else by_chance(x) for x in made)
            code(layer, keys, values, self.pairs, self.format(layer.head_dim))
        return model

    def restructure(self, model: "torch.nn.Module") -> "torch.nn.Module":
        from narrows.modules.eviction import attention_layers
        from narrows.modules.sparse_cache import code, empty

        for layer in attention_layers(model, self.card.slug):
            code(layer, *empty(layer), self.pairs, self.format(layer.head_dim))
        return model

    @classmethod
    def example(cls) -> Example:
        from narrows.samples import tiny_llama

        model, data = tiny_llama(4, tokens=300)
        return Example(model.eval(), data, Step.decode(2, 300))

    @classmethod
    def example_instance(cls) -> "CSR":
        return cls(pairs=2, steps=2)
