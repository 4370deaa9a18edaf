"""What every user already has for nothing: the cast to bf16 and a compiler. The baseline of every speed-up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from narrows.cost import Limit
from narrows.graph import BF16, FP16, FP32, DType, Graph
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Example, No, Rewrites, Stage, Verdict

if TYPE_CHECKING:
    import torch


def cast(graph: Graph, dtype: DType) -> Graph:
    """The graph with every plain floating-point number in another dtype; packed weights stay packed."""

    def to(old: DType | None) -> DType | None:
        return dtype if old in (FP32, BF16, FP16) else old

    return graph.map(lambda op: replace(op, act=to(op.act) or op.act, weight=to(op.weight), cache=to(op.cache)))


def _mlp() -> Example:
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    return Example(model, [{"input": torch.randn(8, 64)}], Step.forward(8))


@dataclass(frozen=True)
class Bf16(Rewrites):
    """Weights and activations as bfloat16: half the bytes, and the matrix units' native format."""

    card: ClassVar[Card] = Card(
        "bf16",
        (Limit.COMPUTE, Limit.BANDWIDTH, Limit.CAPACITY),
        ("prefill", "decode", "forward", "train"),
        exact=False,
        claims=(),
        price="rounding to 8 bits of mantissa",
        stage=Stage.CAST,
        touches=("dtype",),
        blockwise=True,
    )

    def baseline(self) -> "Bf16":
        return self

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        if not any(FP32 in (op.act, op.weight) for op in graph):
            return No("nothing in it is fp32")
        if sparse := graph.find("sparse"):
            return No(f"{sparse[0].name} keeps its nonzeros alone, and their kernel is for fp32")
        if machine is not None and machine.peak("bf16") <= machine.peak("fp32") and machine.kind != "gpu":
            return No(f"{machine.name} computes bf16 no faster than fp32")
        return True

    def rewrite(self, graph: Graph) -> Graph:
        return cast(graph, BF16)

    def apply(self, model: "torch.nn.Module", data: Sequence[Mapping[str, "torch.Tensor"]] = ()) -> "torch.nn.Module":
        import torch

        # rotary frequencies are in no file: transformers computes them anew, in fp32, whatever the weights are in
        rotary = [(m, n, b) for m in model.modules() for n, b in m.named_buffers(recurse=False) if n.endswith("inv_freq")]
        model = model.to(torch.bfloat16)
        for module, name, buffer in rotary:
            setattr(module, name, buffer)
        return model

    @classmethod
    def example(cls) -> Example:
        return _mlp()


@dataclass(frozen=True)
class Compile(Rewrites):
    """`torch.compile`: pointwise runs become one kernel each, and the host launches less."""

    card: ClassVar[Card] = Card(
        "compile",
        (Limit.LAUNCH, Limit.BANDWIDTH),
        ("prefill", "decode", "forward", "train"),
        exact=True,
        claims=(),
        price="minutes of compilation, again for new shapes",
        stage=Stage.RUN,
        touches=("launch",),
    )

    def baseline(self) -> "Compile":
        return self

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        return True if graph.eager else No("the graph is costed as fused and recorded already, as a serving engine runs it")

    def rewrite(self, graph: Graph) -> Graph:
        return replace(graph, eager=False)

    def apply(self, model: "torch.nn.Module", data: Sequence[Mapping[str, "torch.Tensor"]] = ()) -> "torch.nn.Module":
        model.compile()
        return model

    def restructure(self, model: "torch.nn.Module") -> "torch.nn.Module":
        return self.apply(model)

    @classmethod
    def example(cls) -> Example:
        return _mlp()


FREE: dict[str, type[Rewrites]] = {"bf16": Bf16, "compile": Compile}
