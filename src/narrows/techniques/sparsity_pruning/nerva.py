"""Train a network that is sparse from the start and stores no zeros: no masks, no dense gradients, no dense optimizer state.

## What it does
Each linear layer gets a random pattern of weights before training, an Erdős–Rényi graph between its inputs and outputs: so
many weights for each of them, whatever the size of the matrix between them. Weights are as much larger as there are fewer.
The pattern stays. Only these weights are stored, multiplied, given gradients and updated.

`narrows.modules.sparse_linear.SparseLinear` is the layer, with a C kernel that is compiled for this CPU on first use.

## When it helps
Wide networks of linear layers trained in fp32 on a CPU, where masks would cost more than the dense network does. With 99 %
zeros a step takes a sixth of the time, under a third of that of dense bf16, and an eightieth of the memory.

## When it does not
It starts anew: what a network has learned is lost. Below 80 % zeros dense products are as fast. Batches below 64 rows do not
fill registers. GPUs have no kernel.

## Reference
Wesselink, Grooten, Xiao, de Campos, Pechenizkiy. Nerva: a Truly Sparse Implementation of Neural Networks, arXiv 2407.17437
(2024). The pattern: Mocanu et al. Scalable training of artificial neural networks with adaptive sparse connectivity inspired
by network science. Nature Communications 2018.
"""

import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.modules.nonzeros import KeepsNonzeros
from narrows.step import Step
from narrows.technique import Card, Claim, Example, Stage, choice

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Nerva(KeepsNonzeros):
    """Linear layers that are random sparse graphs before, while and after they are trained."""

    card: ClassVar[Card] = Card(
        slug="nerva",
        relieves=(Limit.COMPUTE, Limit.BANDWIDTH, Limit.CAPACITY),
        phases=("train",),
        exact=False,
        stage=Stage.FACTOR,
        touches=("linear weights",),
        needs=("training",),
        price="the network is trained anew, and a sparse one learns a little less than a dense one of its size",
        claims=(
            Claim(
                "step_speed", "x", 4.0, "99 % zeros, 3072-1024-512-10, batches of 100; against masks on dense weights",
                "abstract", "run", "the paper's kernel library and CPU are others; most of its gain is a fair reproduction",
                at_least=3.0,
            ),
            Claim(
                "memory", "x", None, "the same network with momentum: weights, masks, gradients and optimizer state",
                "abstract: decreases memory usage", "checked",
                "16 bytes for each nonzero, and 13 for each dense weight with its mask; biases stay", at_least=40.0,
            ),
            Claim(
                "accuracy_lost", "points", 0.0, "784-512-256-10 on digits, 97 % zeros; against the same network with masks",
                "abstract: equivalent accuracy", "run", "2,000 digits tell half a point apart, and rounding grows as it trains",
                at_least=-0.5, at_most=0.5,
            ),
            Claim(
                "time_by_size", "x", None, "a step of 1024-1024 over one of 2048-2048, as many weights for each neuron",
                "method: linear in the nonzeros", "run", "0.5 if time goes with the nonzeros, 0.25 if with the matrix",
                at_least=0.4,
            ),
        ),
    )  # fmt: skip

    per_neuron: float = choice(6.0, 12.0, 24.0, 3.0, help="weights for each input and output of a layer; 0 leaves it dense")

    def __post_init__(self) -> None:
        if self.per_neuron < 0:
            raise NarrowsError(f"per_neuron={self.per_neuron}.", where="nerva", remedy="Give a number of weights, 0 or more.")

    def baseline(self) -> "Nerva":
        return replace(self, per_neuron=0.0)

    @property
    def option(self) -> str:
        return f"per_neuron={self.per_neuron:g}"

    def nonzeros(self, inputs: int, outputs: int) -> int:
        return min(inputs * outputs, round(self.per_neuron * (inputs + outputs)))

    def thin(self, name: str, linear: "nn.Linear") -> None:
        """Keep weights of a random graph, always the same one for a layer's name, as much larger as there are fewer."""
        import torch

        weight = linear.weight.data
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        kept = torch.randperm(weight.numel(), generator=generator)[: self.nonzeros(linear.in_features, linear.out_features)]
        graph = torch.zeros(weight.numel(), dtype=torch.bool).scatter(0, kept, torch.tensor(True).expand(len(kept)))
        weight *= graph.view_as(weight) * (weight.numel() / len(kept)) ** 0.5

    @classmethod
    def example(cls) -> Example:
        import torch
        from torch import nn

        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(50, 200), nn.Linear(200, 256), nn.ReLU(), nn.Linear(256, 100))
        return Example(model.eval(), [{"input": torch.randint(50, (2, 64))}], Step.forward(2, 64))
