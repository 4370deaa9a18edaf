"""From an nn.Module to a Graph: run it once on the meta device, where tensors have sizes and no data, and watch."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from narrows.backward import training
from narrows.capture import semantics
from narrows.capture.assemble import Parameter, assemble
from narrows.capture.events import dtype_of, storage_of, tensors_in
from narrows.capture.tracer import Semantics, Tracer
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.step import Step

CAUSAL = "Causal attention is counted as executed: about half of all query-key pairs."
NO_LOSS = "The backward pass starts at the module's first output: a loss is not counted."
_VALUES = ("grid_thw", "_lens", "_lengths", "cu_seqlens")  # inputs whose values decide the sizes of others
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, ArithmeticError)


def from_module(module: nn.Module, step: Step, inputs: Any = None, name: str = "") -> Graph:
    """The Graph of a module for one Step, with the sizes of that step.

    `inputs`: a tensor, a tuple of arguments or a dict of keyword arguments; only their shapes and dtypes are used.
    Without them they follow from the module: token ids, pixels or features as its forward or first layer asks for.
    Parameters are replaced by empty ones for as long as the trace lasts; no memory is allocated for weights and
    the module is left as it was. `prefill` and `decode` keep a cache and give the last token's logits, `forward`
    gives everything, `train` adds the backward pass, with what autograd saves and recomputes, and the optimizer.
    Raises NarrowsError naming the submodule that failed, or the input that is missing.
    """
    name = name or type(module).__name__
    if any(field.size != 1 for field in (step.batch, step.new, step.past, step.source)):
        raise NarrowsError(f"{step} holds several steps.", where=name, remedy="Capture one batch of equal sequences.")
    parameters = {n: Parameter(p.numel(), dtype_of(p), p.dim()) for n, p in module.named_parameters()}
    trainable: dict[str, float] = {}
    for n, p in module.named_parameters():
        trainable[parameters[n].dtype.name] = trainable.get(parameters[n].dtype.name, 0) + p.numel() * p.requires_grad
    with ExitStack() as stack:
        stack.enter_context(_on_meta(module))
        stack.enter_context(_mode(module, step.phase == "train"))
        tracer = Tracer(module)
        stack.enter_context(tracer.watch_modules())
        stack.enter_context(torch.device("meta"))
        stack.enter_context(Semantics(tracer))
        stack.enter_context(semantics.taken_whole(module, tracer, step))
        try:
            args, kwargs = _arguments(module, step, inputs, tracer)
            outputs = _run(module, args, kwargs, tracer, step.phase == "train")
        except NarrowsError as error:
            raise error.inside(name) from error
        except _FAILURES as error:
            where = f"{name}: {tracer.failed_in}" if tracer.failed_in else name
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            remedy = "Give `inputs` it accepts; sizes must not depend on values."
            raise NarrowsError(f"its forward failed on the meta device ({reason}).", where=where, remedy=remedy) from error
        semantics.trim_held(tracer, outputs)
        kept = {storage_of(t) for t in tensors_in(outputs)}
        whole = semantics.whole_attention(module, tracer, step)
        ops = assemble(tracer.events, parameters, kept, tracer.saved, tracer.backward, tracer.described, whole)
    split = semantics.split_of(module)
    ops = tuple(replace(op, split=split(op)) for op in ops)
    notes = (CAUSAL,) * tracer.causal + (NO_LOSS,) * (step.phase == "train")
    graph = Graph(name, ops, source=f"{type(module).__module__}.{type(module).__qualname__}", notes=notes)
    return _with_optimizer(graph, trainable) if step.phase == "train" else graph


def _run(module: nn.Module, args: Any, kwargs: Any, tracer: Tracer, train: bool) -> Any:
    if not train:
        with torch.no_grad(), tracer:
            return module(*args, **kwargs)
    with torch.enable_grad(), tracer:
        with tracer.watch_saved():
            out = module(*args, **kwargs)
        result = next((t for t in tensors_in(out) if t.grad_fn is not None), None)
        if result is None:
            raise NarrowsError("no output has a gradient.", remedy="Train a module with parameters that require one.")
        with tracer.paused():
            gradient = torch.empty_like(result)
        torch.autograd.backward(result, gradient)
    return out


def _with_optimizer(graph: Graph, trainable: Mapping[str, float]) -> Graph:
    """The graph with the optimizer's update of its trainable parameters, as `training` states it."""
    forward = replace(graph, ops=tuple(op for op in graph if op.phase == "forward"))
    updates = [op for op in training(forward) if op.phase == "update" and trainable.get(op.act.name)]
    return replace(graph, ops=graph.ops + tuple(op.but(elements=trainable[op.act.name]) for op in updates))


@contextmanager
def _mode(module: nn.Module, train: bool) -> Iterator[None]:
    """Train or inference mode, and the slower attention that shows its parts, for as long as the context lasts."""
    modes = [(m, m.training) for m in module.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for m, _ in modes:
        m.training = train
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for m, was in modes:
            m.training = was


@contextmanager
def _on_meta(module: nn.Module) -> Iterator[None]:
    """Empty tensors on the meta device in the place of all that the module holds, for as long as the context lasts."""
    made: dict[int, Tensor] = {}
    held = [(store, key, value) for m in module.modules() for store in (m._parameters, m._buffers, m.__dict__)
            for key, value in store.items() if isinstance(value, Tensor)]  # fmt: skip
    for _, _, value in held:
        if id(value) not in made:
            empty = torch.empty_like(value, device="meta", requires_grad=False)
            made[id(value)] = nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
    try:
        for store, key, value in held:
            store[key] = made[id(value)]
        yield
    finally:
        for store, key, value in held:
            store[key] = value


def _arguments(module: nn.Module, step: Step, inputs: Any, tracer: Tracer) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if inputs is not None:
        moved = _moved(inputs)
        return ((), moved) if isinstance(moved, dict) else (moved if isinstance(moved, tuple) else (moved,), {})
    if "transformers" in sys.modules and semantics.is_model(module):
        with tracer.paused(), torch.no_grad():
            return (), semantics.arguments(module, step, tracer)
    return (_first_input(module, int(step.batch[0]), int(step.new[0])),), {}


def _moved(value: Any, name: str = "") -> Any:
    if isinstance(value, Tensor):
        return value if name.endswith(_VALUES) else torch.empty_like(value, device="meta", requires_grad=value.requires_grad)
    if isinstance(value, Mapping):
        return {k: _moved(v, str(k)) for k, v in value.items()}
    return type(value)(_moved(v) for v in value) if type(value) in (tuple, list) else value


def _first_input(module: nn.Module, batch: int, tokens: int) -> Tensor:
    """The input that the first layer of a plain module asks for: ids [B, T], [B, T, features] or an image of 224 px."""
    for layer in module.modules():
        dtype = next((p.dtype for p in layer.parameters(recurse=False)), torch.float32)
        if isinstance(layer, nn.Embedding):
            return torch.empty(batch, tokens, dtype=torch.long, device="meta")
        if isinstance(layer, nn.Linear):
            return torch.empty(*((batch, tokens) if tokens > 1 else (batch,)), layer.in_features, dtype=dtype, device="meta")
        if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            size = (224, 224) if isinstance(layer, nn.Conv2d) else (tokens,)
            return torch.empty(batch, layer.in_channels, *size, dtype=dtype, device="meta")
        if isinstance(layer, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            attention = layer if isinstance(layer, nn.MultiheadAttention) else layer.self_attn
            shape = (batch, tokens) if attention.batch_first else (tokens, batch)
            return torch.empty(*shape, attention.embed_dim, dtype=next(layer.parameters()).dtype, device="meta")
    raise NarrowsError("its inputs do not follow from its layers.", remedy="Give them: from_module(module, step, inputs=...).")
