"""Count what every operator of a network moves through memory, and fuse all that lies between its matrix products.

Training spends much of its time not on products but between them: biases, dropout, residuals, norms and activations read and
write whole tensors for a handful of operations a number. Operators are sorted into contractions, statistical normalizations
and elementwise ones; neighbours that are no contraction become one kernel where they go through the same numbers and reduce
along one axis at most, and what only passes between them is never written. Then layouts: each operator is timed in each
layout of its tensors, and the quickest path through all of them is taken, since the best layout of one may be bad for the next.

## When it helps
Training of transformers and networks with long chains of small operators in eager mode, and choosing which to fuse.

## When it does not
A compiler or fused attention already does most of it. Where contractions take the time, fewer bytes hide behind them.
What is counted is each tensor once per operator: caches that hold a tensor between two operators move less.

## Reference
Ivanov, Dryden, Ben-Nun, Li and Hoefler, Data Movement Is All You Need: A Case Study on Optimizing Transformers, MLSys 2021,
arXiv 2007.00072. The gradients' operators are derived here; the shortest path is theirs, on a chain of operators.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Graph, Op
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

_LAYER = "BERT-large encoder layer, forward and backward, batch 8, 512 tokens, fp16"
_CPU = "an encoder layer 512 wide, 2048 tokens, fp32, one core"


@dataclass(frozen=True, slots=True)
class Operator:
    """One kernel of a dataflow graph: the tensors it reads and writes by name.

    kind     contraction, bias, add, map (number by number), softmax or norm
    saves    tensors that its gradient needs besides that of its result
    reduces  the axis it sums along: width (of a row), rows, or none
    times    how often it runs: repeated layers
    """

    name: str
    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    saves: tuple[str, ...] = ()
    reduces: str = ""
    times: int = 1

    @property
    def group(self) -> str:
        """Its class in the paper: contraction, normalization or elementwise."""
        return self.kind if self.kind == "contraction" else "normalization" if self.reduces else "elementwise"


@dataclass(frozen=True)
class Dataflow:
    """Operators in order, and the bytes of each tensor; a gradient is as large as its tensor, small parameters are left out."""

    operators: tuple[Operator, ...]
    sizes: Mapping[str, float]

    def size(self, tensor: str) -> float:
        """Bytes of a tensor, or of a part of its gradient (`d:name+1`)."""
        return self.sizes.get(tensor.removeprefix("d:").partition("+")[0], 0.0)

    def moved(self, one: Operator) -> float:
        """Bytes that an operator reads and writes, over all its repeats."""
        return sum(self.size(tensor) for tensor in (*one.reads, *one.writes)) * one.times

    @property
    def bytes(self) -> float:
        return sum(self.moved(one) for one in self.operators)

    def training(self) -> "Dataflow":
        """With the operators of the backward pass after these: gradients of inputs and parameters, sums where paths meet."""
        back: list[Operator] = []
        parts: dict[str, list[str]] = {}
        times: dict[str, int] = {}

        def gradient(tensor: str) -> str:
            """The gradient of a tensor: its only part, the sum of several, or what comes from outside of the graph."""
            found = parts.get(tensor, [])
            if len(found) > 1:
                back.append(Operator(f"sum {tensor}", "add", tuple(found), (f"d:{tensor}",), times=times[tensor]))
                parts[tensor] = [f"d:{tensor}"]
            return f"d:{tensor}" if len(found) != 1 else found[0]

        def give(tensor: str, one: Operator, part: str = "") -> str:
            """Note a part of a tensor's gradient: one that exists already, or a new one."""
            into = parts.setdefault(tensor, [])
            into.append(part or f"d:{tensor}" + f"+{len(into)}" * bool(into))
            times[tensor] = max(times.get(tensor, 1), one.times)
            return into[-1]

        for one in reversed(self.operators):
            given = tuple(map(gradient, one.writes if one.kind == "contraction" else one.writes[:1]))
            if one.kind in ("bias", "norm"):
                back.append(Operator(f"{one.name} dW", "norm", (*given, *one.saves), (), reduces="rows", times=one.times))
            if one.kind in ("bias", "add"):
                for tensor in one.reads:
                    give(tensor, one, given[0])  # the same numbers: nothing moves
            else:
                for wanted in [(tensor,) for tensor in one.reads] if one.kind == "contraction" else [one.reads]:
                    needs = (*one.saves, *(tensor for tensor in one.reads if tensor not in wanted))
                    written = tuple(give(tensor, one) for tensor in wanted)
                    name = f"{one.name} d{wanted[0]}"
                    back.append(replace(one, name=name, reads=(*given, *needs), writes=written, saves=()))
        for tensor in parts:
            gradient(tensor)
        return replace(self, operators=(*self.operators, *back))

    def fused(self) -> "Dataflow":
        """With neighbours that are no contraction as one operator each, and what only passes inside them gone.

        Two join if they share a tensor, run as often, go through as many numbers, and do not sum along different axes.
        """
        readers = Counter(tensor for one in self.operators for tensor in one.reads)
        written = {tensor for one in self.operators for tensor in one.writes}
        groups: list[list[Operator]] = []
        for one in self.operators:
            after_loss = any(tensor.startswith("d:") and tensor not in written for tensor in one.reads)
            if groups and not after_loss and self._joins(groups[-1], one):
                groups[-1].append(one)
            else:
                groups.append([one])
        return replace(self, operators=tuple(_merged(group, readers) for group in groups))

    def _joins(self, group: Sequence[Operator], one: Operator) -> bool:
        if "contraction" in (one.kind, group[0].kind) or one.times != group[0].times:
            return False
        axes = {member.reduces for member in (*group, one)} - {""}
        known = {tensor for member in group for tensor in (*member.reads, *member.writes)}
        extents = [max(map(self.size, member.reads), default=0.0) for member in (group[-1], one)]
        return len(axes) < 2 and bool(known & set(one.reads)) and math.isclose(*extents)


def _merged(group: Sequence[Operator], readers: Mapping[str, int]) -> Operator:
    """One operator for several: it reads what is not its own, and writes what is read elsewhere or nowhere."""
    if len(group) == 1:
        return group[0]
    made = [tensor for one in group for tensor in one.writes]
    reads = dict.fromkeys(tensor for one in group for tensor in one.reads if tensor not in made)
    inside = {tensor: sum(tensor in one.reads for one in group) for tensor in made}
    writes = tuple(tensor for tensor in made if readers.get(tensor, 0) > inside[tensor] or not inside[tensor])
    axis = next((one.reduces for one in group if one.reduces), "")
    return replace(group[0], name=" + ".join(one.name for one in group), reads=tuple(reads), writes=writes, reduces=axis)


def shortest(costs: Sequence[Mapping[tuple[str, str], float]]) -> tuple[tuple[str, ...], float]:
    """The quickest layouts along a chain of operators, and their seconds.

    `costs[i]` maps (layout read, layout written) of operator i to its seconds; layouts between neighbours must agree.
    Returns len(costs) + 1 layouts. Raises NarrowsError where no path goes through.
    """
    best: dict[str, tuple[float, tuple[str, ...]]] = {}
    for place, table in enumerate(costs):
        found: dict[str, tuple[float, tuple[str, ...]]] = {}
        for (before, after), seconds in table.items():
            so_far = best.get(before) if place else (0.0, (before,))
            if so_far and (after not in found or so_far[0] + seconds < found[after][0]):
                found[after] = (so_far[0] + seconds, (*so_far[1], after))
        best = found
    if not best:
        raise NarrowsError("no layout that one writes is read by the next.", where="layouts", remedy="Time more of them.")
    return min(best.values())[::-1]


def path_seconds(costs: Sequence[Mapping[tuple[str, str], float]], path: Sequence[str]) -> float:
    """Seconds of a chain of operators in given layouts."""
    return sum(table[pair] for table, pair in zip(costs, pairwise(path), strict=True))


@dataclass(frozen=True)
class DataMovement(Measures):
    """Bytes that a network's operators move, each on its own and with all between contractions fused."""

    card: ClassVar[Card] = Card(
        "data-movement-is-all-you-need",
        relieves=(Limit.BANDWIDTH, Limit.LAUNCH),
        phases=("prefill", "decode", "forward", "train"),
        exact=True,
        claims=(
            Claim("less_movement", "fraction", 0.2291, _LAYER, "abstract", "checked",
                  "masks of a byte and the order of scaling are ours: three points either way", at_least=0.1991, at_most=0.2591),
            Claim("same_results", "relative error", 0.0, _CPU + ": outputs and gradients of the fused groups, compiled, against "
                  "plain autograd; NaN where nothing is fused", "exact", "run", "rounding of fp32", at_most=1e-4),
            Claim("speedup", "x", None, _CPU + ": kernels between contractions in a training step, compiled one for each "
                  "operator over one for each group", "abstract", "run",
                  "the paper's 1.3 is a GPU's with contractions included; here beyond noise",
                  at_least=1.1),
            Claim("layouts_over_brute_force", "x", 1.0, "products of an encoder layer timed in all layouts on this CPU, and 50 "
                  "random chains: seconds of the chosen path over the least of all paths, the worst", "exact", "checked",
                  "the optimum", at_most=1.0 + 1e-9),
        ),
    )  # fmt: skip
    fuse: bool = choice(True, help="fuse what lies between contractions; False leaves every operator its own kernel")
    scores: bool = choice(True, False, help="attention writes its scores, as before FlashAttention; False: it is one kernel")
    everywhere: bool = choice(True, False, help="choose layouts along the whole path; False takes each operator's own best")

    def baseline(self) -> "DataMovement":
        return DataMovement(fuse=False, everywhere=False)

    def plan(self, flow: Dataflow) -> Dataflow:
        """The operators to run: fused, or as they are."""
        return flow.fused() if self.fuse else flow

    def layouts(self, costs: Sequence[Mapping[tuple[str, str], float]]) -> tuple[tuple[str, ...], float]:
        """Layouts for a chain of operators, with seconds: see `shortest`; each operator's own best if not everywhere."""
        if self.everywhere:
            return shortest(costs)
        path: list[str] = []
        for table in costs:
            _, pair = min((seconds, pair) for pair, seconds in table.items() if not path or pair[0] == path[-1])
            path = path or [pair[0]]
            path.append(pair[1])
        return tuple(path), path_seconds(costs, path)

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Bytes of a step before and after fusion, what share each class of operator moves, and a row for each kernel after it.

        `seconds` are bytes at the bandwidth of main memory. A training step has the gradients' operators, but not the
        optimizer's.
        """
        flow = dataflow(graph, step, self.scores)
        flow = flow.training() if step.phase == "train" else flow
        after = self.plan(flow)
        if not flow.bytes:
            raise NarrowsError("it moves nothing.", where=graph.name, remedy="Give a graph with ops.")
        rows: list[Mapping[str, Any]] = [
            {"kernel": one.name, "class": one.group, "operators": one.name.count(" + ") + 1, "bytes": after.moved(one)}
            for one in after.operators
        ]
        moved = {name: sum(flow.moved(one) for one in flow.operators if one.group == name)
                 for name in ("contraction", "normalization", "elementwise")}  # fmt: skip
        values = {"bytes": flow.bytes, "fused_bytes": after.bytes, "less": 1 - after.bytes / flow.bytes,
                  "seconds": flow.bytes / machine.memory.bandwidth_bytes_per_s,
                  "fused_seconds": after.bytes / machine.memory.bandwidth_bytes_per_s,
                  **{f"{name}_share": part / flow.bytes for name, part in moved.items()}}  # fmt: skip
        return Reading(values, {"bytes": "B", "fused_bytes": "B", "seconds": "s", "fused_seconds": "s"}, tuple(rows))


def dataflow(graph: Graph, step: Step, scores: bool = True) -> Dataflow:
    """The operators and tensors of a graph's forward ops at a step; attention with its scores written if `scores`."""
    sizes: dict[str, float] = {}
    latest: dict[str, str] = {}
    operators: list[Operator] = []
    for index, op in enumerate(one for one in graph.forward if one.runs(step)):
        dims, width = op.sized(step), op.act.bits / 8
        out = f"{op.name}#{index}"
        sizes[out] = float(op.spec.writes(dims)) * width
        expected, cached = (float(one(dims)) * width for one in (op.spec.reads, op.spec.cache_reads))
        reads = tuple(latest.get(name, f"{name}<{index}") for name in op.inputs) or (f"input<{index}",)
        if not cached and not math.isclose(sum(sizes.get(tensor, 0.0) for tensor in reads), expected):
            reads = tuple(f"{tensor}<{index}" for tensor in reads)  # written outside of the graph, or by another repeat
        sizes.update({tensor: expected / len(reads) for tensor in reads if tensor not in sizes})
        if step.serves and cached:  # keys and values of earlier tokens are read as well
            kept = cached * (op.cache or op.act).bits / op.act.bits / 2
            sizes.update({f"{out}.keys": kept, f"{out}.held": kept})
            reads = (reads[0], f"{out}.keys", f"{out}.held")
        latest[op.name] = out
        operators += _operators(op, reads, out, sizes, dims, scores)
    return Dataflow(tuple(operators), sizes)


def _operators(op: Op, reads: tuple[str, ...], out: str, sizes: dict[str, float], dims: dict[str, Any],
               scores: bool) -> Iterable[Operator]:  # fmt: skip
    """An op as kernels of their own, in order; sizes of the tensors between them are put into `sizes`."""

    def tensor(name: str, size: float) -> str:
        sizes[f"{out}.{name}"] = size
        return f"{out}.{name}"

    def one(name: str, kind: str, reads: tuple[str, ...], write: str, *saves: str, reduces: str = "") -> Operator:
        return Operator(op.name + name, kind, reads, (write,), saves, reduces, op.repeat)

    width = op.act.bits / 8
    if op.kind == "attention" and scores:
        table = dims["pairs"] * dims["heads"] * width
        raw, scaled, weights = (tensor(name, table) for name in ("scores", "scaled", "weights"))
        yield one(".scores", "contraction", reads[:-1] or reads, raw)
        yield one(".scale", "map", (raw,), scaled)
        yield one(".softmax", "softmax", (scaled,), weights, weights, reduces="width")
        yield one(".values", "contraction", (weights, reads[-1]), out)
    elif op.kind in ("norm", "elementwise"):
        steps = (*(tensor(str(k), sizes[out]) for k in range(op.kernels - 1)), out)
        for k, write in enumerate(steps):
            kind = "norm" if op.kind == "norm" and not k else "add" if dims["flop_per_element"] < len(reads) else "map"
            yield one(f".{k}" * (len(steps) > 1), kind, reads, write, *reads, reduces="width" * (kind == "norm"))
            reads = (write,)
    else:
        weight = tensor("weight", op.stored_bytes * float(op.spec.touched(dims)))
        yield one("", "contraction", (*reads, weight), out)  # its library adds a bias before it writes
