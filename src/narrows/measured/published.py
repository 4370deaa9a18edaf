"""GPT-like decoders as published training runs used them: widths in, a graph out."""

from dataclasses import dataclass, replace
from functools import lru_cache

from narrows.capture.config import from_config
from narrows.errors import NarrowsError
from narrows.graph import Dim, Graph, Op, Size


@dataclass(frozen=True, slots=True)
class Shape:
    """A GPT-like decoder: widths, and whether its attention keeps the score matrix out of memory (`fused`)."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int = 51200
    fused: bool = True


@lru_cache(maxsize=512)
def decoder(shape: Shape, sequence: int) -> Graph:
    """The graph of a GPT-like decoder of a shape, in fp16; raises NarrowsError for heads that do not divide its width.

    `sequence` is the length that the score matrix of attention that is not fused is laid out for.
    """
    if shape.hidden % shape.heads:
        raise NarrowsError(
            f"{shape.heads} heads do not divide {shape.hidden}.", where="heads", remedy="Give a divisor of the width."
        )
    config = {
        "model_type": "gpt2",
        "n_embd": shape.hidden,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "vocab_size": shape.vocabulary,
        "n_positions": 2048,
        "torch_dtype": "float16",
        "tie_word_embeddings": True,
    }
    graph = from_config(config, f"gpt {shape.hidden} x {shape.layers}")
    return graph if shape.fused else unfused(graph, sequence)


def unfused(graph: Graph, sequence: int) -> Graph:
    """The same graph with dropout, and attention over `sequence` tokens in kernels that pass the score matrix through memory.

    What is saved is that of Korthikanti et al. (2022), section 4.1: 5 bytes a score, and a byte for each element that
    a dropout outside of attention may drop.
    """

    dropped = {op.name for op in graph if op.split == "row"}

    def change(op: Op) -> list[Op] | Op:
        if dropped & set(op.inputs):
            return replace(op, saved=_of(op.saved) + _of(op["elements"]) * 0.5)
        if op.kind != "attention":
            return op
        heads, head = float(op["heads"]), float(op["head_dim"])  # type: ignore[arg-type]
        rows, scores, matrices = Size.of(tokens=heads), Size.of(tokens=heads * sequence), Size.of(sequences=heads)
        names = [*(f"{op.name}.{part}" for part in ("scores", "softmax", "dropout")), op.name]
        product = {"rows": rows, "matrices": matrices}
        dims: list[tuple[str, dict[str, Dim], Size]] = [
            ("matmul", {**product, "inputs": head, "outputs": sequence}, rows * (2 * head)),
            ("elementwise", {"elements": scores, "reads": scores, "flop_per_element": 5}, scores),
            ("elementwise", {"elements": scores, "reads": scores, "flop_per_element": 2}, scores * 1.5),
            ("matmul", {**product, "inputs": sequence, "outputs": head}, rows * (2 * head)),
        ]
        return [
            Op(name, kind, sizes, op.act, repeat=op.repeat, saved=saved, inputs=(read,) if read else op.inputs, split="heads")
            for name, read, (kind, sizes, saved) in zip(names, ["", *names], dims, strict=False)
        ]

    return graph.map(change)


def _of(dim: Dim) -> Size:
    return dim if isinstance(dim, Size) else Size.of(one=dim)
