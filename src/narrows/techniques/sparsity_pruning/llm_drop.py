"""Drop whole attention (or MLP) sublayers whose output hardly turns the residual stream; attention is the most redundant.

A sublayer is scored on calibration text by the cosine between the stream before it and after it; the most similar go,
with their norm, rotation and KV cache. No weight is changed and nothing is trained.

## When it helps
Long contexts: the KV cache, its reads and the attention work fall by the share of the layers dropped. Deep models have
more to spare: of Llama-2-70B half of the attention layers can go, of a 1B few.

## When it does not
MLPs hold most of the weights and bear little dropping. Eight attentions of SmolLM2-135M cost 1.5 x perplexity if chosen by
similarity and 1.8 x at best by chance; where only four go, a lucky draw is as good. Where layers are not alike (sliding next
to full attention) or attention and MLP are parallel it refuses: what it would save is only known after calibration, or the
sublayers cannot be told apart.

## Reference
He, Sun, Shen, Li: What Matters in Transformers? Not All Attention is Needed, arXiv 2406.15786 (2024), section 3. A saved
model carries `drop_attn_list` and `drop_mlp_list` in its config, as the authors' code writes them.
"""

import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Graph, Op
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, Example, No, Rewrites, Stage, Verdict, choice

if TYPE_CHECKING:
    import torch

# How layers name their residual sublayers, in the order in which these run. Children that a layer lacks are left out.
Layout = Mapping[str, tuple[str, ...]]
LAYOUTS: tuple[Layout, ...] = (
    {"attention": ("input_layernorm", "self_attn", "resid_attn_dropout"),
     "mlp": ("post_attention_layernorm", "mlp", "resid_mlp_dropout")},
    {"attention": ("input_layernorm", "self_attn", "post_attention_layernorm"),
     "mlp": ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm")},
)  # fmt: skip
LISTS = {"attention": "drop_attn_list", "mlp": "drop_mlp_list"}
_IN_LAYER = re.compile(r"((?:.+?\.)?(?:\d+|\*))\.([^.]+)")


def layout(children: Collection[str]) -> Layout | None:
    """The layout of a layer whose children with parameters have these names: each sublayer has a norm of its own."""
    for found in LAYOUTS:
        attention, mlp = ({name for name in chain if name in children} for chain in found.values())
        if attention | mlp == set(children) and {"self_attn"} < attention and {"mlp"} < mlp:
            return found
    return None


def _place(op: Op) -> tuple[str, str]:
    """The layer that an op is in, and the layer's child (or the op itself where it is the layer's own)."""
    match = _IN_LAYER.match(op.name)
    return (match[1], match[2]) if match else ("", "")


@dataclass(frozen=True)
class _Stack:
    """The alike layers of a folded graph: per sublayer kind its ops, and in how many layers it is."""

    ops: dict[str, list[Op]]
    count: dict[str, int]


def _key(op: Op) -> Op:
    """An op as far as its work goes."""
    return replace(op, inputs=(), repeat=1, saved=0)


def _stack(graph: Graph) -> _Stack | No:
    """The decoder layers of a folded graph, or why they cannot be thinned by count."""
    children: dict[str, set[str]] = {}
    for op in graph:
        layer, child = _place(op)
        if layer and op.weight is not None:
            children.setdefault(layer, set()).add(child)
    layer, names = next(((la, found) for la, c in children.items() if (found := layout(c))), ("", None))
    if names is None:
        return No("no layer of it is norm, attention, add, norm, MLP, add, one after the other and under known names")
    ops: dict[str, list[Op]] = {}
    count: dict[str, int] = {}
    for kind, chain in names.items():
        inside = {op.name for op in graph if _place(op)[0] == layer and _place(op)[1] in chain}
        modules = {name for other in names.values() for name in other}
        adds = [op for op in graph if _place(op)[0] == layer and _place(op)[1] not in modules and inside.intersection(op.inputs)]
        ops[kind] = [op for op in graph if op.name in inside] + adds
        norm = next(f"{layer}.{n}" for n in chain if f"{layer}.{n}" in inside)
        count[kind] = sum(op.repeat for op in graph if op.name == norm and op.phase == "forward")
        alike: dict[Op, int] = {}
        for op in ops[kind]:
            alike[_key(op)] = alike.get(_key(op), 0) + op.repeat
        uneven = [op for op, n in alike.items() if n % count[kind]]
        if uneven:
            return No(f"{uneven[0].name} differs among {count[kind]} layers: what goes with one is known only when calibrated")
    return _Stack(ops, count)


@dataclass(frozen=True)
class LLMDrop(Rewrites):
    """Drop the attention and MLP sublayers that turn the residual stream the least."""

    attention: int = choice(4, 8, 2, help="attention sublayers to drop")
    mlp: int = choice(0, 2, help="MLP sublayers to drop")
    by: str = choice("similarity", help="similarity, or random: the same number by chance")

    card: ClassVar[Card] = Card(
        "llm-drop",
        relieves=(Limit.BANDWIDTH, Limit.CAPACITY, Limit.COMPUTE, Limit.LAUNCH),
        phases=("prefill", "decode", "forward", "train"),
        exact=False,
        price="a few percent of perplexity a dropped attention in small models, less in large ones; fine-tuning recovers part",
        stage=Stage.REMOVE,
        touches=("layers",),
        needs=("calibration",),
        claims=(
            Claim("perplexity", "x", 1.024, "8 of SmolLM2-135M's 30; paper: scores, half of 70B's", "abstract", "run",
                  "a small model has less to spare; of 7 draws by chance the best costs 1.8, the median 3.3", at_most=1.7),
            Claim("attention_before_mlp_and_blocks", "of the nats", None, "8 attentions, 8 MLPs or 8 blocks", "curves", "run",
                  "the paper has curves only: half of what the cheaper of the others costs is a clear order", at_most=0.5),
            Claim("decode_speed", "x", 1.484, "as many as double the perplexity; paper: half of Llama-2-70B's", "abstract", "run",
                  "on a CPU the MLPs' and the head's weights dominate; what chance allows gives below 1.1", at_least=1.15),
            Claim("cache_share", "of the bytes", 0.5, "as many as double the perplexity; paper: half of them", "abstract", "run",
                  "the bytes must be exactly the share of layers left; chance allows to drop a sixth", at_most=0.75),
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if min(self.attention, self.mlp) < 0 or self.by not in ("similarity", "random"):
            raise NarrowsError(f"{self} is not possible.", where="llm-drop", remedy="Give counts from 0 on, and by=similarity.")

    def baseline(self) -> "LLMDrop":
        return replace(self, by="random")

    def _wanted(self) -> dict[str, int]:
        return {"attention": self.attention, "mlp": self.mlp}

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        stack = _stack(graph.fold())
        if isinstance(stack, No):
            return stack
        for kind, wanted in self._wanted().items():
            if wanted >= stack.count[kind]:
                return No(f"it has {stack.count[kind]} {kind} sublayers, and {wanted} are to go")
        return True if any(self._wanted().values()) else No("nothing is to be dropped")

    def rewrite(self, graph: Graph) -> Graph:
        graph = graph.fold()
        stack = _stack(graph)
        if isinstance(stack, No):
            return graph
        left: dict[Op, int] = {}  # repeats to take out, by what an op does
        for kind, wanted in self._wanted().items():
            for op in stack.ops[kind]:
                left[_key(op)] = left.get(_key(op), 0) + op.repeat * wanted
            for key in {_key(op) for op in stack.ops[kind]}:
                left[key] //= stack.count[kind]
        kept: list[Op] = []
        for op in reversed(graph.ops):  # entries of one name differ in what the first layer reads: the last go first
            taken = min(left.get(_key(op), 0), op.repeat)
            if taken:
                left[_key(op)] -= taken
            if taken < op.repeat:
                kept.append(replace(op, repeat=op.repeat - taken))
        return replace(graph, ops=tuple(reversed(kept)))

    def apply(self, model: "torch.nn.Module", data: Sequence[Mapping[str, "torch.Tensor"]] = ()) -> "torch.nn.Module":
        _, layers = _layers(model)
        if max(self._wanted().values()) >= len(layers):
            raise NarrowsError(f"{self} does not fit {len(layers)} layers.", where="llm-drop", remedy="Drop fewer.")
        scores: Mapping[str, Sequence[float]]
        if self.by == "random":
            scores = {kind: random.Random(kind).sample(range(len(layers)), len(layers)) for kind in LISTS}
        else:
            scores = similarities(model, data)
        ranked = {kind: sorted(range(len(layers)), key=scores[kind].__getitem__, reverse=True) for kind in LISTS}
        drop(model, {kind: sorted(ranked[kind][:wanted]) for kind, wanted in self._wanted().items()})
        return model

    def restructure(self, model: "torch.nn.Module") -> "torch.nn.Module":
        drop(model, {kind: getattr(model.config, field, None) or () for kind, field in LISTS.items()})
        return model

    @classmethod
    def example(cls) -> Example:
        from narrows.samples import tiny_llama

        model, data = tiny_llama(6, tokens=16, positions=64)
        return Example(model.eval(), data, Step.decode(2, 16))


def _layers(model: "torch.nn.Module") -> tuple[Layout, list[Any]]:
    """The layout and the decoder layers of a model; raises NarrowsError where they are not alike or not known."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) > 1:
            children = [{n for n, child in layer.named_children() if list(child.parameters())} for layer in module]
            found = layout(children[0])
            if found and all(own == children[0] for own in children):
                if len(set(getattr(model.config, "layer_types", None) or [""])) > 1:
                    raise NarrowsError("its layers attend in different ways.", where="llm-drop", remedy="Use alike layers.")
                return found, list(module)
    problem = f"{type(model).__name__} has no list of layers with norm, self_attn, norm and mlp, or has been thinned already."
    raise NarrowsError(problem, where="llm-drop", remedy="Use a decoder of the llama, mistral, qwen or gemma kind.")


def similarities(model: "torch.nn.Module", data: Sequence[Mapping[str, "torch.Tensor"]]) -> dict[str, list[float]]:
    """Of every sublayer, the cosine between the stream before and after it: the mean over the tokens of `data`.

    Raises NarrowsError where a layer does more than add a sublayer to the stream (a multiplier, say): it could not be thinned.
    """
    import torch

    from narrows.modules.residual import similarity

    names, layers = _layers(model)
    if not data:
        raise NarrowsError("it needs calibration data.", where="llm-drop", remedy="Pass a few batches of text.")
    chains = [(kind, tuple(n for n in chain if hasattr(layer, n)), layer) for layer in layers for kind, chain in names.items()]
    total = {kind: [0.0] * len(layers) for kind in names}
    stream: dict[int, Any] = {}

    def enters(i: int) -> Any:
        def hook(_: Any, given: Any) -> None:
            if i and not torch.equal(given[0], stream.pop(i - 1)):
                problem = "its layers do more than add their sublayers to the stream."
                raise NarrowsError(problem, where="llm-drop", remedy="Use a decoder of the llama, mistral, qwen or gemma kind.")
            stream[i] = given[0]

        return hook

    def leaves(i: int) -> Any:
        def hook(_: Any, given: Any, out: Any) -> None:
            added = out[0] if isinstance(out, tuple) else out
            total[chains[i][0]][i // len(names)] += float(similarity(stream[i], added)) / len(data)
            stream[i] = stream[i] + added

        return hook

    handles = []
    try:
        for i, (_, chain, layer) in enumerate(chains):
            handles.append(getattr(layer, chain[0]).register_forward_pre_hook(enters(i)))
            handles.append(getattr(layer, chain[-1]).register_forward_hook(leaves(i)))
        with torch.no_grad():
            for batch in data:
                stream.clear()
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return total


def drop(model: "torch.nn.Module", lost: Mapping[str, Collection[int]]) -> None:
    """Take sublayers out of a model in place: `lost` has the layer numbers by kind, which its config then carries.

    Attention that is left is numbered anew, so that the cache begins with its first layer and has no gaps.
    """
    from narrows.modules.residual import thin

    names, layers = _layers(model)
    for kind, field in LISTS.items():
        numbers = lost.get(kind, ())
        if not isinstance(numbers, list | tuple) or not all(type(i) is int and 0 <= i < len(layers) for i in numbers):
            raise NarrowsError(f"{numbers!r} are not layers.", where=f"config: {field}", remedy=f"It has {len(layers)}.")
    for i, layer in enumerate(layers):
        own = {kind: tuple(n for n in chain if hasattr(layer, n)) for kind, chain in names.items()}
        gone = [kind for kind in names if i in lost.get(kind, ())]
        if gone:
            thin(layer, tuple(own[k] for k in gone), tuple(own[k] for k in names if k not in gone))
    for number, layer in enumerate(la for la in layers if hasattr(la, "self_attn")):
        layer.self_attn.layer_idx = number
    config: Any = model.config
    for kind, field in LISTS.items():
        setattr(config, field, sorted(lost.get(kind, ())))
