"""What the data-movement recipe claims: a count on BERT's layer, its fused plan run as compiled kernels, layouts timed here."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from statistics import median
from time import thread_time
from typing import TYPE_CHECKING, Any

import numpy as np

from narrows.experiments.steady import one_thread
from narrows.techniques.profiling_cost_models.data_movement_is_all_you_need import (
    Dataflow,
    DataMovement,
    Operator,
    path_seconds,
)

if TYPE_CHECKING:
    import torch

    Values = dict[str, torch.Tensor]

Costs = Sequence[Mapping[tuple[str, str], float]]
_BATCH, _TOKENS, _WIDTH, _HEADS, _HIDDEN = 8, 256, 512, 4, 2048
_DROPPED = 0.1
_ROUNDS = 5
_CHAINS = 50


def encoder(batch: int, tokens: int, width: int, heads: int, hidden: int, number_bytes: float) -> Dataflow:
    """The forward operators of BERT's encoder layer, each a kernel of its own; a mask takes a byte a number."""
    operators: list[Operator] = []
    thin, wide, table = batch * tokens * width, batch * tokens * hidden, batch * heads * tokens**2
    square, tall = width**2, width * hidden
    sizes = {"x": thin, "wqkv": 3 * square, "wo": square, "w1": tall, "w2": tall}

    def add(name: str, kind: str, reads: str, writes: str, size: int, saves: str = "", reduces: str = "") -> None:
        operators.append(Operator(name, kind, tuple(reads.split()), tuple(writes.split()), tuple(saves.split()), reduces))
        sizes.update(dict.fromkeys(writes.split(), size))

    def tail(at: str, read: str, residual: str, size: int = thin) -> None:
        """Bias, dropout, residual and norm, as they follow both sublayers."""
        add(f"bias_{at}", "bias", read, f"{at}1", size)
        add(f"drop_{at}", "map", f"{at}1", f"{at}2 {at}_mask", size, f"{at}_mask")
        add(f"add_{at}", "add", f"{at}2 {residual}", f"{at}3", size)
        add(f"norm_{at}", "norm", f"{at}3", f"{at}4", size, f"{at}3", "width")

    add("qkv", "contraction", "x wqkv", "v0 k0 q0", thin)
    for part in "vkq":
        add(f"bias_{part}", "bias", f"{part}0", part, thin)
    add("scale", "map", "q", "scaled", thin)
    add("scores", "contraction", "scaled k", "s", table)
    add("softmax", "softmax", "s", "a", table, "a", "width")
    add("drop_a", "map", "a", "a1 a_mask", table, "a_mask")
    add("values", "contraction", "a1 v", "g", thin)
    add("out", "contraction", "g wo", "o0", thin)
    tail("o", "o0", "x")
    add("lin1", "contraction", "o4 w1", "h0", wide)
    add("bias_h", "bias", "h0", "h1", wide)
    add("relu", "map", "h1", "h2", wide, "h1")
    add("drop_h", "map", "h2", "h h_mask", wide, "h_mask")
    add("lin2", "contraction", "h w2", "z0", thin)
    tail("z", "z0", "o4")
    return Dataflow(tuple(operators), {t: n * (1 if t.endswith("_mask") else number_bytes) for t, n in sizes.items()})


def less_movement(technique: DataMovement) -> float:
    """The fraction of BERT-large's layer bytes that its plan saves in a training step."""
    flow = encoder(8, 512, 1024, 16, 4096, number_bytes=2).training()
    return 1 - technique.plan(flow).bytes / flow.bytes


def same_results(technique: DataMovement) -> float:
    """The largest relative difference of output and gradients to plain autograd, of the plan run as compiled kernels."""
    flow = _small()
    if technique.plan(flow) == flow:
        return math.nan
    with one_thread():
        found = dict(_inputs())
        for operator, kernel in _kernels(technique):
            found.update(kernel(_given(operator, found)))
        expected = _autograd(found)
    assert len(expected) == 14, sorted(expected)  # the output and the gradients of 5 tensors and 8 vectors
    del expected["bias_k dW"]  # zero but for rounding: softmax does not see a shift of all scores of a query
    errors = [(found[name] - tensor).norm() / tensor.norm() for name, tensor in expected.items()]
    return float(max(errors))


def speedup(technique: DataMovement) -> float:
    """Seconds of the kernels between contractions, each operator on its own, over those of the technique's plan."""
    with one_thread():
        apart, planned = _between(DataMovement(fuse=False)), _between(technique)
        times = [(apart(), planned()) for _ in range(_ROUNDS)]
    return median(before / after for before, after in times)


def _small() -> Dataflow:
    return encoder(_BATCH, _TOKENS, _WIDTH, _HEADS, _HIDDEN, number_bytes=4).training()


@cache
def _inputs() -> "Values":
    """The layer's input, weights, and the gradient of its output."""
    import torch

    made = torch.Generator().manual_seed(0)
    shapes = {"x": (_BATCH, _TOKENS, _WIDTH), "d:z4": (_BATCH, _TOKENS, _WIDTH), "wqkv": (_WIDTH, 3 * _WIDTH),
              "wo": (_WIDTH, _WIDTH), "w1": (_WIDTH, _HIDDEN), "w2": (_HIDDEN, _WIDTH)}  # fmt: skip
    scale = {name: 1.0 if len(shape) == 3 else shape[0] ** -0.5 for name, shape in shapes.items()}
    return {name: torch.randn(shape, generator=made) * scale[name] for name, shape in shapes.items()}


@cache
def _parameters() -> "Values":
    """Biases and norm weights by operator, and the random numbers that dropouts decide by."""
    import torch

    made = torch.Generator().manual_seed(1)
    wide = {"bias_h": _HIDDEN}
    small = {name: torch.randn(wide.get(name, _WIDTH), generator=made)
             for name in ("bias_v", "bias_k", "bias_q", "bias_o", "bias_h", "bias_z", "norm_o", "norm_z")}  # fmt: skip
    shapes = {"drop_a": (_BATCH, _HEADS, _TOKENS, _TOKENS), "drop_o": (_BATCH, _TOKENS, _WIDTH),
              "drop_h": (_BATCH, _TOKENS, _HIDDEN), "drop_z": (_BATCH, _TOKENS, _WIDTH)}  # fmt: skip
    noise = {name: torch.rand(shape, generator=made) for name, shape in shapes.items()}
    return {**small, **noise}


Kernel = Callable[["Values"], "Values"]


@cache
def _kernels(technique: DataMovement) -> tuple[tuple[Operator, Kernel], ...]:
    """Each operator of the plan with what runs it: one compiled kernel; contractions are the library's."""
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    flow = _small()
    alone = {one.name: one for one in flow.operators}
    found, kernels = dict(_inputs()), list[tuple[Operator, Kernel]]()
    for group in technique.plan(flow).operators:
        kernel: Kernel = _run([alone[name] for name in group.name.split(" + ")], group.writes)
        given = _given(group, found)
        if group.kind != "contraction":
            kernel = torch.compile(make_fx(kernel)(given), dynamic=False)
        found.update(kernel(given))
        kernels.append((group, kernel))
    return tuple(kernels)


def _base(name: str) -> str:
    return name.partition(" ")[0]


def _given(group: Operator, found: "Values") -> "Values":
    """What a kernel reads: its tensors, and the parameters and random numbers of its members."""
    own = {_base(name) for name in group.name.split(" + ")} & set(_parameters())
    return {name: found[name] for name in group.reads} | {name: _parameters()[name] for name in sorted(own)}


def _run(members: list[Operator], writes: tuple[str, ...]) -> Kernel:
    """A function that runs operators after one another, and gives what they write and the gradients of parameters."""

    def run(values: "Values") -> "Values":
        inside = dict(values)
        for one in members:
            results = _operate(one, [inside[name] for name in one.reads], inside.get(_base(one.name)))
            inside.update(zip(one.writes or (one.name,), results, strict=True))
        return {name: inside[name] for name in (*writes, *(one.name for one in members if not one.writes))}

    return run


def _between(technique: DataMovement) -> Callable[[], float]:
    """A function that runs the plan once, and gives the processor seconds of all its kernels but the contractions."""
    kernels = _kernels(technique)

    def run() -> float:
        found, seconds = dict(_inputs()), 0.0
        for operator, kernel in kernels:
            given = _given(operator, found)
            start = thread_time()
            found.update(kernel(given))
            seconds += (thread_time() - start) * (operator.kind != "contraction")
        return seconds

    run()
    return run


def _heads(x: "torch.Tensor") -> "torch.Tensor":
    return x.view(_BATCH, _TOKENS, _HEADS, -1).transpose(1, 2)


def _joined(x: "torch.Tensor") -> "torch.Tensor":
    return x.transpose(1, 2).reshape(_BATCH, _TOKENS, _WIDTH)


def _operate(one: Operator, given: "list[torch.Tensor]", own: Any) -> "tuple[torch.Tensor, ...]":
    """One operator on the tensors that it reads and its own parameter: forward, a tensor's gradient, or the parameter's (dW)."""
    name, _, wrt = one.name.partition(" ")
    kind = name.partition("_")[0]
    if wrt:
        return _gradient(kind, wrt, given, own)
    if kind == "drop":
        mask = (own >= _DROPPED) / (1 - _DROPPED)  # as numbers: the compiler does not vectorize stores of bool
        return given[0] * mask, mask
    forward: Mapping[str, Callable[..., Any]] = {
        "qkv": lambda x, w: (x @ w).chunk(3, -1),
        "bias": lambda x: (x + own,),
        "scale": lambda q: (q * (_HEADS / _WIDTH) ** 0.5,),
        "scores": lambda q, k: (_heads(q) @ _heads(k).mT,),
        "softmax": lambda s: (s.softmax(-1),),
        "values": lambda a, v: (_joined(a @ _heads(v)),),
        "relu": lambda x: (x.relu(),),
        "add": lambda a, b: (a + b,),
        "norm": lambda x: (own * _standard(x)[0],),
    }
    return tuple(forward[kind](*given)) if kind in forward else (given[0] @ given[1],)


def _standard(x: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """A row less its mean over its standard deviation, and one over that deviation."""
    variance, mean = x.var(-1, correction=0, keepdim=True), x.mean(-1, keepdim=True)
    scale = (variance + 1e-5).rsqrt()
    return (x - mean) * scale, scale


def _gradient(kind: str, wrt: str, given: "list[torch.Tensor]", own: Any) -> "tuple[torch.Tensor, ...]":
    import torch

    dy, other = given[0], given[-1]
    if kind == "sum":
        return (dy + other,)
    if wrt == "dW":
        products = dy * _standard(other)[0] if kind == "norm" else dy
        return (products.flatten(0, -2).sum(0),)
    if kind == "norm":
        unit, scale = _standard(other)
        scaled = dy * own
        return (scale * (scaled - scaled.mean(-1, keepdim=True) - unit * (scaled * unit).mean(-1, keepdim=True)),)
    if kind == "qkv":
        dy = torch.cat(given[:3], -1)
    rules: Mapping[str, Callable[[], Any]] = {
        "scale": lambda: dy * (_HEADS / _WIDTH) ** 0.5,
        "softmax": lambda: other * (dy - (dy * other).sum(-1, keepdim=True)),
        "drop": lambda: dy * other,
        "relu": lambda: dy * (other > 0),
        "scores": lambda: _joined((dy if wrt == "dscaled" else dy.mT) @ _heads(other)),
        "values": lambda: _heads(dy) @ _heads(other).mT if wrt == "da1" else _joined(other.mT @ _heads(dy)),
    }
    if kind in rules:
        return (rules[kind](),)
    return (other.flatten(0, 1).T @ dy.flatten(0, 1) if wrt.startswith("dw") else dy @ other.T,)


def _autograd(run: "Values") -> "Values":
    """Output and all gradients of the same layer by plain autograd, with the masks of a run; by the names of the run."""
    import torch

    own = {name: tensor.clone().requires_grad_() for name, tensor in _inputs().items() if name != "d:z4"}
    small = {name: tensor.clone().requires_grad_() for name, tensor in _parameters().items() if not name.startswith("drop")}

    def drop(x: "torch.Tensor", at: str) -> "torch.Tensor":
        return x * run[f"{at}_mask"]

    def norm(x: "torch.Tensor", at: str) -> "torch.Tensor":
        return torch.nn.functional.layer_norm(x, (_WIDTH,), small[f"norm_{at}"])

    v, k, q = (part + small[f"bias_{at}"] for part, at in zip((own["x"] @ own["wqkv"]).chunk(3, -1), "vkq", strict=True))
    weights = (_heads(q) @ _heads(k).mT * (_HEADS / _WIDTH) ** 0.5).softmax(-1)
    attended = _joined(drop(weights, "a") @ _heads(v)) @ own["wo"] + small["bias_o"]
    middle = norm(drop(attended, "o") + own["x"], "o")
    hidden = drop((middle @ own["w1"] + small["bias_h"]).relu(), "h")
    out = norm(drop(hidden @ own["w2"] + small["bias_z"], "z") + middle, "z")
    out.backward(_inputs()["d:z4"])
    gradients = {f"d:{name}": tensor.grad for name, tensor in own.items()} | {
        f"{name} dW": tensor.grad for name, tensor in small.items()
    }
    return {"z4": out.detach(), **{name: tensor for name, tensor in gradients.items() if tensor is not None}}


def layouts_over_brute_force(technique: DataMovement) -> float:
    """Seconds of the path it chooses over those of the quickest of all paths: the worst over measured and random chains."""
    random = np.random.default_rng(0)
    pairs = [(read, written) for read in "abc" for written in "abc"]
    chains: list[Costs] = [[dict(zip(pairs, random.lognormal(size=9), strict=True)) for _ in range(5)] for _ in range(_CHAINS)]
    return max(_over_best(technique, chain) for chain in (_layout_costs(), *chains))


def _over_best(technique: DataMovement, costs: Costs) -> float:
    path, _ = technique.layouts(costs)
    known = [sorted({pair[0] for pair in table}) for table in costs] + [sorted({pair[1] for pair in costs[-1]})]
    return path_seconds(costs, path) / min(path_seconds(costs, one) for one in itertools.product(*known))


@cache
def _layout_costs() -> tuple[dict[tuple[str, str], float], ...]:
    """Processor seconds of a chain of products by the order in memory of what each reads and writes: rows or columns first."""
    import torch

    made, chain = torch.Generator().manual_seed(0), ((256, 256), (256, 1024), (1024, 256), (256, 64))
    costs = []
    with one_thread():
        for inputs, outputs in chain:
            rows, weight = torch.randn(1024, inputs, generator=made), torch.randn(inputs, outputs, generator=made)
            read = {"rows": rows, "columns": rows.T.contiguous().T}
            written = {"rows": torch.empty(1024, outputs), "columns": torch.empty(outputs, 1024).T}
            table: dict[tuple[str, str], list[float]] = {pair: [] for pair in itertools.product(read, written)}
            for _ in range(_ROUNDS):
                for (before, after), times in table.items():
                    start = thread_time()
                    written[after].copy_((read[before] @ weight).relu_())
                    times.append(thread_time() - start)
            costs.append({pair: min(times) for pair, times in table.items()})
    return tuple(costs)
