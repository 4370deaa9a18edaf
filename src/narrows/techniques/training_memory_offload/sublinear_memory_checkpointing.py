"""Keep activations only at the borders of about sqrt(n) segments of blocks, and compute each segment again in the backward pass.

Of n blocks, sqrt(n) borders are kept and one segment of sqrt(n) blocks at a time is held whole, so that memory grows with the
square root of the depth. Gradients are the same numbers.

## When it helps
Training that is bound by memory: deeper networks, longer sequences or larger batches on the same device.

## When it does not
Nothing but training keeps activations. One more forward pass is a third of the work of a step (forward 1, backward 2). Where
weights and optimizer states fill the memory it saves little. Of a network with several lists of blocks the longest alone is cut.

## Reference
Chen, Xu, Zhang, Guestrin: Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174 (2016), section 4. The recursion to
O(log n) memory and the planner over byte budgets are not built: segments hold equally many blocks.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.backward import checkpoint_op
from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Graph, Op
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, Example, No, Rewrites, Stage, Verdict, choice

if TYPE_CHECKING:
    import torch

_BLOCK = re.compile(r"(?:(.+?)\.)?(?:\d+|\*)(?:\.|$)")
_FEWEST = 4  # blocks that are worth a cut


def peak(kept: Sequence[float], borders: Sequence[float], ends: Sequence[int]) -> float:
    """Bytes that forward keeps at most, in segments that end before the blocks `ends`.

    kept[i] is what block i keeps for its backward pass, borders[i] the size of its input. Every segment's input is
    kept; in the backward pass one segment at a time is there whole. One segment: everything is kept.
    """
    starts = [0, *ends[:-1]]
    if len(ends) == 1:
        return sum(kept)
    return sum(borders[i] for i in starts) + max(sum(kept[a:b]) for a, b in zip(starts, ends, strict=True))


@dataclass(frozen=True)
class SublinearMemoryCheckpointing(Rewrites):
    """Recompute segments of blocks in the backward pass."""

    segments: int = choice(0, 2, 4, 8, help="segments the blocks are cut into; 0: the square root of their number, 1: no cut")

    card: ClassVar[Card] = Card(
        "sublinear-memory-checkpointing",
        relieves=(Limit.CAPACITY,),
        phases=("train",),
        exact=True,
        price="one more forward pass through the blocks: a third more work per step",
        stage=Stage.TRAIN,
        touches=("activations",),
        claims=(
            Claim(
                "equal_gradients_in_less_memory",
                "x",
                6.9,
                "64 blocks; paper: 1,000 layers, 48 GB to 7 GB",
                "abstract",
                "run",
                "64 blocks against 8 borders, 8 blocks and what is in flight; NaN if a gradient differs",
                at_least=4,
            ),
            Claim(
                "depth_exponent",
                "power of depth",
                0.5,
                "peak of a training step, 16 to 256 blocks",
                "section 4.1",
                "run",
                "input, output and one block's temporaries do not grow, which flattens the fit",
                at_least=0.4,
                at_most=0.6,
            ),
            Claim(
                "flop_overhead",
                "of a step",
                0.30,
                "counted over a training step; paper: time",
                "abstract",
                "run",
                "one of three passes runs again: a third at most, and not nothing",
                at_least=0.2,
                at_most=0.35,
            ),
            Claim(
                "resnet_1000",
                "x",
                6.9,
                "ResNet of 1,001 layers, batch 32, 224 px: 48 GB to 7 GB",
                "abstract",
                "checked",
                "the paper does not say how its units are spread over the stages",
                at_least=5.5,
                at_most=8.5,
            ),
        ),
    )

    def __post_init__(self) -> None:
        if self.segments < 0:
            raise NarrowsError(f"{self.segments} segments.", where="sublinear-memory-checkpointing", remedy="Give 0 or more.")

    def baseline(self) -> "SublinearMemoryCheckpointing":
        return replace(self, segments=1)

    def ends(self, blocks: int) -> tuple[int, ...]:
        """Where the segments of so many blocks end."""
        count = min(self.segments or round(math.sqrt(blocks)), blocks)
        return tuple((i + 1) * blocks // count for i in range(count))

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        path, blocks = _blocks(graph.fold())
        if step.phase != "train":
            return No(f"a {step.phase} step keeps nothing for a backward pass")
        if any(op.segments or op.phase == "recompute" for op in graph):
            return No("it recomputes already")
        if blocks < max(_FEWEST, self.segments + 1):
            return No(f"its longest list has {blocks} blocks{f' ({path})' if path else ''}")
        return True if self.segments != 1 else No("one segment is no cut")

    def rewrite(self, graph: Graph) -> Graph:
        graph = graph.fold()
        path, blocks = _blocks(graph)
        count = len(self.ends(blocks)) if blocks else 1
        if count == 1:
            return graph
        inside = [op for op in graph if op.phase == "forward" and _path(op) == path]
        again: list[Op] = []
        if any(op.phase == "backward" for op in graph):
            again = [replace(op, phase="recompute") for op in inside]
            if again[-1].kind == "elementwise" and again[-1].repeat > count:  # the sum that ends a segment is not read again
                again[-1] = replace(again[-1], repeat=again[-1].repeat - count)
        border = checkpoint_op(f"{path}.segments".lstrip("."), inside[0].spec.reads(dict(inside[0].dims)), inside[0], count)
        ops: list[Op] = []
        for op in graph:
            if op is inside[0]:
                ops.append(border)
            if again and op.phase == "backward":
                ops, again = ops + again, []
            ops.append(replace(op, segments=count) if op.phase == "forward" and _path(op) == path else op)
        return replace(graph, ops=tuple(ops))

    def apply(self, model: "torch.nn.Module", data: Sequence[Mapping[str, "torch.Tensor"]] = ()) -> "torch.nn.Module":
        import torch

        from narrows.modules.checkpointing import split

        lists: list[Any] = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList | torch.nn.Sequential)]
        longest = max(lists, key=len, default=())
        if len(longest) < max(_FEWEST, self.segments) or hasattr(longest, "ends"):
            problem = f"the longest list of {type(model).__name__} has {len(longest)} blocks, or has been cut."
            raise NarrowsError(problem, where="sublinear-memory-checkpointing", remedy="Use a network of more blocks.")
        if self.segments != 1:
            split(longest, self.ends(len(longest)))
        return model

    def restructure(self, model: "torch.nn.Module") -> "torch.nn.Module":
        return self.apply(model)

    @classmethod
    def example(cls) -> Example:
        from narrows.samples import tiny_llama

        model, data = tiny_llama(9, tokens=16, positions=64)
        return Example(model, data, Step.train(2, 16))


def _path(op: Op) -> str | None:
    """The path of the list that an op's block is in, or None."""
    match = _BLOCK.match(op.name)
    return (match[1] or "") if match else None


def _blocks(graph: Graph) -> tuple[str, int]:
    """The path of the longest list of blocks in a folded graph, and their number: as often as its most frequent op runs."""
    count: dict[tuple[str, str], int] = {}
    for op in graph:
        path = _path(op)
        if path is not None and op.phase == "forward":
            count[path, op.name] = count.get((path, op.name), 0) + op.repeat
    return max(((path, n) for (path, _), n in count.items()), key=lambda found: found[1], default=("", 0))
