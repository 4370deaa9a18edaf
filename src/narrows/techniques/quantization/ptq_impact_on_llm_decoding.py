"""Tell what bitsandbytes' formats do to decoding: memory, tokens a second, and how much the temperature matters more.

## What it does
Beside bf16, each linear weight but the output layer's as int8 (LLM.int8(): inputs are rounded on the way, those with outliers
are multiplied plainly), as 4-bit numbers of a table (nf4, fp4) with a scale for every 64, or with these scales in 8 bits too
(dq). For each the weights' bytes and the tokens a second as that library ran it at the time: 4-bit weights are unpacked to
memory and read again, and int8 products come with six small kernels.

## When it helps
Choosing a format for a model that must fit: what it saves, and what decoding will lose by it.

## When it does not
Kernels that unpack in registers are faster than this (`awq`, `int8`), and on a CPU, which launches nothing, int8 products
cost no more than those in bf16 even so. Quality differs from model to model: on SmolLM2-135M, rotated, fp4 adds nearly twice
the nats of nf4, where the study finds them alike.

## Reference
Roy, Understanding the Impact of Post-Training Quantization on Large Language Models, 2023, arXiv 2309.05210. Formats are those
of Dettmers et al., LLM.int8() 2022 and QLoRA 2023.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.cost import Limit
from narrows.diagnose import seconds
from narrows.errors import NarrowsError, closest
from narrows.graph import BF16, DType, Graph, Op
from narrows.machine import Machine
from narrows.modules.linears import is_plain
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

FORMATS = {
    "bf16": BF16,
    "int8": DType("int8", 8, scale_bits=32),
    "nf4": DType("nf4", 4, 64, scale_bits=32),
    "fp4": DType("fp4", 4, 64, scale_bits=32),
    "nf4-dq": DType("nf4-dq", 4 + 32 / 256 / 64, 64, scale_bits=8),
    "fp4-dq": DType("fp4-dq", 4 + 32 / 256 / 64, 64, scale_bits=8),
}
_SMALL = "SmolLM2-135M, rotated, 768 held-out tokens: "


@dataclass(frozen=True)
class PTQImpact(Measures):
    """Formats beside bf16: bytes and tokens a second."""

    card: ClassVar[Card] = Card(
        slug="ptq-impact-on-llm-decoding",
        relieves=(Limit.CAPACITY,),
        phases=("decode", "prefill"),
        exact=False,
        claims=(
            Claim(
                "temperature_sensitivity", "ratio", None, _SMALL + "how much less likely the unquantized model finds a sampled "
                "token at temperature 0.8 than at 0.5, in nats, least of nf4 and fp4 over unquantized", "abstract: higher "
                "sensitivity in the range of 0.5 to 0.8", "run", "expectations, not samples; int8 stays at 1.00", at_least=1.05,
            ),
            Claim(
                "nf4_resilience", "ratio", None, _SMALL + "what fp4 adds to that over what nf4 adds", "abstract: nf4 more "
                "resilient on Llama 2, whose architecture this model has", "run", "clearly more than alike; formats that are the "
                "same give 1", at_least=1.5,
            ),
            Claim(
                "best_speed_over_bf16", "ratio", None, "Llama-2-7B, batch 1, context 512, A100-80GB, forecast: the fastest of "
                "five formats", "abstract: bfloat16 models consistently yield the fastest inference", "simulated", "slower, by "
                "more than rounding", at_most=0.95,
            ),
            Claim(
                "memory", "x less", None, "Llama-2-7B, weights as nf4 with scales in 8 bits", "abstract: memory consumption",
                "checked", "16 bits over 4.13, with 4 % of the weights plain", at_least=3.3, at_most=3.88,
            ),
        ),
    )  # fmt: skip

    formats: str = choice("int8/nf4/fp4/nf4-dq/fp4-dq", "nf4/nf4-dq", "bf16", help="formats to set beside bf16, joined by /")

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in FORMATS:
                where = f"{self.card.slug}: formats"
                raise NarrowsError(f"{name!r} is not a format.", where=where, remedy=closest(name, list(FORMATS)))

    def baseline(self) -> "PTQImpact":
        return replace(self, formats="bf16")

    @property
    def names(self) -> tuple[str, ...]:
        """The formats' names."""
        return tuple(self.formats.split("/"))

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Bytes of all weights and tokens a second by format. Raises NarrowsError for a graph without plain linear layers."""
        if not any(is_plain(op) for op in graph.forward):
            remedy = "Give a model whose linear weights are not quantized."
            raise NarrowsError("it has no plain linear layer.", where=f"{self.card.slug}: {graph.name}", remedy=remedy)
        rows = []
        for name in dict.fromkeys(("bf16", *self.names)):
            stored = in_format(graph, FORMATS[name])
            took = float(seconds(stored, machine, step)[0])
            rows.append({"format": name, "weight_bytes": stored.weight_bytes, "seconds": took,
                         "tokens_per_s": float(step["tokens"]) / took})  # fmt: skip
        values = {f"{row['format']} {what}": float(row[what]) for row in rows for what in ("weight_bytes", "tokens_per_s")}  # type: ignore[arg-type]
        return Reading(values, {name: "bytes" if "bytes" in name else "tokens/s" for name in values}, tuple(rows))


def in_format(graph: Graph, form: DType) -> Graph:
    """A graph as bitsandbytes runs it, every kernel launched by the host, with linear weights in a format."""

    def change(op: Op) -> Op | Iterable[Op]:
        if op.phase != "forward" or not is_plain(op):
            return op
        weights = op["inputs"] * op["outputs"]  # type: ignore[operator]

        def beside(name: str, numbers: object, kernels: int) -> Op:
            dims = {"elements": numbers, "reads": numbers}
            return Op(f"{op.name}.{name}", "elementwise", dims, act=BF16, repeat=op.repeat, kernels=kernels)  # type: ignore[arg-type]

        if form.bits == 8:  # largest of each row, rounding, outliers; scales, outliers' product, sum
            before, after = op["rows"] * op["inputs"], op["rows"] * op["outputs"]  # type: ignore[operator]
            return beside("round", before, 3), op.but(weight=form, compute="int8"), beside("scale", after, 3)
        if form.bits < 8:  # the product reads what this writes
            return beside("unpack", weights, 1), op.but(weight=form)
        return op.but(weight=form)

    return Graph(graph.name, graph.map(change).ops, graph.source, graph.notes, eager=True)
