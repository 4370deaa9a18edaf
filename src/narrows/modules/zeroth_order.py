"""Training without a backward pass: two losses, at weights moved a little either way, say how far to step (MeZO).

The direction is drawn from a seed, so that ranks that share the seed move alike and exchange the difference of two losses alone.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Loss = Callable[[], float]


def move(parameters: "Iterable[torch.Tensor]", seed: int, by: float) -> None:
    """Add `by` times the normal direction of a seed to the parameters, one after the other; nothing of their size is kept."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=by)


def losses(parameters: "Sequence[torch.Tensor]", loss: "Loss", seed: int, epsilon: float, signs: Sequence[int]) -> list[float]:
    """The loss at the weights moved by each sign of epsilon; the weights are put back as they were."""
    before = [parameter.detach().clone() for parameter in parameters]
    found = []
    for sign in signs:
        move(parameters, seed, sign * epsilon)
        found.append(loss())
        for parameter, kept in zip(parameters, before, strict=True):
            parameter.data.copy_(kept)
    return found


def step(parameters: "Sequence[torch.Tensor]", slope: float, seed: int, rate: float) -> None:
    """One step against the slope (difference of the two losses over twice epsilon) along the direction of the seed."""
    move(parameters, seed, -rate * slope)
