"""Watches a module run on the meta device and writes down what it did, operator by operator, as `Event`s."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from narrows.capture import aten
from narrows.capture.events import Basis, Event, View, dtype_of, is_made_of_tensors, storage_of, tensors_in, view_of
from narrows.graph import Op
from narrows.step import Step

# For operators of one's own, by full name ('narrows::packed_linear'): the fields of the Op from (args, kwargs, result).
CUSTOM: dict[str, Callable[[Any, Any, Any], dict[str, Any]]] = {}


class Tracer(TorchDispatchMode):  # type: ignore[misc]
    """Records events while it is entered; `paused` work leaves no trace but still runs.

    After a run: `events`, `saved` (bytes that autograd keeps, by storage), `backward` (of each event with a gradient,
    the FLOP of its products in the backward pass).
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root
        self.paths = {id(m): name for name, m in root.named_modules()}
        self.params = {storage_of(p): name for name, p in root.named_parameters() if not is_made_of_tensors(p)}
        self.formats = {name: dtype_of(p) for name, p in root.named_parameters()}
        self.events: list[Event] = []
        self.saved: dict[int, float] = {}
        self.backward: dict[int, float] = {}
        self.described: set[str] = set()  # modules that gave their own op
        self.failed_in: str | None = None
        self.caching = False  # the step keeps keys and values
        self.causal = False  # some attention was counted so
        self._stack: list[tuple[str, nn.Module]] = []
        self._paused = 0
        self._producer: dict[int, int] = {}  # storage: last event that wrote it
        self._alias: dict[int, tuple[int, ...]] = {}  # storage: others that it stands for
        self._node: dict[int, int] = {}  # autograd sequence number: event
        self._keep: list[Any] = []  # storages live as long as the trace, so that their keys stay theirs
        self._schemas: dict[Any, tuple[str, tuple[int, ...]]] = {}

    # entering and leaving modules

    @contextmanager
    def watch_modules(self) -> Iterator[None]:
        """Follow which module runs, by its path, for as long as the context lasts."""
        original = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            path = self.paths.get(id(module))
            if path is None:
                path = f"{self.path}.{type(module).__name__}".lstrip(".")
            self._stack.append((path, module))
            done = False
            try:
                out = self._described(module, path, original, args, kwargs)
                done = True
                return out
            finally:
                if not done and self.failed_in is None:
                    self.failed_in = path or type(module).__name__
                self._stack.pop()

        nn.Module.__call__ = call
        try:
            yield
        finally:
            nn.Module.__call__ = original

    def _described(self, module: nn.Module, path: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a module; one that describes itself by `graph_op(name, rows, act)` gives its op and is not looked into."""
        describe = getattr(module, "graph_op", None)
        if describe is None or self._paused:
            return call(module, *args, **kwargs)
        given = tensors_in((args, kwargs))
        with self.paused(), torch.no_grad():
            out = call(module, *args, **kwargs)
        made = tensors_in(out)[0]  # an embedding is given ids, which say neither rows nor dtype
        op = describe(path, made.numel() // made.shape[-1], dtype_of(made))
        self.described.add(path)
        return self.stand_in(made, [*given, *module.parameters()], op.kind, dict(op.dims), op=op)

    @property
    def path(self) -> str:
        return self._stack[-1][0] if self._stack else ""

    @property
    def module(self) -> nn.Module:
        return self._stack[-1][1] if self._stack else self.root

    def _place(self) -> tuple[str, str]:
        """The path that owns what runs now (an activation's is that of the module around it), and the innermost leaf's."""
        path, module = self.path, self.module
        if module._modules or not self._stack:
            return path, ""
        bare = not (module._parameters or module._buffers) and len(self._stack) > 1
        return (self._stack[-2][0] if bare else path), path

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what runs inside."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def unseen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, run paused; what it gives stands for the tensors it was given."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.paused():
                out = function(*args, **kwargs)
            given = [t for t in tensors_in((args, kwargs)) if t.is_floating_point()]
            made = [t for t in tensors_in(out) if storage_of(t) not in self._producer]
            for i, tensor in enumerate(made):
                own = given[i : i + 1] if len(made) == len(given) else given
                self._keep.append(tensor.untyped_storage())
                self._alias[storage_of(tensor)] = tuple(k for t in own for k in self._resolve(storage_of(t)))
            return out

        return run

    # recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._paused:
            self._record(func, args, kwargs or {}, out)
        return out

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name, mutated = self._schema(func)
        given, made = tensors_in((args, kwargs)), tensors_in(out)
        if not made:
            return
        self._keep += [t.untyped_storage() for t in (*given, *made)]
        inside = {storage_of(t) for t in given}
        if not mutated and (name in aten.FREE or all(storage_of(t) in inside for t in made)):
            self._own_node(-1)
            return
        if name == "_to_copy" and storage_of(given[0]) in self.params:  # a cast parameter is that parameter
            self._alias[storage_of(made[0])] = (storage_of(given[0]),)
            return
        phase = self._phase()
        if phase == "backward":
            self._backward(name, args, made)
            return
        if func._schema.name in CUSTOM:
            op = Op("", **CUSTOM[func._schema.name](args, kwargs, out))
            event = self._event(name, phase, op.kind, dict(op.dims), given, made, [t for t in given if self._param(t)])
            event.op = op
        elif name in aten.PRODUCTS:
            event = self._product(name, args, made[0], phase)
        elif name in aten.CONVOLUTIONS:
            event = self._convolution(args, made[0], phase)
        elif name in aten.EMBEDDINGS and storage_of(args[0]) in self.params:
            table = args[0]
            dims = {"rows": args[1].numel(), "outputs": table.shape[1], "vocabulary": table.shape[0]}
            event = self._event(name, phase, "embedding", dims, [args[1]], made[:1], [table])
        elif name in aten.NORMS:
            event = self._norm(name, args, made[0], phase)
        else:
            written = [args[i] for i in mutated if i < len(args) and isinstance(args[i], Tensor)] or made
            read = [t for t in given if not (name in aten.OVERWRITES and t is args[0])]
            flop = aten.flop_of(name, max((t.numel() for t in read), default=0), max((t.numel() for t in written), default=0))
            event = self._event(name, phase, "", {}, read, written, [t for t in read if self._param(t)], flop)
        self._add(event)

    def _schema(self, func: Any) -> tuple[str, tuple[int, ...]]:
        """The operator's base name, and which positional arguments it writes to."""
        if func not in self._schemas:
            schema = func._schema
            written = tuple(i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write)
            self._schemas[func] = (aten.base_name(schema.name), written if schema.is_mutable else ())
        return self._schemas[func]

    def _phase(self) -> str:
        if torch._C._current_graph_task_id() == -1:
            return "forward"
        # a backward pass runs without grad mode; a checkpointed region switches it on to run again
        return "recompute" if torch.is_grad_enabled() else "backward"

    def _add(self, event: Event) -> None:
        index = len(self.events)
        makers = [self._producer.get(v[0]) for v in event.reads]
        event.sources = list(dict.fromkeys(m for m in makers if m is not None))
        bases = [Basis.INPUTS if m is None else self.events[m].basis for m in makers] + [Basis.WEIGHTS] * bool(event.params)
        event.basis = Basis.INPUTS if event.kind else max(bases, default=Basis.NUMBERS)
        if event.basis < Basis.INPUTS or not event.floats:
            event.flop = 0.0
        self.events.append(event)
        for view in event.writes:
            self._producer[view[0]] = index
        self._own_node(index)

    def _own_node(self, index: int) -> None:
        """The autograd node made last belongs to this event, unless an earlier one has it (-1: a view)."""
        if torch.is_grad_enabled():
            self._node.setdefault(torch.autograd._get_sequence_nr() - 1, index)

    def _event(
        self, label: str, phase: str, kind: str, dims: dict[str, Any], reads: Sequence[Any], writes: Sequence[Tensor],
        params: Sequence[Any] = (), flop: float = 0.0, act: Tensor | None = None,
    ) -> Event:  # fmt: skip
        path, leaf = self._place()
        owned = [t for t in params if isinstance(t, Tensor)]
        names = [(self._param(t), round(view_of(t)[3] / t.element_size())) for t in owned]
        act = act if act is not None else max(writes, key=lambda t: (t.is_floating_point(), t.numel()))
        views = [v for t in reads if isinstance(t, Tensor) and not self._param(t) for v in self._views(t)]
        weight = self.formats[names[0][0]] if names else None
        return Event(path, leaf, label, phase, kind, dims, flop, views, [view_of(t) for t in writes], params=names,
                     act=dtype_of(act), floats=act.is_floating_point(), weight=weight)  # fmt: skip

    def _resolve(self, key: int) -> tuple[int, ...]:
        return self._alias.get(key, (key,))

    def _views(self, tensor: Tensor) -> list[View]:
        key, first, last, size = view_of(tensor)
        return [(k, first, last, size) for k in self._resolve(key)]

    def _param(self, tensor: Tensor) -> str:
        """The name of the parameter that a tensor is a view or a cast of, or ''."""
        return self.params.get(self._resolve(storage_of(tensor))[0], "") if self.params else ""

    # operators on the matrix units

    def _product(self, name: str, args: Any, out: Tensor, phase: str) -> Event:
        at_left, at_right, at_bias = aten.PRODUCTS[name]
        left, right, bias = args[at_left], args[at_right], args[at_bias] if at_bias is not None else None
        inner, added = left.shape[-1], [bias] if bias is not None else []
        if self._param(left) and not self._param(right):  # W x^T: the same layer, written the other way round
            left, right = right.mT if right.dim() > 1 else right[None], left.mT if left.dim() > 1 else left[:, None]
        outputs = right.shape[-1] if right.dim() > 1 else 1
        rows = left.numel() // inner
        if not self._param(right):
            matrices = right.shape[0] if right.dim() > 2 else 1
            dims = {"rows": rows, "inputs": inner, "outputs": outputs, "matrices": matrices}
            return self._event(name, phase, "matmul", dims, [left, right, *added], [out])
        shared = right.dim() < 3 or right.stride(0) == 0
        biased = [t for t in added if self._param(t)]
        matrices = 1 if shared else right.shape[0]
        dims = {"rows": rows, "inputs": inner, "outputs": outputs, "bias": len(biased), "matrices": matrices}
        return self._event(name, phase, "linear", dims, [left, *added], [out], [right, *biased], act=left)

    def _convolution(self, args: Any, out: Tensor, phase: str) -> Event:
        """x [B, C, ...], weight [N, C / groups, ...]; transposed: weight [C, N / groups, ...]."""
        x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
        channels, outputs = x.shape[1], out.shape[1]
        inside, outside = x.numel() // channels, out.numel() // outputs
        if not self._param(weight):
            dims = {"rows": outside, "inputs": weight.numel() // weight.shape[0], "outputs": outputs}
            return self._event("convolution", phase, "matmul", dims, [x, weight], [out])
        if transposed:  # its transpose is the convolution that goes back: each input position is multiplied once
            channels, outputs, inside, outside, bias = outputs, channels, outside, inside, None
        dims = {"positions": outside, "in_positions": inside, "in_channels": channels, "out_channels": outputs,
                "kernel": weight[0, 0].numel(), "groups": groups, "bias": int(bias is not None)}  # fmt: skip
        return self._event("convolution", phase, "conv", dims, [x], [out], [weight, bias], act=x)

    def _norm(self, name: str, args: Any, out: Tensor, phase: str) -> Event:
        first, second = aten.NORMS[name]
        affine = [t for i in sorted({first, second}) if isinstance(t := args[i] if i < len(args) else None, Tensor)]
        per_channel = "group" in name or "batch" in name
        width = affine[0].numel() if affine else out.shape[1] if per_channel else math.prod(args[1])
        dims = {"rows": out.numel() // width, "width": width, "weights": len(affine), "flop_per_element": aten.NORM_FLOP}
        return self._event(name, phase, "norm", dims, [args[0]], [out], affine)

    # semantic ops

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None = None, cached: bool = False,
        layer: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of q [B, H, T, d] over k [B, K, S, d], v [B, K, S, e] as one op; gives an empty [B, H, T, e].

        `causal`: the queries are the last T of the S tokens. `window` counts the keys that a query sees on its left,
        itself included (and as many on its right if not causal).
        """
        batch, heads, new, width = q.shape
        keys, value = k.shape[2], v.shape[3]
        self.causal |= causal
        if causal:
            step = Step(1, new, max(keys - new, 0))
            sliding = f"[window={window}]" if window else ""
            pairs, context = step[f"pairs{sliding}"], step[f"context{sliding}"]
        else:
            context, outside = keys, max(keys - (window or keys), 0)  # keys that one query does not see on one side
            pairs = new * keys - outside * (outside + 1) * (new == keys)
        held = min(keys, window) if window else keys
        dims = {"heads": heads, "kv_heads": k.shape[1], "head_dim": width, "value_dim": value, "queries": batch * new,
                "pairs": batch * pairs, "context": batch * context, "held": batch * held if cached else 0}  # fmt: skip
        out = self.stand_in(q.new_empty(batch, new, heads, value), [q, k, v], "attention", dims)
        if not self._paused:
            event = self.events[-1]
            event.cache, event.layer = (dtype_of(k) if cached else None), layer if cached else None
        return out.transpose(1, 2)  # a fused kernel leaves it as the next layer reads it

    def stand_in(
        self, like: Tensor, given: Sequence[Tensor], kind: str, dims: dict[str, Any], label: str = "", op: Op | None = None
    ) -> Tensor:
        """Record one op in place of the operators inside it; gives an empty tensor with a gradient to all given ones.

        Parameters among `given` belong to the op.
        """
        with self.paused(), torch.no_grad():
            out = torch.empty_like(like, memory_format=torch.contiguous_format)
        index = -1
        if not self._paused:
            self._keep += [t.untyped_storage() for t in (*given, out)]
            owned = [t for t in given if self._param(t)]
            event = self._event(label or kind, self._phase(), kind, dims, given, [out], owned, act=given[0])
            event.op = op
            index = self._join(event)
        return _StandIn.apply(self, index, out, *given)

    def _join(self, event: Event) -> int:
        """Add a semantic event; attention over packed sequences, one call each, is one event. Gives its index."""
        last = self.events[-1] if self.events else event
        widths = ("heads", "kv_heads", "head_dim", "value_dim")
        if not (last.kind == event.kind == "attention" and (last.path, last.phase) == (event.path, event.phase)
                and all(last.dims[w] == event.dims[w] for w in widths)):  # fmt: skip
            self._add(event)
            return len(self.events) - 1
        for dim in event.dims.keys() - set(widths):
            last.dims[dim] += event.dims[dim]
        last.reads += event.reads
        last.writes += event.writes
        self._producer.update(dict.fromkeys((v[0] for v in event.writes), len(self.events) - 1))
        return len(self.events) - 1

    # the backward pass

    @contextmanager
    def watch_saved(self) -> Iterator[None]:
        """Add up what autograd keeps for the backward pass: whole storages, each once, parameters not."""

        def pack(tensor: Tensor) -> Tensor:
            key = storage_of(tensor)
            if key not in self.params and not self._alias.get(key) and torch._C._current_graph_task_id() == -1:
                self._keep.append(tensor.untyped_storage())
                self.saved[key] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def _backward(self, name: str, args: Any, made: list[Tensor]) -> None:
        node = torch._C._current_autograd_node()
        index = self._node.get(node._sequence_nr(), -1) if node is not None else -1
        if index < 0:
            return
        flop = 0.0
        if name in aten.PRODUCTS:
            flop = 2.0 * made[0].numel() * args[aten.PRODUCTS[name][0]].shape[-1]
        elif name == "convolution_backward":
            flop = sum(args[10][:2]) * self.events[index].product_flop
        self.backward[index] = self.backward.get(index, 0.0) + flop

    def mark_backward(self, index: int, share: float) -> None:
        """The gradient of a semantic op ran, or a share of it."""
        if index >= 0:
            self.backward[index] = share * self.events[index].backward_flop


class _StandIn(torch.autograd.Function):  # type: ignore[misc]
    """A semantic op as autograd sees it: keeps its inputs and output, and has a gradient for each input that wants one."""

    @staticmethod
    def forward(ctx: Any, tracer: Tracer, index: int, out: Tensor, *given: Tensor) -> Tensor:
        ctx.tracer, ctx.index = tracer, index
        ctx.save_for_backward(*given, out)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        tracer, given, wanted = ctx.tracer, ctx.saved_tensors[:-1], ctx.needs_input_grad[3:]
        weights = [w for w, t in zip(wanted, given, strict=True) if tracer._param(t)]
        others = [w for w, t in zip(wanted, given, strict=True) if not tracer._param(t)]
        tracer.mark_backward(ctx.index, (any(weights) + any(others)) / 2 if weights else 1.0)
        with tracer.paused():
            return None, None, None, *(torch.empty_like(t) if w else None for w, t in zip(wanted, given, strict=True))


class Semantics(TorchFunctionMode):  # type: ignore[misc]
    """Takes attention whole, before PyTorch breaks it down."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is nn.functional.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        if func is not nn.functional.multi_head_attention_forward:
            return func(*args, **kwargs)
        wanted = kwargs.pop("need_weights", True)  # without them it does what is taken whole above
        with patch.object(nn.functional, "scaled_dot_product_attention", self.attend):  # this mode does not see inside
            out, _ = func(*args, **kwargs, need_weights=False)
        query, key = args[0], args[1]
        return out, query.new_empty(*query.shape[1:-1], query.shape[0], key.shape[0]) if wanted else None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, is_causal: bool = False, **_: Any) -> Tensor:
        """Attention as PyTorch calls it: [..., H, T, d] over [..., K, S, d] and [..., K, S, e] -> [..., H, T, e]."""
        causal = is_causal or (len(args) > 2 and bool(args[2]))  # after the mask and the dropout
        flat = [t.reshape(-1, t.shape[-3] if t.dim() > 2 else 1, *t.shape[-2:]) for t in (query, key, value)]
        cached = self.tracer.caching and (causal or getattr(self.tracer.module, "is_causal", False))
        out = self.tracer.attend(flat[0], flat[1], flat[2], causal, cached=cached)
        return out if query.dim() == 4 else out.reshape(*query.shape[:-1], out.shape[-1])
