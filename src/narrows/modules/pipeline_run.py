"""Running an order of passes on real modules: microbatches through stages, backward in one or two parts, or recomputed.

One `Rank` runs the row of one rank; where messages go is the caller's: a mailbox in one process, a pipe between several.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from narrows.errors import NarrowsError

if TYPE_CHECKING:
    import torch

Pass = tuple[str, int, int]  # kind (F, I, W or B), stage, microbatch
Send = Callable[[Pass, "torch.Tensor"], None]  # a message is named by the pass that needs it, of kind F or B
Receive = Callable[[Pass], "torch.Tensor"]


def deferred(model: "torch.nn.Module", queue: "list[Callable[[], None]]") -> None:
    """Make the backward pass of every Linear in `model` give the gradient of its input alone.

    What it leaves to do, the gradients of weight and bias, is put on `queue` as functions to call later (2BP).
    """
    import torch

    class InputGradient(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
            ctx.save_for_backward(x)
            ctx.layer = layer
            return torch.nn.functional.linear(x, layer.weight, layer.bias)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
            (x,), layer = ctx.saved_tensors, ctx.layer

            @torch.no_grad()  # type: ignore[untyped-decorator]
            def weights() -> None:
                rows, out = x.flatten(0, -2), grad.flatten(0, -2)
                for parameter, value in ((layer.weight, out.T @ rows), (layer.bias, out.sum(0))):
                    if parameter is not None:
                        parameter.grad = value if parameter.grad is None else parameter.grad + value

            queue.append(weights)
            return grad @ layer.weight, None

    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.forward = lambda x, layer=layer: InputGradient.apply(x, layer)  # type: ignore[method-assign,misc,no-untyped-call]


class Rank:
    """The stages of one rank, and what it holds between a microbatch's passes."""

    def __init__(
        self,
        stages: Mapping[int, "torch.nn.Module"],
        last: int,
        batch: Callable[[int], "torch.Tensor"],
        loss: Callable[[int, "torch.Tensor"], "torch.Tensor"],
        recompute: bool = False,
    ) -> None:
        """`stages` by their place in the model; `batch` is a microbatch of inputs, `loss` its share of the step's loss."""
        self.stages, self.last, self.batch, self.loss, self.recompute = stages, last, batch, loss, recompute
        self.queue: list[Callable[[], None]] = []
        self.left: dict[tuple[int, int], list[Callable[[], None]]] = {}
        self.held: dict[tuple[int, int], tuple[Any, Any]] = {}
        for module in stages.values():
            deferred(module, self.queue)

    def run(self, one: Pass, send: Send, receive: Receive) -> None:
        """One pass of the row; it receives what another rank sent for it, and sends what another pass needs."""
        import torch

        kind, stage, m = one
        wanted = self.waits_for(one)
        message = receive(wanted) if wanted else None
        if kind == "F":
            x = self.batch(m) if message is None else message
            with torch.set_grad_enabled(not self.recompute):
                x, y = self._forward(stage, m, x)
            self.held[stage, m] = (x, None if self.recompute else y)
            if stage < self.last:
                send(("F", stage + 1, m), y.detach())
        elif kind in "BI":
            x, y = self.held.pop((stage, m))
            if y is None:
                x, y = self._forward(stage, m, x)
            y.backward(message)
            if stage:
                send(("B", stage - 1, m), x.grad)
            self.left[stage, m], self.queue[:] = list(self.queue), []
        if kind in "BW":
            for weights in self.left.pop((stage, m)):
                weights()
        if kind not in "FBIW":
            raise NarrowsError(f"{one} cannot be run.", where="pipeline_run", remedy="Use passes of kind F, B, I and W.")

    def waits_for(self, one: Pass) -> Pass | None:
        """The name of the message that a pass receives, if any."""
        kind, stage, m = one
        if kind == "W" or stage == (0 if kind == "F" else self.last):
            return None
        return ("F" if kind == "F" else "B"), stage, m

    def _forward(self, stage: int, m: int, x: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        x = x.detach()
        if stage:
            x.requires_grad_()
        y = self.stages[stage](x)
        return x, self.loss(m, y) if stage == self.last else y


def run_in_turn(rows: Sequence[Sequence[Pass]], ranks: Sequence[Rank]) -> None:
    """Run every rank's row in one process, each pass once what it receives has been sent.

    Raises NarrowsError for rows that wait for each other.
    """
    sent: dict[Pass, torch.Tensor] = {}
    done = [0] * len(rows)
    while any(at < len(row) for at, row in zip(done, rows, strict=True)):
        before = sum(done)
        for i, (row, rank) in enumerate(zip(rows, ranks, strict=True)):
            while done[i] < len(row) and (not rank.waits_for(row[done[i]]) or rank.waits_for(row[done[i]]) in sent):
                rank.run(row[done[i]], sent.__setitem__, sent.pop)
                done[i] += 1
        if sum(done) == before:
            raise NarrowsError(
                "every rank waits for another.", where="pipeline_run", remedy="Play the order: it names the cycle."
            )
