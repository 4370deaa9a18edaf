"""Keep weights and activations in 8 or 6 bits, each input channel with a scale of its own that costs nothing at run time.

The scale of an input channel cannot be taken out of an integer product, so it is put into the weights before they are
rounded: W diag(a). Each channel is shifted so that its range is symmetric, which makes the scales smaller and more
alike; the shift goes into the bias. What is left at run time is rounding, and one scale for each output.

## When it helps
Models whose activations have outliers in fixed channels, on hardware that multiplies int8 faster than bf16: prefill and
decoding, at half the weight bytes (at 8 bits).

## When it does not
Scales are fixed: inputs with outliers of single tokens, like the gated products before `down_proj`, get a scale for each
token as it comes instead (`token`). On a CPU the int8 product wins 1.1 to 1.5 times over bf16 for layers of 4 million
weights and more and up to 64 rows; with more rows rounding the inputs costs more than it saves, in smaller layers the
calls do, and 6 bits are unpacked first.

## Reference
Wang et al., OutlierTune: Efficient Channel-Wise Quantization for Large Language Models, 2024.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from narrows import samples
from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Graph, Op, at
from narrows.machine import Machine
from narrows.modules.number_formats import CodesWeights, Coding, NumberFormat
from narrows.step import Step
from narrows.technique import Card, Claim, Example, Stage, choice

if TYPE_CHECKING:
    from torch import Tensor, nn

SAMPLES = 1024  # tokens that the ranges are taken from
CPU_ROWS, CPU_WEIGHTS = 64, 2**22  # up to so many rows, and from so many weights, the CPU's int8 product wins over bf16


@dataclass(frozen=True)
class OutlierTune(CodesWeights):
    """Integers for weights and inputs of every linear layer but the output layer."""

    card: ClassVar[Card] = Card(
        slug="outliertune",
        relieves=(Limit.BANDWIDTH, Limit.CAPACITY, Limit.COMPUTE),
        phases=("prefill", "decode", "forward"),
        exact=False,
        stage=Stage.QUANTIZE,
        touches=("linear weights",),
        blockwise=True,
        needs=("calibration",),
        price="2 to 3 % more perplexity at 8 bits and 135 M parameters",
        claims=(
            Claim(
                "folded_equals_explicit", "relative", 0.0, "every coded layer of two blocks of SmolLM2-135M", "abstract", "run",
                "fp32 sums in another order; NaN where channels do not have scales of their own", at_most=1e-5,
            ),
            Claim(
                "perplexity", "ratio", None, "SmolLM2-135M, W8A8, Brown; the paper: Int6 OPT-IML like FP16", "abstract", "run",
                "a few per cent over fp32 at 135 M parameters; a single scale for all channels costs more", at_most=1.04,
            ),
            Claim(
                "loss_over_token", "ratio", None, "SmolLM2-135M, W6A6: nats added over those of per-token scales", "abstract",
                "run", "clearly less than the usual way, whose scales are found anew for every token", at_most=0.8,
            ),
            Claim(
                "speed", "x", 1.48, "W8A8 over FP16, OPT on A100; ours: a layer of 4096 x 4096, 8 rows, one CPU thread, bf16",
                "abstract", "run", "half the bytes of weights, less rounding; fp32, which a single scale needs, is slower",
                at_least=1.15,
            ),
        ),
    )  # fmt: skip

    bits: int = choice(8, 6, help="of weights and activations")
    channels: bool = choice(True, help="a scale for each input channel; without it one for all")
    symmetric: bool = choice(True, help="shift each channel so that its range is symmetric")
    headroom: float = choice(1.5, 1.0, help="how many times calibration's range is covered: tokens to come may exceed it")
    token: str = choice("down_proj", help="layers with this last name take a scale for each token instead")

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or not self.headroom > 0:
            problem = f"bits={self.bits}, headroom={self.headroom}."
            raise NarrowsError(problem, where="outliertune", remedy="Give 2 to 8 bits, and a headroom above 0, like 1.5.")

    def baseline(self) -> "OutlierTune":
        return replace(self, channels=False)

    def coding_of(self, name: str) -> Coding:
        form = NumberFormat.parse(f"int{self.bits}")
        if name.split(".")[-1] == self.token:
            return Coding(form, inputs=form, per="token")
        return Coding(form, inputs=form, per="channel" if self.channels else "tensor", folded=self.channels, zero=self.symmetric)

    def unpaid(self, machine: Machine | None, graph: Graph, ops: Sequence[Op], step: Step) -> str:
        if machine is None or machine.kind != "cpu":
            return ""
        if self.bits < 8:
            return super().unpaid(machine, graph, ops, step)
        rows, size = max(at(op["rows"], step) for op in ops), min(at(op["inputs"], step) * at(op["outputs"], step) for op in ops)
        if rows > CPU_ROWS:
            return f"{rows:.0f} rows are more than the {CPU_ROWS} up to which this CPU's int8 product makes up for rounding them"
        return f"layers of {size:.0f} weights are too small for the CPU's int8 product to pay" if size < CPU_WEIGHTS else ""

    def apply(self, model: "nn.Module", data: Sequence[Mapping[str, "Tensor"]]) -> "nn.Module":
        from narrows.modules.coded_linear import CodedLinear

        inputs = self.seen(model, data, SAMPLES)
        for name, linear in self.layers(model).items():
            coding, rounding = self.coding_of(name), {}
            if coding.per != "token":
                rounding = self._ranges(inputs.pop(name), coding)
            model.set_submodule(name, CodedLinear.of(linear.weight, linear.bias, coding, **rounding))
        return model

    def _ranges(self, x: "Tensor", coding: Coding) -> "dict[str, Tensor]":
        """Scales and zeros that make inputs like x [T, K] fill the format."""
        high, low = x.amax(0), x.amin(0)
        if not self.channels:
            high, low = high.max()[None], low.min()[None]
        zero = (high + low) / 2 * self.symmetric
        assert coding.inputs
        return {"input_scale": (high - zero).maximum(zero - low) * self.headroom / coding.inputs.largest, "input_zero": zero}

    @classmethod
    def example(cls) -> Example:
        return Example(*samples.tiny_llama(2, 16), Step.decode(1, context=16))
