"""Keep linear weights in 4 bits, after scaling up the input channels that carry the largest activations.

A channel's scale is s = mean|x| ** alpha; alpha is searched on the error of the layers' outputs. Weights are
multiplied by s before they are rounded, and whatever writes the channel is divided by it, so the network computes the
same and rounds less where it matters.

## When it helps
Decoding with few sequences reads every weight once for each token: with a quarter of the bytes the step comes close to
a quarter of the time. A model that does not fit its memory fits in a quarter of it.

## When it does not
Long prompts and large batches are bound by arithmetic; unpacking the weights then only adds to it (SmolLM2-135M on one
thread of a Xeon: decoding 1.9 times as fast as bf16, a prompt of 512 tokens 2.6 times as slow). On a CPU the packed kernel
needs bf16 activations: with fp32 decoding is slower than unpacked. With grouped queries the output projection is not scaled.

## Reference
Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, MLSys 2024.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import DType, Graph, Op
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, Example, No, Rewrites, Stage, Verdict, choice

if TYPE_CHECKING:
    from torch import Tensor, nn

# Linear layers of one block that read the same input, and the layer of the block that writes it ('': its norm).
READERS = {
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): "",
    ("self_attn.o_proj",): "self_attn.v_proj",
    ("mlp.gate_proj", "mlp.up_proj"): "",
    ("mlp.down_proj",): "mlp.up_proj",
}
LAYERS = tuple(layer for readers in READERS for layer in readers)
# The norm that stands before each part of a block: any of these.
NORMS = {"self_attn": ("input_layernorm",), "mlp": ("post_attention_layernorm", "pre_feedforward_layernorm")}
GRID = 20  # values of alpha, from 0 (plain rounding) upwards
SHRINKS = (1.0, 0.9, 0.8, 0.7)  # clipped ranges tried; queries and keys are never clipped
SAMPLES = 256  # tokens of each layer's input that the searches see
ROWS = 128  # outputs of each layer, evenly spread, on which scales are judged: a tenth of the time, the same choice


@dataclass(frozen=True)
class AWQ(Rewrites):
    """4-bit weights in groups of inputs with a scale and a zero each; heads and embeddings stay as they are."""

    card: ClassVar[Card] = Card(
        slug="awq",
        relieves=(Limit.BANDWIDTH, Limit.CAPACITY),
        phases=("decode",),
        exact=False,
        stage=Stage.QUANTIZE,
        touches=("linear weights",),
        blockwise=True,
        needs=("calibration",),
        price="a quarter to a third more perplexity at 135 M parameters, 2 % at 7 billion",
        claims=(
            Claim(
                "same_before_rounding", "relative", 0.0, "SmolLM2-135M, rotated, group 64", "section 3.2, equation 4", "run",
                "fp32 rounding of 30 blocks; NaN, which fails, if nothing was scaled", at_most=1e-3,
            ),
            Claim(
                "perplexity_over_rounding", "ratio", 0.5,
                "Llama-2-7B, W4 g128: +0.13 of +0.26 on WikiText; ours: SmolLM2-135M, rotated, W4 g64, Brown", "table 4", "run",
                "share of rounding's increase that is left; 1 without the search, and other text moves it by 0.1", at_most=0.8,
            ),
            Claim(
                "decode_speedup", "x", 1.85, "Llama-2-7B, batch 1, A100-80GB, roofline without overheads", "abstract", "checked",
                "fp16 over the narrowest format below 1.5 x perplexity on SmolLM2; int8, which rounding needs, gives 1.9",
                at_least=2.5,
            ),
        ),
    )  # fmt: skip

    group: int = choice(128, 64, 32, help="inputs that share a scale and a zero; fewer round better and cost more bytes")
    clip: bool = choice(True, False, help="also search how far to clip each group's range")
    search: bool = choice(True, help="without it every scale is 1: rounding to nearest")

    def __post_init__(self) -> None:
        if self.group < 2:
            raise NarrowsError(f"a group of {self.group} inputs.", where="awq: group", remedy="Give 2 or more, like 64.")

    def baseline(self) -> "AWQ":
        return replace(self, search=False)

    @property
    def form(self) -> DType:
        return DType("int4", 4, self.group, scale_bits=16, zero_bits=16)

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        plain = [op for op in graph.find("linear") if op.weight and not op.weight.scale_bits and op.weight.bits >= 16]
        linears = {op.name: (op["inputs"], op["outputs"]) for op in plain}
        return self._fits(linears, {op.name for op in graph.find("norm")})

    def rewrite(self, graph: Graph) -> Graph:
        def pack(op: Op) -> Op:
            return replace(op, weight=self.form) if op.kind == "linear" and op.name.endswith(LAYERS) else op

        return graph.map(pack)

    def apply(self, model: "nn.Module", data: Sequence[Mapping[str, "Tensor"]]) -> "nn.Module":
        from narrows.modules.packed_linear import PackedLinear, quantized

        model, inputs = self.scaled(model, data)
        for name, linear in _linears(model).items():
            clipped = self.clip and name in inputs and not name.endswith(("q_proj", "k_proj"))
            shrink = self._shrink(linear.weight, inputs[name]) if clipped else 1.0
            model.set_submodule(name, PackedLinear.of(quantized(linear.weight, self.form, shrink), linear.bias))
        return model

    def restructure(self, model: "nn.Module") -> "nn.Module":
        """What `apply` does to the structure of a model, on one without data."""
        from narrows.modules.packed_linear import PackedLinear

        for name, linear in _linears(model).items():
            sizes, weight = (linear.in_features, linear.out_features), linear.weight
            packed = PackedLinear(*sizes, self.form, linear.bias is not None, device=weight.device, dtype=weight.dtype)
            model.set_submodule(name, packed)
        return model

    def scaled(self, model: "nn.Module", data: Sequence[Mapping[str, "Tensor"]]) -> tuple["nn.Module", dict[str, "Tensor"]]:
        """The model with scales in its weights and not yet rounded (it computes the same), and the layers' inputs [T, K].

        Raises NarrowsError, before anything is changed, for a model or data that do not fit.
        """
        import torch

        from narrows.modules.calibration import require_data

        names = {name for name, _ in model.named_modules()}
        linears = _linears(model)
        verdict = self._fits({name: (m.in_features, m.out_features) for name, m in linears.items()}, names)
        if isinstance(verdict, No):
            raise NarrowsError(f"{verdict.reason}.", where="awq", remedy="Use another technique or another group.")
        if not self.search:
            return model, {}
        require_data(data, "the search for scales needs", "awq")
        inputs, norms = _observe(model, linears, data)
        with torch.no_grad():
            for readers, writer in _groups(linears):
                layers, x = [linears[r] for r in readers], inputs[readers[0]]
                source = linears[writer] if writer else norms[readers[0]]
                if writer and source.weight.shape[0] != x.shape[1]:
                    continue  # grouped queries: one value channel is read several times
                scale = self._scale([m.weight for m in layers], x)
                for layer in layers:
                    layer.weight.mul_(scale)
                _divide(source, scale)
                x.div_(scale)
        return model, {reader: inputs[readers[0]] for readers, _ in _groups(linears) for reader in readers}

    def _scale(self, weights: "Sequence[Tensor]", x: "Tensor") -> "Tensor":
        """The scales [K] under which rounding changes the outputs of the weights [N, K] least, given inputs x [T, K]."""
        import torch

        from narrows.modules.packed_linear import requantized

        weight = torch.cat([w[:: -(-len(w) // ROWS)].float() for w in weights])
        size = x.abs().mean(0).clamp(min=1e-4)
        best, least = torch.ones_like(size), float("inf")
        for step in range(GRID):
            scale = size ** (step / GRID)
            scale = scale / (scale.max() * scale.min()).sqrt()
            change = requantized(weight * scale, self.form).div_(scale).sub_(weight)
            error = float((x @ change.T).square().sum())
            if error < least:
                best, least = scale, error
        return best

    def _shrink(self, weight: "Tensor", x: "Tensor") -> "Tensor":
        """For each group of a weight [N, K] the share of its range [N, G] that serves inputs x [T, K] best."""
        from narrows.modules.compensated import least_harm_shrinks

        groups = x.view(len(x), -1, self.group).transpose(0, 1)
        return least_harm_shrinks(weight, self.form, groups.transpose(1, 2) @ groups, SHRINKS)

    def _fits(self, linears: Mapping[str, tuple[Any, Any]], names: set[str]) -> Verdict:
        """Whether blocks of these linear layers (inputs, outputs), with other parts of these names, are Llama's."""
        blocks = _blocks(linears)
        if not blocks:
            return No("no block has linear layers self_attn.q_proj to mlp.down_proj, as Llama's have")
        for part, norms in NORMS.items():
            layers = [layer for layer in LAYERS if layer.startswith(part)]
            whole = [block for block in blocks if any(f"{block}.{layer}" in linears for layer in layers)]
            for block in whole or blocks:  # some blocks may have lost this part; not all of them
                lacking = [layer for layer in layers if f"{block}.{layer}" not in linears]
                if lacking:
                    return No(f"{block} has no plain linear layer {lacking[0]}")
                if not any(f"{block}.{n}" in names for n in norms):
                    return No(f"{block} has no norm before its attention or its MLP that could take up the scales")
        sizes = [size for name, size in linears.items() if name.endswith(LAYERS)]
        odd = [int(n) for _, n in sizes if n % 2]
        if odd:
            return No(f"{odd[0]} outputs do not pack in pairs")
        uneven = [int(k) for k, _ in sizes if k % self.group]
        if uneven:
            fitting = [g for g in (128, 64, 32) if not any(k % g for k, _ in sizes)]
            advice = f"; group={fitting[0]} fits" if fitting else ""
            return No(f"{uneven[0]} inputs are no multiple of group={self.group}{advice}")
        return True

    @classmethod
    def example(cls) -> Example:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=256)
        return Example(LlamaForCausalLM(config).eval(), [{"input_ids": torch.randint(256, (2, 64))}], Step.decode(1, context=64))


def _blocks(names: Mapping[str, Any]) -> list[str]:
    """The paths of the blocks that have any of the layers, in order."""
    return list(dict.fromkeys(name.removesuffix(f".{layer}") for name in names for layer in LAYERS if name.endswith(f".{layer}")))


def _groups(linears: Mapping[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """The paths of layers that read the same input, and of the layer that writes it ('': a norm), in every block in order."""
    there = [(block, readers) for block in _blocks(linears) for readers in READERS if f"{block}.{readers[0]}" in linears]
    return [
        (tuple(f"{block}.{r}" for r in readers), READERS[readers] and f"{block}.{READERS[readers]}") for block, readers in there
    ]


def _linears(model: "nn.Module") -> "dict[str, nn.Linear]":
    """The layers to pack, by path."""
    from torch import nn

    return {name: m for name, m in model.named_modules() if type(m) is nn.Linear and name.endswith(LAYERS)}


def _observe(
    model: "nn.Module", linears: "Mapping[str, nn.Linear]", data: Sequence[Mapping[str, "Tensor"]]
) -> "tuple[dict[str, Tensor], dict[str, nn.Module]]":
    """Run the data: the input [T, K] of each group's first layer, and for groups that a norm alone feeds, that norm."""
    from narrows.modules.calibration import observed

    fed: dict[str, nn.Module] = {}
    last: dict[str, Any] = {}  # the norm that ran last, and what it gave

    def after_norm(norm: "nn.Module", args: Any, out: "Tensor") -> None:
        last.update(norm=norm, out=out)

    def before(name: str) -> Any:
        return lambda layer, args: fed.update({name: last["norm"]}) if args[0] is last.get("out") else None

    hooks = [linear.register_forward_pre_hook(before(name)) for name, linear in linears.items()]
    for child in (child for block in _blocks(linears) for child in model.get_submodule(block).children()):
        if getattr(child, "weight", None) is not None and child.weight.dim() == 1:
            hooks.append(child.register_forward_hook(after_norm))
    try:
        inputs = observed(model, {readers[0]: linears[readers[0]] for readers, _ in _groups(linears)}, data, SAMPLES)
    finally:
        for hook in hooks:
            hook.remove()
    for readers in (readers for readers, writer in _groups(linears) if not writer):
        norm = fed.get(readers[0])
        if norm is None or {name for name, n in fed.items() if n is norm} != set(readers):
            problem = f"no norm feeds {' and '.join(readers)} alone."
            raise NarrowsError(problem, where="awq", remedy="Use a technique without scales, or search=False.")
    return inputs, fed


def _divide(source: "nn.Module", scale: "Tensor") -> None:
    """Divide what a linear layer or a norm gives by `scale` [K], in its parameters."""
    import torch

    if isinstance(source, torch.nn.Linear):
        source.weight.div_(scale[:, None])
    else:  # some norms multiply by 1 + weight: they give something even where all parameters are 0
        none = {name: torch.zeros_like(p) for name, p in source.named_parameters()}
        probe = torch.linspace(-1, 1, len(scale), dtype=scale.dtype)
        one = float(torch.func.functional_call(source, none, (probe,)).abs().max() > 0)
        source.weight.add_(one).div_(scale).sub_(one)
    if isinstance(getattr(source, "bias", None), torch.Tensor):
        source.bias.div_(scale)
