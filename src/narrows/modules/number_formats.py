"""Number formats of 2 to 8 bits, and what techniques share that store linear weights in one.

An integer is a float without exponent bits: one rule rounds, encodes and decodes them all (see `coded_linear`).
"""

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from narrows.errors import NarrowsError
from narrows.graph import DType, Graph, Op
from narrows.machine import Machine
from narrows.modules.linears import CODES_ON_CPU, ReplacesLinears
from narrows.step import Step

if TYPE_CHECKING:
    from torch import Tensor, nn

    Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """A sign, `exponent` bits and `mantissa` bits; without an exponent a whole number (two's complement, symmetric).

    Of 8 bits, e5m2 keeps the infinities and NaNs of IEEE 754 and the others one NaN (all ones); narrower ones keep
    neither. e4m3 and e5m2 are those of the OCP FP8 specification, 4 and 6 bits those of OCP MX.
    """

    exponent: int
    mantissa: int

    @classmethod
    def parse(cls, name: str) -> "NumberFormat":
        """'int6' or 'e3m2'; raises NarrowsError for anything else and for less than 2 or more than 8 bits."""
        match = re.fullmatch(r"int(\d)|e(\d)m(\d)", name)
        found = match and (cls(0, int(match[1]) - 1) if match[1] else cls(int(match[2]), int(match[3])))
        if match is None or not found or not 2 <= found.bits <= 8 or match[2] == "0":
            remedy = "Write int2 to int8, or exponent and mantissa bits like e4m3."
            raise NarrowsError(f"{name!r} is no number format of 2 to 8 bits.", where="format", remedy=remedy)
        return found

    def __str__(self) -> str:
        return f"e{self.exponent}m{self.mantissa}" if self.exponent else f"int{self.bits}"

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def least(self) -> int:
        """The exponent of the smallest normal number; below it steps stay 2 ** (least - mantissa)."""
        return 2 - 2 ** (self.exponent - 1) if self.exponent else self.mantissa

    @property
    def largest(self) -> float:
        """The largest number."""
        if not self.exponent:
            return 2.0**self.mantissa - 1
        ieee, one_nan = (self.exponent, self.mantissa) == (5, 2), self.bits == 8
        top = 2**self.exponent - 2 + self.least - ieee
        return float(2.0**top) * (2 - 2.0**-self.mantissa * (1 + (one_nan and not ieee)))

    def stored(self, group: int = 0) -> DType:
        """As the format of a weight with a 16-bit scale for every `group` inputs of an output (0: for each output)."""
        return DType(str(self), self.bits, group, scale_bits=16)


@dataclass(frozen=True, slots=True)
class Coding:
    """How a layer keeps its weights, and rounds its inputs.

    group    inputs of an output that share a scale; 0: all of them
    inputs   what inputs are rounded to, at fixed scales; None: they stay as they are
    per      what has a fixed scale of its own: all inputs ('tensor') or each of them ('channel'); or each row of
             inputs gets one as it comes ('token')
    folded   the weights were multiplied by the inputs' scales before they were rounded, else they are after
    zero     inputs are shifted by a zero before they are rounded; the layer's bias makes up for it
    """

    weights: NumberFormat
    group: int = 0
    inputs: NumberFormat | None = None
    per: str = "tensor"
    folded: bool = False
    zero: bool = False

    @property
    def stored(self) -> DType:
        return self.weights.stored(self.group)

    @property
    def compute(self) -> str:
        """The arithmetic that hardware needs for codes times codes: int8, fp8, fp4, or '' where inputs stay plain."""
        if self.inputs is None:
            return ""
        bits = max(self.inputs.bits, self.weights.bits)
        if self.inputs.exponent or self.weights.exponent:
            return "fp4" if bits <= 4 else "fp8"
        return "int4" if bits <= 4 else "int8"

    def unfit(self, inputs: int) -> str:
        """Why rows of so many weights do not pack, or ''."""
        per_byte = 8 // (self.weights.bits & -self.weights.bits)
        if inputs % per_byte:
            return f"{inputs} inputs do not fill bytes of {per_byte} parts of an {self.weights}"
        if self.group and inputs % self.group:
            return f"{inputs} inputs are no multiple of group={self.group}"
        return ""


class CodesWeights(ReplacesLinears):
    """Stores every plain linear layer but the output layer in the format that `coding_of` names."""

    SLOWER = CODES_ON_CPU

    @abstractmethod
    def coding_of(self, name: str) -> Coding:
        """How the layer of this path is kept."""

    def unfit(self, name: str, inputs: int, outputs: int) -> str:
        return self.coding_of(name).unfit(inputs)

    def unpaid(self, machine: Machine | None, graph: Graph, ops: Sequence[Op], step: Step) -> str:
        return super().unpaid(machine, graph, ops, step) if machine and machine.kind == "cpu" else ""

    def _fits(self, op: Op) -> bool:
        return op.phase == "forward" and super()._fits(op)

    def parts(self, op: Op) -> Sequence[Op]:
        coding = self.coding_of(op.name)
        bias = max(int(op["bias"]), int(coding.zero))  # type: ignore[arg-type]
        return (op.but(weight=coding.stored, compute=coding.compute, bias=bias),)

    def hollow(self, name: str, linear: "nn.Linear") -> "nn.Module":
        from narrows.modules.coded_linear import CodedLinear

        sizes, weight = (linear.in_features, linear.out_features), linear.weight
        return CodedLinear(*sizes, self.coding_of(name), linear.bias is not None, weight.device, weight.dtype)

    def seen(self, model: "nn.Module", data: "Batches", rows: int) -> "dict[str, Tensor]":
        """Inputs [T, K] of the layers that round theirs; raises NarrowsError for one that the data never reached."""
        from narrows.modules.calibration import observed

        wanted = {
            name: layer
            for name, layer in self.layers(model).items()
            if self.coding_of(name).inputs and self.coding_of(name).per != "token"
        }
        inputs = observed(model, wanted, data, rows)
        for name in wanted:
            if name not in inputs or not inputs[name].isfinite().all():
                problem = "calibration data never reached it." if name not in inputs else "its inputs are NaN or infinite."
                raise NarrowsError(problem, where=f"{self.card.slug}: {name}", remedy="Pass batches that run the whole model.")
        return inputs
