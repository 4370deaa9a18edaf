"""What layers read while calibration data runs through a model, whole or one block after another."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from narrows.errors import NarrowsError

_WHOLE = "Calibrate the whole model."


def require_data(data: Sequence[Mapping[str, Tensor]], why: str, where: str) -> None:
    """Raise NarrowsError where there is nothing to calibrate on; `why` says what needs it."""
    if not data:
        raise NarrowsError(f"{why} calibration data.", where=where, remedy="Pass a few batches, or --text FILE.")


def vectors(layer: nn.Module, x: Tensor) -> Tensor:
    """What the outputs [T, N] of a linear layer are products of: its input as [T, K]."""
    return x.reshape(-1, x.shape[-1])


def listen(
    model: nn.Module, layers: Mapping[str, nn.Module], data: Sequence[Mapping[str, Tensor]], hear: Callable[[str, Tensor], None]
) -> None:
    """Run data through a model without gradients; `hear` is given each named layer's path and input, whenever it runs."""

    def before(name: str) -> Any:
        return lambda layer, args: hear(name, args[0])

    hooks = [layer.register_forward_pre_hook(before(name)) for name, layer in layers.items()]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            for batch in data:
                model(**batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def observed(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    data: Sequence[Mapping[str, Tensor]],
    rows: int,
    read: Callable[[nn.Module, Tensor], Tensor] = vectors,
) -> dict[str, Tensor]:
    """Inputs [T, K] of the named layers as fp32: `rows` of them, evenly spread over all batches and tokens.

    `data` holds the keyword arguments of the model's forward; `read` makes [T, K] of what a layer is given. The model is
    left as it was; layers that never ran are missing.
    """
    seen: dict[str, list[Tensor]] = {}
    each = -(-rows // max(len(data), 1))

    def keep(name: str, x: Tensor) -> None:
        flat = read(layers[name], x)
        seen.setdefault(name, []).append(flat[torch.linspace(0, len(flat) - 1, min(each, len(flat))).long()].float())

    listen(model, layers, data, keep)
    return {name: torch.cat(pieces) for name, pieces in seen.items()}


class Passed(nn.Module):  # type: ignore[misc]
    """In the place of a block whose weights are not there: gives on what it is given, and notes how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def forward(self, stream: Tensor, *args: Any, **options: Any) -> Tensor:
        self.calls.append((stream, args, options))
        return stream


class Alone(nn.Module):  # type: ignore[misc]
    """A block at its path in a model that holds nothing else; a batch is what the block is called with."""

    def __init__(self, path: str, block: nn.Module) -> None:
        super().__init__()
        *outer, last = path.split(".")
        at: nn.Module = self
        for name in outer:
            at.add_module(name, nn.Module())
            at = at.get_submodule(name)
        at.add_module(last, block)
        self.path = path

    def forward(self, stream: Tensor, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        return self.get_submodule(self.path)(stream, *args, **options)


@dataclass
class Stream:
    """A batch on its way: what has left the last block that ran, and how each block is called beside that."""

    now: Tensor
    calls: Mapping[str, tuple[tuple[Any, ...], Mapping[str, Any]]]

    def batch(self, block: str) -> dict[str, Any]:
        """The keyword arguments of `Alone` for a block of this path."""
        args, options = self.calls[block]
        return {"stream": self.now, "args": args, "options": options}


def entering(model: nn.Module, blocks: Sequence[str], batch: Mapping[str, Tensor]) -> Stream:
    """A batch where it enters the first of a model's blocks, each of which is `Passed`.

    Raises NarrowsError for blocks that do not run one after the other, nothing between them.
    """
    places: dict[str, Any] = {name: model.get_submodule(name) for name in blocks}
    for place in places.values():
        place.calls.clear()
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        model(**batch, **options)
    first = places[blocks[0]].calls[:1]
    if not first or any(len(p.calls) != 1 or p.calls[0][0] is not first[0][0] for p in places.values()):
        raise NarrowsError("its blocks do not run one after the other.", where=type(model).__name__, remedy=_WHOLE)
    return Stream(first[0][0], {name: p.calls[0][1:] for name, p in places.items()})


def after(block: Alone, batch: Mapping[str, Any]) -> Tensor:
    """What leaves a block for such a batch; raises NarrowsError where that is not one tensor."""
    with torch.no_grad():
        left = block(**batch)
    if not isinstance(left, Tensor):
        raise NarrowsError("it gives more than one tensor.", where=block.path, remedy=_WHOLE)
    return left
