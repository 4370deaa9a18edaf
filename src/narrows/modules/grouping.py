"""How grouped n:m weights are laid out: n of m outputs for each input, C(m, n) x g inputs a chunk."""

import math
from dataclasses import dataclass

from narrows.graph import DType

COMPILED = ((1, 4), (2, 4), (1, 8))  # the n and m that the kernel is written for


@dataclass(frozen=True, slots=True)
class Grouping:
    """n of each m outputs keep their weight for an input; within a chunk of inputs, g share each pattern of n outputs."""

    n: int
    m: int
    g: int

    @property
    def chunk(self) -> int:
        """Inputs in a chunk."""
        return math.comb(self.m, self.n) * self.g

    @property
    def stored(self) -> DType:
        """As the format of a weight: an fp32 number each, and a byte (as a scale) for each n of one input."""
        return DType(f"{self.n}:{self.m}", 32, group=self.n, scale_bits=8)

    def unfit(self, inputs: int, outputs: int) -> str:
        """Why a matrix does not split into its blocks and chunks, or ''."""
        if inputs % self.chunk or outputs % self.m:
            return f"{inputs} inputs and {outputs} outputs are no multiples of {self.chunk} and {self.m}"
        return ""
