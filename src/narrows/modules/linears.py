"""What techniques share that put another layer in the place of every plain linear one, and how planes are kept."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from narrows.errors import NarrowsError
from narrows.graph import DType, Graph, Op
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import No, Rewrites, Verdict

if TYPE_CHECKING:
    from torch import Tensor, nn

NUMBERS_PER_BYTE = {2: 8, 3: 5}  # signs and trits
# Measured on one thread of a Xeon with AMX: every format of the registry, a layer of 576 x 1536 read from memory, 1 to 256 rows.
CODES_ON_CPU = (
    "a CPU takes 0.4 to 1.2 times as long by these codes as in bf16 for one row (packed 4 bits: 0.2), 1.3 to 2.5 times for "
    "16 to 256 rows, and 3 to 20 times without AVX-512 VBMI and a C compiler"
)
HEADS = ("lm_head", "classifier", "score", "embed_out", "decoder")  # what families call the layer that gives the answer


def is_output(name: str) -> bool:
    """Whether the layer of this path gives the model's answer; the graph and the model are asked by the same name."""
    return name.split(".")[-1] in HEADS or name == "proj_out"  # inside a block, a layer of the last name is like any other


def is_plain(op: Op) -> bool:
    """Whether an op is a linear layer with plain weights of its own, other than the output layer."""
    plain = op.kind == "linear" and op.weight is not None and not op.weight.scale_bits and op.weight.bits >= 16 and not op.tied
    return plain and op["matrices"] == 1 and not is_output(op.name)


def csr(outputs: int, nonzeros: int) -> DType:
    """Compressed sparse rows: an fp32 number for each nonzero, its column in 32 bits (as a scale would be kept for a group
    of one), and where each output's begin."""
    return DType("csr", 32 + 32 * (outputs + 1) / nonzeros, group=1, scale_bits=32)


CSL_TILE = (128, 64)  # outputs x inputs


def csl(inputs: int, outputs: int, nonzeros: int) -> DType:
    """Tiled CSL: 32 bits for each nonzero, a bf16 number and its place in its tile, and where each tile's begin.

    Compressed to be read alone: what multiplies is the whole matrix, so that the bits are spread over its zeros too.
    """
    down, across = CSL_TILE
    tiles = -(-outputs // down) * -(-inputs // across)
    return DType("csl", 32 * (nonzeros + tiles + 1) / (inputs * outputs))


@dataclass(frozen=True, slots=True)
class Planes:
    """How a weight that is a sum of scaled planes of signs or trits is kept.

    values   2: signs, 3: trits;  count  planes;  group  weights that share a scale
    powers   0: a scale is a bf16 number, else a sum of so many signed powers of two, a byte each
    by       along what weights share a scale: inputs (of one output), or outputs (of one input)
    """

    values: int
    count: int
    group: int
    powers: int = 0
    by: str = "inputs"

    @property
    def stored(self) -> DType:
        """As the format of a weight."""
        name = f"{self.count} {'sign' if self.values == 2 else 'trit'} planes"
        bits = self.count * 8 / NUMBERS_PER_BYTE[self.values]
        return DType(name, bits, self.group, scale_bits=self.count * (8 * self.powers or 16))

    def unfit(self, inputs: int, outputs: int) -> str:
        """Why a matrix does not split into its groups, or ''."""
        if inputs % self.group or (self.by == "outputs" and outputs % self.group):
            return f"{inputs} inputs and {outputs} outputs are no multiples of group={self.group}"
        return f"{inputs} inputs do not fill bytes of 8 signs" if self.values == 2 and inputs % 8 else ""


class ReplacesLinears(Rewrites):
    """Another layer for every plain linear one but the output layer: smaller, and slower where no kernel reads it packed."""

    SLOWER = ""  # what it costs where the plain weights fit the memory: the reason to refuse

    @abstractmethod
    def unfit(self, name: str, inputs: int, outputs: int) -> str:
        """Why a layer of this path and these sizes cannot be replaced, or ''."""

    @abstractmethod
    def parts(self, op: Op) -> Sequence[Op]:
        """The ops that take a linear op's place."""

    @abstractmethod
    def hollow(self, name: str, linear: "nn.Linear") -> "nn.Module":
        """The structure of the layer that takes the place of a linear one at this path."""

    def unpaid(self, machine: Machine | None, graph: Graph, ops: Sequence[Op], step: Step) -> str:
        """Why replacing these ops of a graph does not pay, or ''."""
        if machine and graph.weight_bytes < machine.memory.capacity_bytes:
            return f"its {graph.weight_bytes / 1e9:.3g} GB of weights fit the memory, and {self.SLOWER}"
        return ""

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        ops = [op for op in graph.find("linear") if self._fits(op)]
        if not ops:
            return No("it has no plain linear layer besides its output layer; quantized ones stay as they are")
        reasons = (self.unfit(op.name, int(op["inputs"]), int(op["outputs"])) for op in ops)  # type: ignore[arg-type]
        reason = next(filter(None, reasons), "") or self.unpaid(machine, graph, ops, step)
        return No(reason) if reason else True

    def rewrite(self, graph: Graph) -> Graph:
        return graph.map(lambda op: list(self.parts(op)) if op.kind == "linear" and self._fits(op) else op)

    def restructure(self, model: "nn.Module") -> "nn.Module":
        """What `apply` does to the structure of a model, on one without data."""
        for name, linear in self.layers(model).items():
            model.set_submodule(name, self.hollow(name, linear))
        return model

    def layers(self, model: "nn.Module") -> "dict[str, nn.Linear]":
        """The layers to replace, by path; raises NarrowsError for weights that are no finite numbers or do not fit."""
        from torch import nn

        shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        found = {name: m for name, m in model.named_modules()
                 if type(m) is nn.Linear and not is_output(name) and id(m.weight) not in shared}  # fmt: skip
        where = self.card.slug
        if not found:
            raise NarrowsError("the model has no plain linear layer.", where=where, remedy="Use another technique.")
        for name, linear in found.items():
            if reason := self.unfit(name, linear.in_features, linear.out_features):
                raise NarrowsError(f"{reason}.", where=f"{where}: {name}", remedy="Use another format or group.")
            if not linear.weight.is_meta and not linear.weight.isfinite().all():
                raise NarrowsError("weights are NaN or infinite.", where=f"{where}: {name}", remedy="Repair the model first.")
        return found

    def calibrated(
        self,
        model: "nn.Module",
        data: "Sequence[Mapping[str, Tensor]]",
        rows: int,
        why: str,
        make: "Callable[[nn.Linear, Tensor | None], nn.Module]",
    ) -> "nn.Module":
        """The model with what `make` gives for each layer and `rows` of its inputs [T, K], None where no data reached it."""
        from narrows.modules.calibration import observed, require_data

        layers = self.layers(model)
        require_data(data, why, self.card.slug)
        inputs = observed(model, layers, data, rows)
        for name, linear in layers.items():
            model.set_submodule(name, make(linear, inputs.get(name)))
        return model

    def _fits(self, op: Op) -> bool:
        """Whether an op may be replaced."""
        return is_plain(op)


def branched(op: Op, base: Op, rank: int) -> tuple[Op, ...]:
    """A linear op as `base`, in another format, with a branch of that rank in the op's own, and the sum of both."""
    if not rank:
        return (base,)
    down, up = op.but(name=f"{op.name}.down", outputs=rank, bias=0), op.but(name=f"{op.name}.up", inputs=rank, bias=0)
    numbers = op["rows"] * op["outputs"]  # type: ignore[operator]
    total = replace(op, kind="elementwise", dims={"elements": numbers, "reads": 2 * numbers}, weight=None, split="")
    return replace(base, name=f"{op.name}.base"), down, up, total
