"""Linear attention over a sequence whose tokens lie on several ranks: what crosses between them is a state.

    S_t = diag(a_t) S_(t-1) + k_t^T v_t,    o_t = q_t S_t        (a = 1: plain linear attention)

A rank works on its tokens from an empty state and adds what the state before them, made by the ranks before, gives. That
state comes by one all-gather of every rank's own state (LASP-2), or from rank to rank in blocks (All-Scan of ZeCO).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

EXCHANGES = ("gather", "scan", "alone")


def mixer(exchange: str, gated: bool = False, group: Any = None, blocks: int = 4) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Linear attention by one of EXCHANGES; one rank exchanges nothing. Tokens lie in order, rank after rank.

    Gated, a key channel forgets by a = sigmoid(k)^(1/16), and the key is what it forgets, 1 - a (as in HGRN2).
    """

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        log = torch.nn.functional.logsigmoid(k) / 16 if gated else torch.zeros_like(k)
        k = -torch.expm1(log) if gated else k
        q, k, v, log = (x.transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v, log))  # [B, H, T, d]
        kept = log.cumsum(2)  # what is left of the state before these tokens, as a logarithm
        inner = q * kept.exp()
        after = kept[:, :, -1:]
        own = (k * (after - kept).exp()).transpose(2, 3) @ v
        out = ((inner @ (k * (-kept).exp()).transpose(2, 3)).tril()) @ v
        if dist.is_initialized() and dist.get_world_size(group) > 1 and exchange != "alone":
            before: Tensor = _Prefix.apply(own, after.exp().transpose(2, 3), exchange, gated, group, blocks)  # type: ignore[no-untyped-call]
            out = out + inner @ before
        return out.transpose(1, 2)

    return mix


class _Prefix(torch.autograd.Function):  # type: ignore[misc]
    """The state before this rank's tokens, from every rank's own state [B, H, d, d] and what it keeps [B, H, d, 1]."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, keep: Tensor, exchange: str, gated: bool, group: Any, blocks: int) -> Tensor:
        ctx.how = exchange, gated, group, blocks
        before = _before(own, keep, False, *ctx.how)
        ctx.save_for_backward(keep, before)
        return before

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:  # type: ignore[override]
        # the same recurrence from the last rank to the first: what follows a rank's tokens asks for their state
        keep, before = ctx.saved_tensors
        asked = _before(grad, keep, True, *ctx.how)
        return asked, (asked * before).sum(-1, keepdim=True), None, None, None, None


def _before(own: Tensor, keep: Tensor, back: bool, exchange: str, gated: bool, group: Any, blocks: int) -> Tensor:
    """x_(r+1) = keep_r x_r + own_r from x_0 = 0 over the ranks in order, or in reverse; this rank's x."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    order = list(range(ranks))[:: -1 if back else 1]
    place = order.index(rank)
    if exchange == "gather":
        sent = torch.cat((own, keep), -1) if gated else own.contiguous()
        gathered = sent.new_empty((ranks * len(sent), *sent.shape[1:]))
        dist.all_gather_into_tensor(gathered, sent, group=group)
        every = gathered.chunk(ranks)
        state = torch.zeros_like(own)
        for other in order[:place]:
            state = (state * every[other][..., -1:] + every[other][..., :-1]) if gated else state + every[other]
        return state
    arrived, waiting = [], []
    for mine, kept in zip(own.chunk(blocks, 2), keep.chunk(blocks, 2), strict=True):
        got = torch.zeros_like(mine).contiguous()
        if place:
            dist.recv(got, group=group, group_src=order[place - 1])
        if place < ranks - 1:  # a block goes on at once, while the next is on its way
            passed = (kept * got + mine).contiguous()
            waiting.append((dist.isend(passed, group=group, group_dst=order[place + 1]), passed))
        arrived.append(got)
    for work, _ in waiting:
        work.wait()  # type: ignore[union-attr]
    return torch.cat(arrived, 2)
