"""Run a low-rank encoder tile by tile, so that no query, key, value or hidden activation of full width is ever in memory.

Each linear layer of an encoder block is factored by SVD. Attention then runs head by head from the narrow products, and
its output is projected into the narrow middle of the next factor at once; the feed-forward block does the same for a few
hidden columns at a time. Results are added up in the narrow space. The function is that of the same factors run layer by
layer.

## What it does
Replaces self-attention and feed-forward of BERT's blocks by streamed ones, their factors cut into tiles when they are made.

## When it helps
Long or many sequences on a device with little memory: factoring alone shrinks weights and leaves every activation as it
was. The peak is then what a block must hold anyway, its input and its output.

## When it does not
Speed: more and smaller products. Training keeps activations for the backward pass whatever their size was in flight. With
short inputs the weights are the memory.

## Reference
Shao et al., FlashSVD: Memory-Efficient Inference with Streaming for Low-Rank Models, AAAI 2026, arXiv 2508.01506. Theirs
is a set of GPU kernels whose tiles lie in shared memory; here tiles are tensors, on any device.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Graph, Op
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, Example, No, Rewrites, Stage, Verdict, choice

if TYPE_CHECKING:
    from torch import Tensor, nn

# A block's layers by what they do, and the sizes that tiles are cut from.
PROJECTIONS = ("attention.self.query", "attention.self.key", "attention.self.value")
OUT, UP, DOWN = "attention.output.dense", "intermediate.dense", "output.dense"
LAYERS = (*PROJECTIONS, OUT, UP, DOWN)
ATTENTION, ACT = "attention.self.attention", "intermediate.intermediate_act_fn"


@dataclass(frozen=True)
class FlashSVD(Rewrites):
    """The blocks of a BERT encoder, factored and streamed; embeddings and heads stay as they are."""

    card: ClassVar[Card] = Card(
        slug="flashsvd",
        relieves=(Limit.CAPACITY, Limit.COMPUTE, Limit.BANDWIDTH),
        phases=("forward",),
        exact=False,
        stage=Stage.FACTOR,
        touches=("linear weights",),
        price="the quality that the rank costs, and none beyond it; more and smaller kernels",
        claims=(
            Claim(
                "same_as_unfused", "relative", 0.0, "BERT-Base shapes, 2 layers, rank ratio 0.5, padding", "abstract", "run",
                "fp32 sums in another order; NaN, which fails, if nothing was streamed", at_most=1e-5,
            ),
            Claim(
                "peak_activation_saved", "share", 0.702, "BERT-Base shapes, encoder, 2 x 256 tokens, rank ratio 0.5", "abstract",
                "run", "allocator's peak against the same factors unfused; a block's input and output alone are a fifth of it",
                at_least=0.6,
            ),
            Claim(
                "transient_saved", "share", 0.75, "BERT-Base shapes, one feed-forward block, rank ratio 0.5", "abstract", "run",
                "the allocator's peak inside the block against the same factors unfused", at_least=0.7,
            ),
        ),
    )  # fmt: skip

    rank_ratio: float = choice(0.5, 0.25, 0.75, help="share of the linear layers' parameters that is kept")
    tile: int = choice(128, 256, 64, help="hidden columns of the feed-forward block at a time")
    stream: bool = choice(True, help="without it the factors run layer by layer")

    def __post_init__(self) -> None:
        if not 0 < self.rank_ratio < 1 or self.tile < 1:
            problem = f"rank_ratio={self.rank_ratio}, tile={self.tile}."
            raise NarrowsError(problem, where="flashsvd", remedy="Give a ratio between 0 and 1, and a tile above 0.")

    def baseline(self) -> "FlashSVD":
        return replace(self, stream=False)

    def rank_of(self, inputs: int, outputs: int) -> int:
        """The rank at which two factors keep the ratio of a layer's parameters."""
        return max(1, int(self.rank_ratio * inputs * outputs / (inputs + outputs)))

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        blocks = _blocks(graph)
        if not blocks:
            return No("it has no block with attention.self.query to output.dense, as BERT's encoder has")
        for name, ops in blocks.items():
            lacking = [layer for layer in (*LAYERS, ATTENTION, ACT) if layer not in ops]
            if lacking:
                return No(f"{name} has no plain {lacking[0]}")
            if ops[ATTENTION]["held"]:
                return No(f"{name} keeps keys and values from step to step: it decodes")
            if self.stream and int(ops[UP]["outputs"]) % self.tile:  # type: ignore[arg-type]
                return No(f"{name} has {ops[UP]['outputs']} hidden columns, no multiple of tile={self.tile}")
        return True

    def rewrite(self, graph: Graph) -> Graph:
        changed = {op.name: list(self._streamed(ops, op)) for ops in _blocks(graph).values() for op in ops.values()}
        return graph.map(lambda op: changed.get(op.name, op) if op.phase == "forward" else op)

    def _streamed(self, ops: Mapping[str, Op], op: Op) -> Iterator[Op]:
        """What one op of a block becomes; the last of them keeps its name, by which others read it."""
        heads = int(ops[ATTENTION]["heads"]) if self.stream else 1  # type: ignore[arg-type]
        tiles = int(ops[UP]["outputs"]) // self.tile if self.stream else 1  # type: ignore[arg-type]
        layer = next(kind for kind, each in ops.items() if each is op)
        if layer == ATTENTION:
            yield op.but(heads=op["heads"] * (1 / heads), kv_heads=op["kv_heads"] * (1 / heads), repeat=op.repeat * heads)
        elif layer == ACT:
            yield op.but(elements=op["elements"] * (1 / tiles), reads=op["reads"] * (1 / tiles), repeat=op.repeat * tiles)
        else:
            inputs, outputs = int(op["inputs"]), int(op["outputs"])  # type: ignore[arg-type]
            rank, pieces = self.rank_of(inputs, outputs), heads if layer in (*PROJECTIONS, OUT) else tiles
            first, last = (
                op.but(name=f"{op.name}.first", outputs=rank, bias=0),
                replace(op.but(inputs=rank), inputs=(f"{op.name}.first",)),
            )
            if layer in (*PROJECTIONS, UP):  # wide at the end: that is what is cut
                yield first
                yield replace(last.but(outputs=outputs // pieces), repeat=op.repeat * pieces)
            else:
                yield replace(first.but(inputs=inputs // pieces), repeat=op.repeat * pieces)
                if pieces > 1:
                    size = op["rows"] * rank
                    dims = {"elements": size, "reads": size * 2}
                    yield Op(f"{op.name}.add", "elementwise", dims, op.act, inputs=(first.name,), repeat=op.repeat * (pieces - 1))
                yield last

    def apply(self, model: "nn.Module", data: Sequence[Mapping[str, "Tensor"]] = ()) -> "nn.Module":
        return self.restructure(model)

    def restructure(self, model: "nn.Module") -> "nn.Module":
        """Factor and stream every block in place; on the meta device nothing is solved."""
        from narrows.modules import low_rank
        from narrows.modules.streamed import ResidualNorm, StreamedAttention, StreamedFeedForward

        blocks = [module for module in model.modules() if _is_block(module)]
        if not blocks:
            raise NarrowsError("no block is BERT's.", where="flashsvd", remedy="Use a BERT encoder with plain linear layers.")
        for block in blocks:
            linears: dict[str, Any] = {layer: block.get_submodule(layer) for layer in LAYERS}
            pairs = {
                layer: low_rank.factored(linear, self.rank_of(linear.in_features, linear.out_features), low_rank.svd)
                for layer, linear in linears.items()
            }
            if not self.stream:
                for layer, pair in pairs.items():
                    block.set_submodule(layer, pair)
                continue
            tiles, odd = divmod(linears[UP].out_features, self.tile)
            if odd:
                problem = f"{linears[UP].out_features} hidden columns are no multiple of {self.tile}."
                raise NarrowsError(problem, where="flashsvd: tile", remedy="Choose one that divides them.")
            heads = block.attention.self.num_attention_heads
            query, key, value = (pairs[layer] for layer in PROJECTIONS)
            attention = StreamedAttention(query, key, value, pairs[OUT], heads)
            feed = StreamedFeedForward(pairs[UP], block.intermediate.intermediate_act_fn, pairs[DOWN], tiles)
            block.attention.self, block.intermediate = attention.train(block.training), feed.train(block.training)
            for after in (block.attention, block):
                after.output = ResidualNorm(after.output.LayerNorm, after.output.dropout).train(block.training)
        return model

    @classmethod
    def example(cls) -> Example:
        import torch
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, vocab_size=100)
        return Example(BertModel(config).eval(), [{"input_ids": torch.randint(100, (2, 20))}], Step.forward(2, 20))


def _blocks(graph: Graph) -> dict[str, dict[str, Op]]:
    """The ops of each encoder block, by the block's path and by what they do there."""
    found: dict[str, dict[str, Op]] = {}
    starts = [op.name.removesuffix(PROJECTIONS[0]) for op in graph.find("linear") if op.name.endswith(f".{PROJECTIONS[0]}")]
    for op in graph.find("linear", "attention", "elementwise"):
        for start in starts:
            kind = op.name.removeprefix(start)
            plain = op.kind != "linear" or (op.weight and not op.weight.scale_bits and op.weight.bits >= 16)
            if op.name.startswith(start) and kind in (*LAYERS, ATTENTION, ACT) and plain:
                found.setdefault(start.rstrip("."), {})[kind] = op
    return found


def _is_block(module: "nn.Module") -> bool:
    """Whether a module has all the linear layers of a BERT block under their names, and no cross-attention."""
    from torch import nn

    names = dict(module.named_modules())
    return all(type(names.get(layer)) is nn.Linear for layer in LAYERS) and not hasattr(module, "crossattention")
