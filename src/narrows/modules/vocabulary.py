"""An output layer and its cross-entropy with the vocabulary cut over several devices, combined as an online softmax."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def sharded_loss(
    hidden: "torch.Tensor", shards: "Sequence[torch.Tensor]", targets: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]":
    """Mean cross-entropy of `hidden @ W.T`, and its gradients, from shards of W that never see each other's logits.

    hidden: float[rows D]; shards: float[words D] each, together the rows of W in order; targets: int[rows].
    Gives the loss, the gradient of hidden, and that of each shard. Each shard computes its gradients from its own maximum
    and sum, and corrects them with one factor for each row once those of all are known: one exchange of three numbers a
    row and of the summed gradient of hidden (Yeung et al., 2024, algorithm 2).
    """
    import torch

    tops, sums, picked, outputs, first = [], [], [], [], 0
    for weight in shards:  # pass S: each on its own device
        logits = hidden @ weight.T
        top = logits.amax(1, keepdim=True)
        scaled = (logits - top).exp()
        total = scaled.sum(1, keepdim=True)
        mine = (targets >= first) & (targets < first + len(weight))
        label = torch.where(mine, targets - first, 0)
        picked.append(torch.where(mine, logits.gather(1, label[:, None])[:, 0], 0.0))
        tops.append(top)
        sums.append(total)
        outputs.append((scaled / total, mine, label))
        first += len(weight)
    highest = torch.stack(tops).amax(0)  # the barrier
    factors = [total * (top - highest).exp() for top, total in zip(tops, sums, strict=True)]
    whole = torch.stack(factors).sum(0)
    loss = (highest[:, 0] + whole[:, 0].log() - torch.stack(picked).sum(0)).mean()
    grad_hidden, grad_shards = torch.zeros_like(hidden), []
    for weight, factor, (softmax, mine, label) in zip(shards, factors, outputs, strict=True):  # pass T
        grad = softmax * (factor / whole)
        grad[torch.arange(len(grad))[mine], label[mine]] -= 1
        grad /= len(hidden)
        grad_hidden += grad @ weight
        grad_shards.append(grad.T @ hidden)
    return loss, grad_hidden, grad_shards
