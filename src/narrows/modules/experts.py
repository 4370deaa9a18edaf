"""Experts whose tokens may come from other ranks: each token goes to the few that a router chooses, and back."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import silu


class Experts(nn.Module):  # type: ignore[misc]
    """The feed-forward networks of Mixtral, with its parameters' names; `share` leaves each rank its part of them.

    No token is dropped, however uneven the choices are: what it computes does not depend on how many ranks there are.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        wide, hidden, self.count = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
        self.chosen = config["num_experts_per_tok"]
        self.mesh: DeviceMesh | None = None
        self.gate = nn.Linear(wide, self.count, bias=False)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.empty(self.count, 2 * hidden, wide))
        self.experts.down_proj = nn.Parameter(torch.empty(self.count, wide, hidden))

    def share(self, mesh: DeviceMesh) -> None:
        """Keep this rank's part of the experts, and send tokens to the ranks of the mesh that have theirs."""
        self.mesh = mesh
        for name, whole in list(self.experts.named_parameters()):
            own = whole.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
            setattr(self.experts, name, nn.Parameter(DTensor.from_local(own, mesh, [Shard(0)])))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        flat = x.flatten(0, 1)
        weights, chosen = self.gate(flat).softmax(-1).topk(self.chosen)
        turn = chosen.flatten().argsort(stable=True)  # token by token, to expert by expert
        many = chosen.flatten().bincount(minlength=self.count)
        rows = flat[turn // self.chosen]
        fed = self._fed(rows, many) if self.mesh is None else self._sent(rows, many, self.mesh.get_group())
        back = fed[turn.argsort()].unflatten(0, (-1, self.chosen))
        return (back * (weights / weights.sum(-1, keepdim=True))[..., None]).sum(1).view_as(x)

    def _sent(self, rows: Tensor, many: Tensor, group: Any) -> Tensor:
        """The rows through experts of every rank of the group: [rows, D], in the order they came."""
        own = many.view(dist.get_world_size(group), -1)  # [ranks, experts of each]
        coming = torch.empty_like(own)
        dist.all_to_all_single(coming, own, group=group)
        out, back = own.sum(1).tolist(), coming.sum(1).tolist()
        got: Tensor = _Sent.apply(rows, out, back, group)  # type: ignore[no-untyped-call]
        turn = torch.arange(own.shape[1]).repeat(len(out)).repeat_interleave(coming.flatten()).argsort(stable=True)
        fed = self._fed(got[turn], coming.sum(0))[turn.argsort()]
        home: Tensor = _Sent.apply(fed, back, out, group)  # type: ignore[no-untyped-call]
        return home

    def _fed(self, rows: Tensor, many: Tensor) -> Tensor:
        """Rows that lie expert by expert, so many of each, through this rank's experts."""
        up, down = (p.to_local() if isinstance(p, DTensor) else p for p in self.experts.parameters())
        out = []
        for i, part in enumerate(rows.split(many.tolist())):
            gate, value = (part @ up[i].T).chunk(2, -1)
            out.append((silu(gate) * value) @ down[i].T)
        return torch.cat(out)


class _Sent(torch.autograd.Function):  # type: ignore[misc]
    """Rows to other ranks, `out` to each, of which `back` come; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, out: list[int], back: list[int], group: Any) -> Tensor:
        ctx.other = back, out, group
        got = rows.new_empty(sum(back), rows.shape[1])
        dist.all_to_all_single(got, rows.contiguous(), back, out, group=group)
        return got

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        home: Tensor = _Sent.apply(grad, *ctx.other)  # type: ignore[no-untyped-call]
        return home, None, None, None
