"""What stands around the blocks: embeddings, heads, convolutions, and the towers that a network is made of."""

from dataclasses import dataclass

from narrows.capture.blocks import Part, Work
from narrows.capture.tape import TOKENS, Tape
from narrows.graph import Dim, Size


@dataclass(frozen=True)
class Embedding:
    """Looks rows up in `tables` (name, entries) and adds them; the first is cut by vocabulary under tensor parallelism."""

    tables: tuple[tuple[str, int], ...]
    width: int = 0
    scaled: bool = False
    tied: str = ""

    def emit(self, tape: Tape, x: str) -> str:
        width = self.width or tape.width
        names: list[str] = []
        for name, entries in self.tables:
            dims: dict[str, Dim] = {"rows": tape.rows, "outputs": width, "vocabulary": entries}
            names.append(
                tape.add(
                    name, "embedding", dims, split="" if names else "vocabulary", plain=True, tied="" if names else self.tied
                )
            )
        work = len(names) - 1 + self.scaled
        if not work:
            return names[0]
        parent = self.tables[0][0].rpartition(".")[0]
        size = tape.rows * width
        return tape.elementwise(f"{parent}.sum" if parent else "sum", tuple(names), size, work, work, size * len(names))


@dataclass(frozen=True)
class Dense:
    """A linear layer outside the blocks: heads, poolers, projections; `act` follows it."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    rows: Size | None = None
    tied: str = ""
    split: str = ""
    act: Work | None = None

    def emit(self, tape: Tape, x: str) -> str:
        own = self.bias and not self.tied
        out = tape.linear(self.name, x, self.inputs, self.outputs, own, self.split, plain=True, rows=self.rows, tied=self.tied)
        size = (self.rows or tape.rows) * self.outputs
        if self.bias and self.tied:  # the matrix is another op's, the bias is not
            out = tape.elementwise(f"{self.name}.bias", (out,), 0, 0, 0, weights=self.outputs, split=self.split)
        if self.act:
            out = tape.elementwise(
                f"{self.name}.act", (out,), size, self.act.flop, self.act.kernels, saved=tape.keep(out, size), split=self.split
            )
        return out


@dataclass(frozen=True)
class Conv:
    """A convolution from `before` positions to those of the stream."""

    name: str
    before: Size
    inputs: int
    kernel: int
    bias: bool = True
    act: Work | None = None
    positions: Size | None = None

    def emit(self, tape: Tape, x: str) -> str:
        rows = self.positions or tape.rows
        dims: dict[str, Dim] = {
            "positions": rows,
            "in_positions": self.before,
            "in_channels": self.inputs,
            "out_channels": tape.width,
            "kernel": self.kernel,
            "bias": int(self.bias),
        }
        out = tape.add(
            self.name, "conv", dims, x, saved=tape.keep(x or f"{self.name} input", self.before * self.inputs), plain=True
        )
        if not self.act:
            return out
        size = rows * tape.width
        return tape.elementwise(f"{self.name}.act", (out,), size, self.act.flop, self.act.kernels, saved=size)


@dataclass(frozen=True)
class Product:
    """The inner product of each row with one vector of `inputs` numbers."""

    name: str
    inputs: int

    def emit(self, tape: Tape, x: str) -> str:
        return tape.add(self.name, "matmul", {"rows": tape.rows, "inputs": self.inputs, "outputs": 1}, x)


@dataclass(frozen=True)
class Added:
    """Parameters added to the stream: position tables, class tokens."""

    name: str
    weights: int
    kernels: int = 1
    flop: float = 1

    def emit(self, tape: Tape, x: str) -> str:
        return tape.elementwise(self.name, (x,), tape.rows * tape.width, self.flop, self.kernels, weights=self.weights)


@dataclass(frozen=True)
class Tower:
    """Parts in a row, on one stream of `rows` x `width`; it starts anew where `joined` is false."""

    width: int
    parts: tuple[Part, ...]
    rows: Size = TOKENS
    joined: bool = False

    def emit(self, tape: Tape, x: str) -> str:
        before = tape.rows, tape.width
        tape.rows, tape.width = self.rows, self.width
        for part in self.parts:
            x = part.emit(tape, x if part is not self.parts[0] or self.joined else "")
        tape.rows, tape.width = before
        return x


@dataclass(frozen=True)
class Network:
    """Towers in order, and what a reader of the numbers must know."""

    towers: tuple[Tower, ...]
    notes: tuple[str, ...] = ()
