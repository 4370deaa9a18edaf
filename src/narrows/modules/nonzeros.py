"""What techniques share whose linear layers keep, multiply and train some of their weights alone, and store no zeros."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from narrows.errors import NarrowsError
from narrows.graph import FP32, DType, Graph, Op, at
from narrows.machine import Machine
from narrows.modules.linears import ReplacesLinears, csr
from narrows.step import Step

if TYPE_CHECKING:
    from torch import Tensor, nn

ROWS = 64  # that the kernel takes at a time


class KeepsNonzeros(ReplacesLinears):
    """Linear layers that keep `nonzeros` of their weights, as compressed rows; the plain layers where that is none of them."""

    # Share of zeros from which the kernel beats dense fp32, by phase, measured on one core with AVX-512, layers of 384 x 384 to
    # 768 x 3072: there it takes 0.9 and 0.85 of the time. With a tenth less zeros, it takes longer than dense.
    LEAST: ClassVar[Mapping[str, float]] = {"train": 0.8, "prefill": 0.7, "forward": 0.7}

    @property
    @abstractmethod
    def option(self) -> str:
        """The option that says how many weights are kept, as it is written."""

    @abstractmethod
    def nonzeros(self, inputs: int, outputs: int) -> int:
        """How many weights a layer of this size keeps; 0 leaves every layer as it is."""

    def thin(self, name: str, linear: "nn.Linear") -> None:
        """Whatever makes the weights that a layer is to keep its largest ones."""

    def stored(self, inputs: int, outputs: int) -> DType:
        """The format that the weights of a layer of this size are kept in."""
        return csr(outputs, self.nonzeros(inputs, outputs))

    def filled(self, linear: "nn.Linear") -> "nn.Module":
        """The layer that keeps the largest weights of a plain one; without numbers where that is on the meta device."""
        from narrows.modules.sparse_linear import SparseLinear

        return SparseLinear.of(linear, self.nonzeros(linear.in_features, linear.out_features))

    def layers(self, model: "nn.Module") -> "dict[str, nn.Linear]":
        found = super().layers(model)
        return {name: one for name, one in found.items() if self.nonzeros(one.in_features, one.out_features)}

    def unfit(self, name: str, inputs: int, outputs: int) -> str:
        many = self.nonzeros(inputs, outputs)
        return f"{many} nonzeros are more than 32 bits count" if many >= 2**31 else ""

    def unpaid(self, machine: Machine | None, graph: Graph, ops: Sequence[Op], step: Step) -> str:
        if machine and machine.kind != "cpu":
            return f"its kernel runs on CPUs, and {machine.name} is a {machine.kind}"
        if any({op.act, op.weight} != {FP32} for op in ops):
            return f"its numbers are {ops[0].act.name}; the kernel is for fp32"
        sizes = [(_sizes(op), op.repeat) for op in ops]
        zeros = 1 - sum((self.nonzeros(*s) or s[0] * s[1]) * n for s, n in sizes) / sum(a * b * n for (a, b), n in sizes)
        least = self.LEAST.get(step.phase, 1.0)
        if zeros < least:
            return f"with {self.option}, {zeros:.3g} of the weights are zero; dense products are as fast up to {least:g}"
        rows = max(float(np.min(at(op["rows"], step))) for op in ops)  # a pooler is given less, and takes next to no time
        return f"no layer is given more than {rows:g} rows, and the kernel takes {ROWS} at a time" if rows < ROWS else ""

    def parts(self, op: Op) -> Sequence[Op]:
        inputs, outputs = _sizes(op)
        kept = self.nonzeros(inputs, outputs)
        if not kept:
            return (op,)
        sizes = {"rows": op["rows"], "inputs": inputs, "outputs": outputs, "nonzeros": kept, "bias": op["bias"]}
        return (replace(op, kind="sparse", dims=sizes, weight=self.stored(inputs, outputs)),)

    def hollow(self, name: str, linear: "nn.Linear") -> "nn.Module":
        import torch
        from torch import nn

        with torch.device("meta"):
            plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
        return self.filled(plain).to_empty(device=linear.weight.device)

    def apply(self, model: "nn.Module", data: "Sequence[Mapping[str, Tensor]]" = ()) -> "nn.Module":
        import torch

        for name, linear in self.layers(model).items():
            if linear.weight.dtype != torch.float32:
                problem = f"its weights are {linear.weight.dtype}."
                raise NarrowsError(problem, where=f"{self.card.slug}: {name}", remedy="Convert the model to fp32 first.")
            self.thin(name, linear)
            layer = self.filled(linear)
            if not name:
                return layer
            model.set_submodule(name, layer)
        return model


def _sizes(op: Op) -> tuple[int, int]:
    return int(op["inputs"]), int(op["outputs"])  # type: ignore[arg-type]
