"""Techniques of narrows itself, without a paper; here: weights packed in the formats that suit a model and a machine."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError, closest
from narrows.graph import DType, Graph, Op
from narrows.machine import Machine
from narrows.recover import Recover
from narrows.step import Step
from narrows.technique import Card, Example, No, Rewrites, Stage, Verdict, choice

if TYPE_CHECKING:
    from torch import Tensor, nn

    from narrows.modules.packed_linear import PackedLinear

# What a layer's weights can be kept as, by the name that plans use; None leaves them as they are.
FORMATS: dict[str, DType | None] = {
    "plain": None,
    "int8": DType("int8", 8, 0, scale_bits=16),
    **{f"int4g{group}": DType("int4", 4, group, scale_bits=16, zero_bits=16) for group in (32, 64, 128)},
}
_RULE = re.compile(r"(?P<name>\*|[\w.]+)(@(?P<numbers>\d+(-\d+)?(/\d+(-\d+)?)*))?:(?P<format>\w+)")
RULES = "Write NAME:FORMAT or NAME@NUMBERS:FORMAT joined by ;, like down_proj@0-3/29:plain;lm_head:int8."


@dataclass(frozen=True, slots=True)
class Rule:
    """Layers whose name ends in `name` ('*': all), in the blocks of these numbers (none: all), get a format."""

    name: str
    numbers: frozenset[int]
    format: str

    def matches(self, layer: str) -> bool:
        return (self.name == "*" or f".{layer}".endswith(f".{self.name}")) and (
            not self.numbers or block_number(layer) in self.numbers
        )


def block_number(layer: str) -> int | None:
    """The one number in a layer's path; None where there is none, or several (a block's and an expert's)."""
    found = [part for part in layer.split(".") if part.isdecimal()]
    return int(found[0]) if len(found) == 1 else None


def rules(text: str) -> tuple[Rule, ...]:
    """The rules that `text` says, in order; raises NarrowsError naming the one that cannot be read."""
    found = []
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        match = _RULE.fullmatch(part)
        if match is None:
            raise NarrowsError(f"{part!r} is not a rule.", where="int8: but", remedy=RULES)
        if match["format"] not in FORMATS:
            remedy = closest(match["format"], list(FORMATS))
            raise NarrowsError(f"{match['format']!r} is not a format.", where=f"int8: but: {part}", remedy=remedy)
        numbers: set[int] = set()
        for piece in filter(None, (match["numbers"] or "").split("/")):
            first, _, last = piece.partition("-")
            numbers.update(range(int(first), int(last or first) + 1))
        found.append(Rule(match["name"], frozenset(numbers), match["format"]))
    return tuple(found)


def rules_text(formats: Mapping[str, str], default: str = "int8") -> str:
    """The shortest rules under which each named layer gets its format, those with `default` left out.

    `formats` must hold every layer of the model: a rule for a kind of layer covers all the blocks that have it.
    """
    by_kind: dict[str, dict[int | None, str]] = {}
    for layer, chosen in formats.items():
        number = block_number(layer)
        kind = layer.split(f".{number}.")[-1] if number is not None else layer
        by_kind.setdefault(kind, {})[number] = chosen
    found = []
    for kind, chosen_by_number in by_kind.items():
        for chosen in sorted(set(chosen_by_number.values()) - {default}):
            numbers = sorted(n for n, each in chosen_by_number.items() if each == chosen and n is not None)
            everywhere = set(chosen_by_number.values()) == {chosen}
            found.append(f"{kind}{'' if everywhere else f'@{_ranges(numbers)}'}:{chosen}")
    return ";".join(found)


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as 0-2/5."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return "/".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


@dataclass(frozen=True)
class Int8(Rewrites):
    """All linear weights as int8 with a scale per output, multiplied by the kernel that suits the number of rows.

    A tied output layer is packed once, and the embedding reads its rows. `but` gives layers other formats; an embedding with
    weights of its own stays plain unless a rule names it.
    """

    card: ClassVar[Card] = Card(
        "int8",
        (Limit.BANDWIDTH, Limit.CAPACITY),
        ("prefill", "decode", "forward"),
        exact=False,
        claims=(),
        price="rounding to 8 bits: about half a percent of perplexity at 135 M parameters",
        stage=Stage.QUANTIZE,
        touches=("linear weights",),
        blockwise=True,
    )

    but: str = choice("", help="formats of layers that do not get int8, as NAME@NUMBERS:FORMAT joined by ;")
    compensate: bool = choice(False, help="4-bit layers: errors of rounding cancel on calibration data (GPTQ)")

    def __post_init__(self) -> None:
        rules(self.but)

    def baseline(self) -> "Int8":
        return replace(self, but="*:plain")

    @cached_property
    def _rules(self) -> tuple[Rule, ...]:
        return rules(self.but)

    def format_of(self, layer: str) -> DType | None:
        """What the weights of a layer of this name become; None if they stay."""
        return FORMATS[next((rule.format for rule in self._rules if rule.matches(layer)), "int8")]

    def format_of_embedding(self, embedding: str) -> DType | None:
        """What the rows of an embedding become that shares them with no layer; None if they stay."""
        return FORMATS[next((r.format for r in self._rules if r.name != "*" and r.matches(embedding)), "plain")]

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        owners = {op.name: op for op in graph if op.kind == "embedding"}
        layers = [op for op in graph.find("linear") if _is_plain(op, owners)]
        if not layers:
            return No("it has no linear layer with plain weights")
        packed = [(op, form) for op in layers for form, _ in self._split(op) if form]
        shared = {op.tied: op.name for op in graph if op.tied in owners}
        for op in owners.values():
            if form := self.format_of_embedding(op.name):
                if op.name in shared or not _is_float(op):
                    return No(f"{op.name} has no plain weights of its own; rules for {shared.get(op.name, 'others')} hold")
                packed.append((op, form))
        for op, form in packed:
            inputs, outputs = _sizes(op)
            if form.group and (inputs % form.group or outputs % 2):
                return No(f"{op.name} has {inputs} inputs and {outputs} outputs: they do not pack as {form.name} by {form.group}")
            if form.bits != 8 and op.tied:
                return No(f"{op.name} shares its weights with {op.tied}, which can read them as int8 or plain alone")
        return True if packed else No(f"but={self.but!r} leaves all {len(layers)} kinds of layer plain")

    def _split(self, op: Op) -> Iterator[tuple[DType | None, int]]:
        """The formats that the repeats of an op get, each with how many do."""
        if op.name.split(".").count("*") == 1:
            names = [op.name.replace("*", str(i), 1) for i in range(op.repeat)]
            formats = [self.format_of(name) for name in names]
            yield from ((form, formats.count(form)) for form in dict.fromkeys(formats))
        else:
            yield self.format_of(op.name), op.repeat

    def rewrite(self, graph: Graph) -> Graph:
        graph = graph.fold()
        owners = {op.name: op for op in graph if op.kind == "embedding"}
        heads = {op.tied: op for op in graph if op.tied in owners and op.kind == "linear" and self.format_of(op.name)}

        def pack(op: Op) -> Op | list[Op]:
            if op.kind == "embedding" and op.name in heads:
                head = heads[op.name]
                return replace(op, weight=self.format_of(head.name), tied=head.name)
            if op.kind == "embedding":
                return replace(op, weight=self.format_of_embedding(op.name) or op.weight)
            if op.kind != "linear" or not _is_plain(op, owners):
                return op
            tied = "" if op.tied in heads else op.tied
            return [replace(op, weight=form or op.weight, tied=tied, repeat=n) for form, n in self._split(op)]

        return graph.map(pack)

    def apply(self, model: "nn.Module", data: "Sequence[Mapping[str, Tensor]]" = ()) -> "nn.Module":
        from narrows.modules.packed_linear import PackedLinear, quantized

        layers = self._layers(model)
        for name, layer, _ in layers:
            if not layer.weight.isfinite().all():
                raise NarrowsError("has weights that are not finite.", where=name, remedy="Restore them first.")
        ready = self._compensated(model, layers, data) if self.compensate else {}
        for name, layer, form in layers:
            codes = ready.pop(name, None) or PackedLinear.of(quantized(layer.weight, form), getattr(layer, "bias", None))
            _put(model, name, layer, codes)
        return model

    def restructure(self, model: "nn.Module") -> "nn.Module":
        from narrows.modules.packed_linear import PackedLinear

        for name, layer, form in self._layers(model):
            weight, bias = layer.weight, getattr(layer, "bias", None)
            outputs, inputs = weight.shape
            packed = PackedLinear(inputs, outputs, form, bias is not None, device=weight.device, dtype=weight.dtype)
            _put(model, name, layer, packed)
        return model

    def _layers(self, model: "nn.Module") -> "list[tuple[str, nn.Linear | nn.Embedding, DType]]":
        """The layers to pack with their formats; raises NarrowsError where there is none."""
        found = [(name, layer, form) for name, layer in linears(model).items() if (form := self.format_of(name))]
        rows = [(name, layer, form) for name, layer in embeddings(model).items() if (form := self.format_of_embedding(name))]
        if not found + rows:
            raise NarrowsError("no plain linear layer is to be packed.", where="int8", remedy="Use another technique.")
        return found + rows

    def _compensated(
        self, model: "nn.Module", layers: "Sequence[tuple[str, nn.Module, DType]]", data: "Sequence[Mapping[str, Tensor]]"
    ) -> "dict[str, nn.Module]":
        """The linear layers that get 4 bits, by path, rounded for what they read while the data runs."""
        from torch import nn

        from narrows.modules.compensated import compensated, moments
        from narrows.modules.packed_linear import PackedLinear

        chosen = {name: (layer, form) for name, layer, form in layers if form.bits == 4 and isinstance(layer, nn.Linear)}
        return {
            name: PackedLinear.of(compensated(chosen[name][0].weight, chosen[name][1], gram), chosen[name][0].bias)
            for name, gram in moments(model, {name: layer for name, (layer, _) in chosen.items()}, data)
        }

    @classmethod
    def example(cls) -> Example:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, vocab_size=96,
                             tie_word_embeddings=True)  # fmt: skip
        return Example(LlamaForCausalLM(config).eval(), [{"input_ids": torch.randint(96, (2, 24))}], Step.decode(1, context=24))


def _is_plain(op: Op, owners: Mapping[str, Op]) -> bool:
    """Whether an op of kind linear has float weights that are its own or an embedding's."""
    return _is_float(op) and (not op.tied or op.tied in owners)


def _is_float(op: Op) -> bool:
    return op.weight is not None and not op.weight.scale_bits and op.weight.bits >= 16


def _sizes(op: Op) -> tuple[int, int]:
    """(K, N) of the weights [N, K] of a linear layer, or of an embedding: its width and its vocabulary."""
    names = ("outputs", "vocabulary") if op.kind == "embedding" else ("inputs", "outputs")
    return int(op[names[0]]), int(op[names[1]])  # type: ignore[arg-type]


def linears(model: "nn.Module") -> "dict[str, nn.Linear]":
    """The plain linear layers of a model by path."""
    from torch import nn

    return {name: m for name, m in model.named_modules() if type(m) is nn.Linear}


def tied_embedding(model: "nn.Module", name: str, linear: "nn.Linear") -> str:
    """The path of the embedding whose weights a linear layer shares, or ''.

    A model that is being built shares nothing yet: then what transformers is going to tie counts.
    """
    from torch import nn

    foreseen: dict[str, str] = getattr(model, "all_tied_weights_keys", {}) if linear.weight.is_meta else {}
    tied = foreseen.get(f"{name}.weight")
    embeddings = {str(path): m for path, m in model.named_modules() if type(m) is nn.Embedding}
    return next((path for path, m in embeddings.items() if m.weight is linear.weight or f"{path}.weight" == tied), "")


def embeddings(model: "nn.Module") -> "dict[str, nn.Embedding]":
    """The plain embeddings of a model that share their weights with no linear layer, by path."""
    from torch import nn

    found = {name: m for name, m in model.named_modules() if type(m) is nn.Embedding}
    shared = {tied_embedding(model, name, linear) for name, linear in linears(model).items()} if found else set()
    return {name: m for name, m in found.items() if name not in shared}


def _put(model: "nn.Module", name: str, layer: "nn.Linear | nn.Embedding", packed: "PackedLinear") -> None:
    """The packed weights in the place of a layer, and of the embedding that shares a linear layer's."""
    from torch import nn

    from narrows.modules.packed_embedding import PackedEmbedding

    if isinstance(layer, nn.Embedding):
        model.set_submodule(name, PackedEmbedding(packed, "", layer.weight.dtype))
        return
    embedding = tied_embedding(model, name, layer)
    model.set_submodule(name, packed)
    if embedding:
        model.set_submodule(embedding, PackedEmbedding(packed, name, layer.weight.dtype))
        if hasattr(model, "all_tied_weights_keys"):  # transformers would look for weights to tie that are not there
            model.all_tied_weights_keys, model._tied_weights_keys = {}, {}  # type: ignore[assignment]


OWN: dict[str, type[Rewrites]] = {"int8": Int8, "recover": Recover}
