"""What techniques on the KV cache ask of a graph, and do to it; without torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from narrows.graph import Graph, Op, Size
from narrows.technique import No, Verdict


def attentions(graph: Graph) -> int:
    """How many attention layers a graph has."""
    return sum(op.repeat for op in graph.find("attention"))


def cacheable(graph: Graph) -> Verdict:
    """Whether every attention layer keeps what it has seen, sees what the others see, and has queries to score it with."""
    attention, layers = graph.find("attention"), attentions(graph)
    if not attention or any(op.cache is None for op in attention):
        return No("it has no attention that keeps keys and values from step to step")
    if sum(op.repeat for op in graph.find("linear") if op.name.endswith(".q_proj")) != layers:
        return No(f"of its {layers} attention layers not all have a q_proj of their own, with which to score the prompt")
    if len({replace(op, name="", inputs=(), repeat=1) for op in attention}) > 1:
        return No("its attention layers do not all see the same tokens")
    if any("[window=" in field for op in attention for field, _ in getattr(op["held"], "terms", ())):
        return No("its attention slides over a window already")
    return True


def capped(graph: Graph, kept: Sequence[int | None], hold: bool = False) -> Graph:
    """The graph whose attention layers, in order, read at most so many old tokens each (None: all), and keep no more.

    `hold`: they go on keeping all.
    """
    each = iter(kept)
    dims = ("pairs", "context") if hold else ("pairs", "context", "held")

    def cap(op: Op) -> Op | list[Op]:
        if op.kind != "attention" or op.phase != "forward":
            return op
        alike = Counter(next(each) for _ in range(op.repeat))
        return [op.but(repeat=n) if most is None else
                op.but(repeat=n, **{dim: Size.of({f"{dim}[past={most}]": 1.0}) for dim in dims})
                for most, n in alike.items()]  # fmt: skip

    return graph.map(cap)
