"""Attention over a sequence whose tokens lie on several ranks: keys and values go round a ring, or heads are exchanged.

Each rank holds T of the tokens, `positions` [N, T] says which. Both give what attention over all tokens gives, and their
gradients; the messages are those of `narrows.parallel.context_parallel`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def zigzag(tokens: int, ranks: int) -> Tensor:
    """[ranks, tokens / ranks]: each rank has a part from either end of the sequence, so that causal work is even."""
    parts = torch.arange(tokens).view(2 * ranks, -1)
    return torch.stack([torch.cat((parts[r], parts[2 * ranks - 1 - r])) for r in range(ranks)])


def ring(positions: Tensor, group: Any = None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention whose keys and values go round the ranks, a block of scores at a time (Li et al. 2021, Liu et al. 2023)."""

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = _Ring.apply(q, k, v, positions, group)  # type: ignore[no-untyped-call]
        return out

    return mix


def ulysses(positions: Tensor, group: Any = None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention over all tokens for a share of the heads, exchanged before and after (Jacobs et al. 2023)."""
    everywhere = positions.flatten()
    seen = everywhere[:, None] >= everywhere

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ranks = dist.get_world_size(group)
        if k.shape[2] < ranks:  # keys and values that several ranks need are sent to each
            k, v = (x.repeat_interleave(ranks // x.shape[2], 2) for x in (k, v))
        q, k, v = (_Exchange.apply(x, 2, 1, group) for x in (q, k, v))  # type: ignore[no-untyped-call]
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen, enable_gqa=q.shape[2] != k.shape[2]
        )
        back: Tensor = _Exchange.apply(out.transpose(1, 2), 1, 2, group)  # type: ignore[no-untyped-call]
        return back

    return mix


def alone(positions: Tensor, group: Any = None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What is left without the exchange: each rank attends over its own tokens."""
    own = positions[dist.get_rank(group)]

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        many = q.shape[1] != k.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=own[:, None] >= own, enable_gqa=many)
        return out.transpose(1, 2)

    return mix


class _Exchange(torch.autograd.Function):  # type: ignore[misc]
    """An all-to-all: `split` is cut over the ranks and `join` gathered from them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: int, join: int, group: Any) -> Tensor:
        ctx.back = join, split, group
        ranks = dist.get_world_size(group)
        sent = torch.stack(x.chunk(ranks, split)).contiguous()
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent, group=group)
        return torch.cat(list(got), join)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        back: Tensor = _Exchange.apply(grad, *ctx.back)  # type: ignore[no-untyped-call]
        return back, None, None, None


def _rotate(x: Tensor, group: Any) -> Tensor:
    """What the rank before this one in the ring had."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    got, sent = torch.empty_like(x), x.contiguous()
    ops = [dist.P2POp(dist.isend, sent, group=group, group_peer=(rank + 1) % ranks),
           dist.P2POp(dist.irecv, got, group=group, group_peer=(rank - 1) % ranks)]  # fmt: skip
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return got


class _Ring(torch.autograd.Function):  # type: ignore[misc]
    """Scores of all keys with a running maximum; the backward pass sends keys and values round again, with their gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, group: Any) -> Tensor:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        grouped = q.unflatten(2, (k.shape[2], -1))  # [B, T, K, heads of one key, d]
        both, top = torch.stack((k, v)), torch.full((), -torch.inf, dtype=q.dtype)
        total, acc = torch.zeros_like(top), torch.zeros_like(top)
        for hop in range(ranks):  # its own keys first: each query meets one that it may see
            both = _rotate(both, group) if hop else both
            scores = _scores(grouped, both[0], positions[rank], positions[(rank - hop) % ranks])
            higher = torch.maximum(top, scores.amax(-1, keepdim=True))
            weights, old = (scores - higher).exp(), (top - higher).exp()
            total = total * old + weights.sum(-1, keepdim=True)
            acc = acc * old + torch.einsum("bkgts,bskd->bkgtd", weights, both[1])
            top = higher
        out = (acc / total).permute(0, 3, 1, 2, 4)
        ctx.save_for_backward(q, k, v, out, top + total.log(), positions)
        ctx.group = group
        return out.flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        q, k, v, out, lse, positions = ctx.saved_tensors
        group = ctx.group
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        grouped, grad = q.unflatten(2, (k.shape[2], -1)), grad.unflatten(2, (k.shape[2], -1))
        delta = (grad * out).sum(-1).permute(0, 2, 3, 1)[..., None]
        both, dq, own, travelling = torch.stack((k, v)), torch.zeros_like(grouped), None, None
        for hop in range(ranks):
            both = _rotate(both, group) if hop else both
            travelling = _rotate(travelling, group) if travelling is not None else None
            weights = (_scores(grouped, both[0], positions[rank], positions[(rank - hop) % ranks]) - lse).exp()
            dv = torch.einsum("bkgts,btkgd->bskd", weights, grad)
            ds = weights * (torch.einsum("btkgd,bskd->bkgts", grad, both[1]) - delta) * q.shape[-1] ** -0.5
            dq += torch.einsum("bkgts,bskd->btkgd", ds, both[0])
            found = torch.stack((torch.einsum("bkgts,btkgd->bskd", ds, grouped), dv))
            if hop == 0:
                own = found  # stays at home: what the others add comes by last
            else:
                travelling = found if travelling is None else travelling + found
        assert own is not None
        if travelling is not None:
            own = own + _rotate(travelling, group)
        return dq.flatten(2, 3), own[0], own[1], None, None


def _scores(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[B, K, heads of one key, T, S], minus infinity where a key comes after its query."""
    scores = torch.einsum("btkgd,bskd->bkgts", q, k) * q.shape[-1] ** -0.5
    return scores.masked_fill(rows[:, None] < columns, -torch.inf)
