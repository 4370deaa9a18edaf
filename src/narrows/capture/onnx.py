"""Capture of an ONNX file, without torch: its nodes become ops, its named dims the fields of a Step.

Parameters are the stored float tensors of more than one element, and the integer tensors that stand for them in
quantized products. Not parameters: scalars, integers that shape, index or mask, scales and zero points, running
means and variances of a BatchNormalization, rotary tables (`inv_freq`, `cos_cache`, ...). What several nodes share
is counted once: exporters store equal tensors as one. What follows from sizes and constants alone (shapes, masks,
positions) is no op, and neither are views and transpositions.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from narrows.capture.generalize import generalize
from narrows.capture.onnx_attention import Block, Layout, find_blocks, fused_sizes
from narrows.capture.onnx_file import MICROSOFT, File, Node, Tensor, damaged, need, read, turned
from narrows.capture.onnx_runs import Run
from narrows.capture.onnx_shapes import fold, input_tensors, results
from narrows.errors import NarrowsError
from narrows.graph import DTYPES, Dim, DType, Graph, Op, Size
from narrows.step import Step

# (batch, tokens, past, source): three terms of a size and a check, in primes, which no width of a model equals
_PROBES = ((2, 11, 8, 13), (3, 17, 20, 31), (5, 29, 12, 19), (7, 23, 24, 43))
MASKED = "Attention that the file does not mark as causal is counted in full, as it executes, masked or not."

_REFUSED = {"LSTM", "GRU", "RNN", "DeformConv", "DFT", "STFT", "Det", "MelWeightMatrix", "ImageDecoder"}
_VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Transpose", "Expand", "Slice", "Split", "Dropout"}
_SETTINGS = {"Resize", "Upsample", "Pad", "OneHot", "Clip", "QuantizeLinear", "DequantizeLinear"}  # read no parameters
_TABLE = re.compile(r"(^|[._/])(inv_freq|(cos|sin)(_cached?)?)$")

Inputs = Sequence[Tensor | None]


def from_onnx(path: str | Path, name: str = "", *, dims: Mapping[str, int | str] | None = None) -> Graph:
    """The graph of an ONNX file (opset 13 or newer), folded over its layers.

    Dims named like batch, sequence, past_sequence or encoder_sequence follow the Step; `dims` gives the others a
    number, or says which of these they are: `{"height": 224, "s0": "sequence"}`. Weights beside the file are not
    opened. Raises NarrowsError for a damaged file, an unknown size, control flow, and operators not described here.
    """
    file = read(path)
    try:
        inputs, roles = input_tensors(file, dims or {})
        layout = find_blocks(file)

        def build(step: Step) -> Graph:
            return _Walk(file, layout, inputs(step), step if roles else None).graph(name or Path(path).stem)

        steps = [Step(b, t, p * bool(roles & {"past", "total"}), s * ("source" in roles)) for b, t, p, s in _PROBES]
        return (generalize(build, steps) if roles else build(steps[0])).fold()
    except NarrowsError as error:
        raise error.inside(file.path) from error


class _Walk:
    """One pass over the nodes, at one step (None where no size follows the step)."""

    def __init__(self, file: File, layout: Layout, inputs: Mapping[str, Tensor], step: Step | None) -> None:
        constants = {n: replace(t, fixed=True, origin="") if _TABLE.search(n) else t for n, t in file.constants.items()}
        self.file, self.layout, self.step = file, layout, step
        self.tensors: dict[str, Tensor] = {**inputs, **constants}
        self.ops: list[Op] = []
        self.run: Run | None = None
        self.done: set[int] = set()  # nodes that an earlier one's op includes
        self.notes: dict[str, None] = {}
        self.left: dict[str, int] = {}  # elements of each parameter that no op owns yet
        self.owner: dict[str, str] = {}
        self.taken: Counter[str] = Counter()
        self.renamed: dict[str, str] = {}

    def graph(self, name: str) -> Graph:
        for node in self.file.nodes:
            try:
                self.visit(node)
            except NarrowsError as error:
                raise error if error.where else error.inside(node.name) from error
            except (LookupError, ValueError, TypeError, ArithmeticError) as error:  # hostile ranks and attributes
                raise damaged(f"{node.op} does not fit its inputs.", node.name) from error
        self.flush()
        if not self.ops:
            raise damaged("nothing in it depends on its inputs.", "graph")
        new = self.renamed
        ops = [replace(op, inputs=tuple(new.get(i, i) for i in op.inputs), tied=new.get(op.tied, op.tied)) for op in self.ops]
        return Graph(name, tuple(ops), "onnx", tuple(self.notes))

    def visit(self, node: Node) -> None:
        """Find what the node's outputs are, and emit what it costs."""
        for name in node.inputs:
            if name and name not in self.tensors:
                raise damaged(f"it reads {name!r}, which nothing before it makes.", node.name)
        if node.op in _REFUSED:
            raise NarrowsError(f"{node.op} is not described.", where=node.name, remedy="Export it as standard operators.")
        ins = [self.tensors[n] if n else None for n in node.inputs]
        given = [t for t in ins if t is not None]
        outs = results(self.file, node, ins)
        makers = tuple(dict.fromkeys(m for t in given for m in t.makers))
        parameters = [t for t in given if t.is_parameter]
        if node.op == "DequantizeLinear" and given[0].fixed and given[0].origin:
            outs = [replace(outs[0], origin=given[0].origin, stored=_scaled(node, *given))]
        elif node.op in ("Shape", "Size") or all(t.fixed for t in given):
            outs = [replace(t, value=None if i else fold(node, ins, t), fixed=True) for i, t in enumerate(outs)]
        elif {id(node)} & (self.layout.inside | self.done) or (node.op in _VIEWS and not parameters):
            outs = [replace(t, makers=makers) for t in outs]
        elif all(t.origin == parameters[0].origin if t.is_parameter else t.fixed for t in given) and not _is_lookup(node, given):
            # what is computed from one parameter alone is still that parameter
            outs = [replace(t, origin=parameters[0].origin, stored=parameters[0].stored) for t in outs]
        else:
            maker = _HANDLERS.get(node.op, _Walk.pointwise)(self, node, ins, outs[0])
            outs = [replace(t, makers=(maker,) if maker else makers) for t in outs]
        self.tensors.update((n, t) for n, t in zip(node.outputs, outs, strict=True) if n)

    # --- names, parameters, ops

    def layer(self, node: Node, weight: Tensor | None = None) -> str:
        """The module path of a node: by the name of the weight it owns, by its own name, or else its operator."""
        if weight is not None and weight.origin.endswith(".weight") and weight.origin not in self.owner:
            return weight.origin.removesuffix(".weight")
        return node.module or node.proto.name or node.op

    def owns(self, parameter: Tensor, count: int, of: int = 0) -> bool:
        """Whether `count` elements of a parameter (with `of` in all, if packed) were nobody's; they are now the caller's."""
        left = self.left.setdefault(parameter.origin, of or self.file.constants[parameter.origin].numel)
        if left < count:
            return False
        self.left[parameter.origin] = left - count
        return True

    def flush(self) -> None:
        """Emit the pending run."""
        run, self.run = self.run, None
        if run is not None and run.size:
            op = run.op()
            if op.name != run.name:
                self.renamed[run.name] = self.unique(op.name)
            self.ops.append(replace(op, name=self.renamed.get(run.name, run.name)))

    def unique(self, name: str) -> str:
        self.taken[name] += 1
        return name if self.taken[name] == 1 else f"{name}_{self.taken[name] - 1}"

    def emit(self, name: str, kind: str, dims: Mapping[str, Dim], ins: Inputs, act: DType, **more: object) -> str:
        """Append an op that reads `ins`; its name."""
        self.flush()
        name = self.unique(name)
        makers = tuple(dict.fromkeys(m for t in ins if t is not None for m in t.makers))
        whole = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in dims.items()}
        self.ops.append(replace(Op(name, kind, whole, act, inputs=makers), **more))  # type: ignore[arg-type]
        return name

    def weighted(
        self, node: Node, kind: str, dims: Mapping[str, Dim], x: Tensor, weight: Tensor, owned: bool, compute: str = ""
    ) -> str:
        """An op that reads a parameter; tied to its owner if that is another op."""
        tied = "" if owned else self.owner.get(weight.origin, weight.origin)
        name = self.emit(self.layer(node, weight), kind, dims, [x], x.dtype, weight=weight.stored, tied=tied, compute=compute)
        self.owner.setdefault(weight.origin, name)
        return name

    # --- handlers: emit what a node costs and give the name of its op

    def pointwise(self, node: Node, ins: Inputs, out: Tensor) -> str:
        """Add a node to the pending run, or begin one."""
        data = {n: t for n, t in zip(node.inputs, ins, strict=True) if t is not None and not t.fixed and not t.origin}
        size = out.numel if node.op.startswith("Gather") else max(t.numel for t in (*data.values(), out))
        run = self.run
        if run is None or not run.takes(node, data, size):
            self.flush()
            run = self.run = Run(self.unique(_path(node)), node.module, size, out.dtype)
        run.add(node, data, out, size)
        for tensor in (t for t in ins if t is not None and t.is_parameter and node.op not in _SETTINGS):
            run.uses += tensor.numel
            count = min(tensor.numel, self.file.constants[tensor.origin].numel)  # it may be spread over a batch
            run.weights += count if self.owns(tensor, count) else 0
            run.stored = tensor.stored
            self.owner.setdefault(tensor.origin, run.name)
        return run.name

    def product(self, node: Node, ins: Inputs, out: Tensor) -> str:
        """Matrix products: an attention at the end of its block, a linear if one side is a parameter, else a matmul."""
        if id(node) in self.layout.ends:
            return self.attention(node, self.layout.ends[id(node)])
        first, second = (0, 3) if node.op == "QLinearMatMul" else (0, 1)
        a, b = need(node, ins, first), need(node, ins, second)
        left, right = turned(a, node.number("transA")), turned(b, node.number("transB"))
        compute = "int8" if "Integer" in node.op or "QLinear" in node.op or "Quantize" in node.op else ""
        bias = ins[2] if node.op == "Gemm" and len(ins) > 2 else None
        return self.multiply(node, (a, left), (b, right), out, bias, compute)

    def multiply(self, node: Node, one: tuple[Tensor, tuple[int, ...]], two: tuple[Tensor, tuple[int, ...]], out: Tensor,
                 bias: Tensor | None = None, compute: str = "") -> str:  # fmt: skip
        """`one` @ `two`, each a tensor and the shape that it has in the product."""
        (a, left), (b, right) = one, two
        if not b.origin and a.origin:  # W x is x' W' with as much work
            a, b, left, right = b, a, right[::-1], (*left[:-2], *left[:-3:-1])
        inputs, outputs = left[-1] if not b.origin or len(right) < 2 else right[-2], right[-1] if len(right) > 1 else 1
        if not inputs * outputs * out.numel:
            return ""
        matrices = math.prod(right) // (inputs * outputs)
        if b.origin:
            return self.linear(node, a, b, (out.numel // outputs, inputs, outputs, matrices), bias, compute)
        dims = {"rows": out.numel // outputs, "inputs": inputs, "outputs": outputs, "matrices": matrices}
        return self.emit(_path(node), "matmul", dims, [a, b], a.dtype, compute=compute)

    def linear(
        self, node: Node, x: Tensor, weight: Tensor, sizes: tuple[int, ...], bias: Tensor | None = None, compute: str = ""
    ) -> str:
        """Rows times a parameter of matrices x inputs x outputs; the bias may be the only use of the result, as an Add."""
        rows, inputs, outputs, matrices = sizes
        count = inputs * outputs * matrices
        owned = self.owns(weight, count, count if weight.fixed else 0)  # packed integers are fewer than their numbers
        uses = self.layout.users.get(node.outputs[0], [])
        if bias is None and owned and len(uses) == 1 and uses[0].op == "Add":
            bias = next((self.tensors.get(n) for n in uses[0].inputs if n != node.outputs[0]), None)
            if bias is not None and bias.is_parameter and bias.numel == bias.shape[-1] == outputs:
                self.done.add(id(uses[0]))
            else:
                bias = None
        biased = owned and bias is not None and bias.is_parameter and self.owns(bias, outputs)
        dims = {"rows": rows, "inputs": inputs, "outputs": outputs, "bias": int(biased), "matrices": matrices}
        return self.weighted(node, "linear", dims, x, weight, owned, compute)

    def packed(self, node: Node, ins: Inputs, out: Tensor) -> str:
        """MatMulNBits: integers of a few bits, a scale and maybe a zero point for each block of inputs."""
        x, weight, scales = (need(node, ins, i) for i in range(3))
        inputs, outputs, bits = node.number("K"), node.number("N"), node.number("bits", 4)
        fits = min(inputs, outputs, bits) > 0 and x.shape[-1:] == (inputs,) and weight.numel * 8 >= inputs * outputs * bits
        if not fits or not weight.origin:
            raise damaged("K, N and bits do not fit its inputs.", node.name)
        zero = bits if len(ins) > 3 and ins[3] is not None else 0
        stored = DType(f"int{bits}", bits, node.number("block_size", 32), int(scales.dtype.bits), zero)
        sizes = (x.numel // inputs, inputs, outputs, 1)
        return self.linear(node, x, replace(weight, stored=stored), sizes, ins[5] if len(ins) > 5 else None)

    def einsum(self, node: Node, ins: Inputs, out: Tensor) -> str:
        raw = node.attrs.get("equation", b"")
        text = raw.decode("latin-1").replace(" ", "") if isinstance(raw, bytes) else ""
        terms = re.fullmatch(r"([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]*)", text)
        if terms is None:
            raise NarrowsError("only an einsum of two operands is described.", where=node.name, remedy="Export it as MatMul.")
        a, b = need(node, ins, 0), need(node, ins, 1)
        size = {**dict(zip(terms[1], a.shape, strict=True)), **dict(zip(terms[2], b.shape, strict=True))}
        one, two, made = (set(t) for t in terms.groups())
        groups = (one & two & made, one - two, one & two - made, two - one)
        batch, rows, inner, outputs = (math.prod(size[c] for c in letters) for letters in groups)
        return self.multiply(node, (a, (batch, rows, inner)), (b, (batch, inner, outputs)), out)

    def conv(self, node: Node, ins: Inputs, out: Tensor) -> str:
        first, second, third = (0, 3, 8) if node.op == "QLinearConv" else (0, 1, 99 if node.op == "ConvInteger" else 2)
        x, weight = need(node, ins, first), need(node, ins, second)
        if not weight.origin:
            raise NarrowsError("its kernel is computed, not stored.", where=node.name, remedy="Fold its constants.")
        channels, made, transposed = x.shape[1], out.shape[1], node.op == "ConvTranspose"
        places, sources = out.numel // made, x.numel // channels
        owned, bias = self.owns(weight, weight.numel), ins[third] if third < len(ins) else None
        biased = owned and bias is not None and bool(bias.origin) and self.owns(bias, made)
        # a transposed convolution multiplies at each place of its input, and writes all of its output
        positions, kernel = sources if transposed else places, math.prod(weight.shape[2:])
        dims = {"positions": positions, "in_positions": sources, "in_channels": channels, "out_channels": made, "kernel": kernel,
                "groups": node.number("group", 1), "bias": int(biased)}  # fmt: skip
        compute = "int8" if node.op in ("QLinearConv", "ConvInteger") else ""
        name = self.weighted(node, "conv", dims, x, weight, owned, compute)
        if transposed and places > sources:
            written: dict[str, Dim] = {"elements": (places - sources) * made, "reads": 0, "flop_per_element": 0}
            self.emit(f"{name}.places", "elementwise", written, [Tensor((), 1, makers=(name,))], x.dtype, kernels=0)
        return name

    def attention(self, node: Node, block: Block) -> str:
        """Attention written out as products: its heads are the batch axes of the scores after the first."""
        query, keys, values, scores = (self.tensors[n] for n in (block.query, block.keys, block.values, block.scores))
        matrices, length = math.prod(scores.shape[:-2]), scores.shape[-1]
        first = scores.shape[0] if len(scores.shape) > 3 else int(self.step.batch[0]) if self.step else 1
        heads = matrices // first if matrices % first == 0 else 1
        share, cached = self.kept(block.keys)
        self.notes[MASKED] = None
        pairs, context, kv_heads = scores.numel // heads, matrices * length // heads, heads * share
        widths = {"head_dim": query.shape[-1], "value_dim": values.shape[-1]}
        dims: dict[str, Dim] = {"heads": heads, "kv_heads": kv_heads, **widths, "queries": pairs // length,
                                "pairs": pairs, "context": context, "held": context * cached}  # fmt: skip
        cache = query.dtype if cached else None
        return self.emit(self.layer(node), "attention", dims, [query, keys, values], query.dtype, cache=cache)

    def kept(self, name: str) -> tuple[float, bool]:
        """The share of the keys that is stored (fewer heads are spread over all), and whether old keys come before new."""
        keys, source, reach = self.tensors[name], self.layout.makers.get(name), 16
        stored, cached = keys.numel, False
        while source is not None and reach:
            if source.op == "Concat":
                cached = any(n and n not in self.layout.makers and n not in self.file.constants for n in source.inputs)
            scaled = source.op in ("Mul", "Div") and all(self.tensors[n].fixed for n in source.inputs[1:])
            if not scaled and source.op not in _VIEWS - {"Slice", "Split"} | {"Cast"}:
                break
            stored, reach = min(stored, self.tensors[source.inputs[0]].numel), reach - 1
            source = self.layout.makers.get(source.inputs[0])
        return stored / keys.numel, cached

    def fused(self, node: Node, ins: Inputs, out: Tensor) -> str:
        """One operator for attention: the standard's, or onnxruntime's, which may hold the projection too."""
        f, x = fused_sizes(node, ins), need(node, ins, 0)
        reads: Inputs = ins
        share, cached = self.kept(node.inputs[1]) if len(ins) > 1 and ins[1] is not None else (1.0, False)
        if node.op == "Attention" and node.proto.domain == MICROSOFT:
            weight, bias = need(node, ins, 1), ins[2] if len(ins) > 2 else None
            if not weight.origin:
                raise NarrowsError("its projection is computed, not stored.", where=node.name, remedy="Fold its constants.")
            inputs, outputs = weight.shape
            qkv = replace(node, module=f"{self.layer(node)}.qkv")
            reads = [replace(x, makers=(self.linear(qkv, x, weight, (f.batch * f.queries, inputs, outputs, 1), bias),))]
        if not f.causal:
            self.notes[MASKED] = None
        total, before, cached = f.past + f.keys, f.queries * f.past, cached or f.cached
        pairs = before + f.queries * (f.queries + 1) // 2 if f.causal else f.queries * total
        widths = {"head_dim": f.head_dim, "value_dim": f.value_dim}
        dims: dict[str, Dim] = {"heads": f.heads, "kv_heads": f.kv_heads * share, **widths,
                                "queries": f.batch * f.queries, "pairs": f.batch * pairs, "context": f.batch * total,
                                "held": f.batch * total * cached}  # fmt: skip
        window = node.number("local_window_size", -1)
        if window > 0 and self.step is not None:
            dims |= {key: Size.of({f"{key}[window={window}]": 1}) for key in ("pairs", "context")}
        return self.emit(self.layer(node), "attention", dims, reads, x.dtype, cache=x.dtype if cached else None)

    def norm(self, node: Node, ins: Inputs, out: Tensor) -> str:
        x = need(node, ins, 0)
        channels = node.op in ("BatchNormalization", "InstanceNormalization", "GroupNormalization")
        width = x.shape[1] if channels else math.prod(x.shape[node.number("axis", -1) :])
        weights = [t for t in (ins[2:] if node.op.startswith("Skip") else ins[1:3]) if t is not None]
        owned = sum(t.numel for t in weights if t.is_parameter and self.owns(t, t.numel))
        dims: dict[str, Dim] = {"rows": x.numel // width, "width": width, "weights": owned / width}
        if weights and weights[0].is_parameter:
            return self.weighted(node, "norm", dims, x, weights[0], True)
        return self.emit(self.layer(node), "norm", dims, [x], x.dtype)

    def lookup(self, node: Node, ins: Inputs, out: Tensor) -> str:
        """A Gather: an embedding if it takes whole rows of a parameter."""
        table, rows, packed = need(node, ins, 0), need(node, ins, 1), node.op == "GatherBlockQuantized"
        if not packed and not _is_lookup(node, [table, rows]):
            return self.pointwise(node, ins, out)
        width = out.shape[-1]
        if packed:
            scales, base = need(node, ins, 2), DTYPES[f"int{node.number('bits', 4)}"]
            group, scale_bits = node.number("block_size", 128), int(scales.dtype.bits)
            table = replace(table, stored=replace(base, group=group, scale_bits=scale_bits))
        count = table.shape[0] * width
        owned = self.owns(table, count, count if packed else 0)
        dims = {"rows": rows.numel, "outputs": width, "vocabulary": table.shape[0]}
        return self.weighted(node, "embedding", dims, replace(rows, elem=out.elem), table, owned)


def _path(node: Node) -> str:
    return f"{node.module}.{node.op}" if node.module else node.proto.name or node.op


def _is_lookup(node: Node, given: Sequence[Tensor]) -> bool:
    """Whether it gathers whole rows of a parameter; one row at a fixed place is a view of it."""
    if node.op == "GatherBlockQuantized":
        return True
    rows = node.op == "Gather" and node.number("axis") == 0 and given[1].numel > 1
    return rows and given[0].is_parameter and len(given[0].shape) == 2


def _scaled(node: Node, weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> DType | None:
    """The dtype of stored integers with a scale for each row or group of inputs; one scale for all does not count."""
    if weight.stored is None or scale.numel <= 1:
        return weight.stored
    group = node.number("block_size") if len(scale.shape) == len(weight.shape) else 0
    zero_bits = 0 if zero is None else int(weight.stored.bits)
    return replace(weight.stored, group=group, scale_bits=int(scale.dtype.bits), zero_bits=zero_bits)


_Handler = Callable[[_Walk, Node, Inputs, Tensor], str]
_BY_HANDLER: dict[_Handler, str] = {
    _Walk.product: "MatMul Gemm FusedMatMul MatMulInteger MatMulIntegerToFloat DynamicQuantizeMatMul QLinearMatMul",
    _Walk.conv: "Conv ConvTranspose FusedConv QLinearConv ConvInteger",
    _Walk.norm: "BatchNormalization LayerNormalization RMSNormalization InstanceNormalization GroupNormalization "
    "SimplifiedLayerNormalization SkipLayerNormalization SkipSimplifiedLayerNormalization",
    _Walk.fused: "Attention MultiHeadAttention GroupQueryAttention",
    _Walk.lookup: "Gather GatherBlockQuantized",
    _Walk.packed: "MatMulNBits",
    _Walk.einsum: "Einsum",
}
_HANDLERS = {op: handler for handler, ops in _BY_HANDLER.items() for op in ops.split()}
