"""Pointwise nodes of ONNX files: those of one layer that follow each other are one op."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from narrows.capture.onnx_file import Node, Tensor
from narrows.graph import Dim, DType, Op

_MOVES = {"Concat", "Pad", "Tile", "ScatterND", "ScatterElements", "Resize", "Cast", "CastLike", "DepthToSpace", "SpaceToDepth",
          "OneHot", "Trilu", "Gather", "GatherND", "GatherElements"}  # fmt: skip
_FLOP = {"Softmax": 5, "LogSoftmax": 5, "Gelu": 8, "FastGelu": 8, "BiasGelu": 9, "QuickGelu": 5, "Sigmoid": 4, "Tanh": 4,
         "Erf": 4, "Exp": 4}  # fmt: skip


@dataclass
class Run:
    """Pointwise nodes that pass over the same `size` numbers, of the type `act`."""

    name: str
    module: str
    size: int
    act: DType
    flop: int = 0
    reads: dict[str, int] = field(default_factory=dict)
    weights: int = 0  # elements of parameters that it owns
    uses: int = 0  # and that it reads, its own or another's
    stored: DType | None = None
    nodes: list[str] = field(default_factory=list)
    makers: dict[str, None] = field(default_factory=dict)
    width: int = 0  # of the rows that it takes the mean of

    def takes(self, node: Node, data: Mapping[str, Tensor], size: int) -> bool:
        """Whether a node goes on with it: in the same layer, as wide, or a smaller piece of what it makes."""
        follows = any(self.name in t.makers for t in data.values())
        same_layer = node.module == self.module if node.module else follows
        return same_layer and (size == self.size or (size < self.size and follows))

    def add(self, node: Node, data: Mapping[str, Tensor], out: Tensor, size: int) -> None:
        self.nodes.append(node.op)
        self.flop += _FLOP.get(node.op, 1) if size == self.size and node.op not in _MOVES else 0
        for name, tensor in data.items():
            if self.name not in tensor.makers:
                self.reads[name] = min(tensor.numel, size)
                self.makers.update(dict.fromkeys(tensor.makers))
            if node.op == "ReduceMean" and tensor.shape and out.numel * tensor.shape[-1] == size:
                self.width = tensor.shape[-1]

    def op(self) -> Op:
        """A norm where it scales rows by their mean square and a parameter as wide, else elementwise."""
        reads = sum(self.reads.values())
        dims: dict[str, Dim] = {"elements": self.size, "reads": reads, "flop_per_element": self.flop, "weights": self.weights}
        op = Op(self.name, "elementwise", dims, self.act, self.stored, inputs=tuple(self.makers), kernels=len(self.nodes))
        whole = self.width and self.uses and self.uses % self.width == self.weights % self.width == 0
        if not whole or not {"Sqrt", "Pow"} & set(self.nodes):
            return op
        rows: dict[str, Dim] = {"rows": self.size // self.width, "width": self.width, "weights": self.weights // self.width}
        return replace(op, name=self.module or self.name, kind="norm", dims=rows)
