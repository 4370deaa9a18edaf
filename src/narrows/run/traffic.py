"""Count what this rank sends: every collective and message of `torch.distributed`, whoever calls it."""

import os
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from narrows.kinds import KINDS

# Operators of the dispatcher as kinds of a graph's collectives, with the place of what this rank puts in.
_CALLS = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 1),
    "allgather_": ("all_gather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "alltoall_": ("all_to_all", 1),
    "send": ("send", 0),
    "all_reduce": ("all_reduce", 0),
    "all_gather_into_tensor": ("all_gather", 0),
    "reduce_scatter_tensor": ("reduce_scatter", 0),
    "all_to_all_single": ("all_to_all", 0),
}
_QUIET = ("recv_", "recv_any_source_", "barrier", "wait_tensor", "monitored_barrier_", "broadcast_", "_wrap_tensor_autograd")


class Traffic(TorchDispatchMode):  # type: ignore[misc]
    """Within it, `calls` and `sent_bytes` of this rank by kind, as the graph's collectives count them (a ring's bytes).

    `overlapped` counts the products of matrices that were done between the start of an exchange and the wait for it.
    Broadcasts set a run up and count nothing. What a backward pass sends counts too: on a CPU it runs in this thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()
        self.overlapped, self._started = 0, 0

    @property
    def total_bytes(self) -> float:
        """All that this rank sent."""
        return float(sum(self.sent_bytes.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, DTensor | AsyncCollectiveTensor) for one in types):
            return NotImplemented  # it comes back as the operators that it means
        name = func._overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(name, args)
            self._started += (name == "all_reduce") - (name == "wait_tensor") * bool(self._started)
        elif self._started and name in ("mm", "addmm", "bmm"):
            self.overlapped += 1
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name in _QUIET:
            return
        kind, place = _CALLS[name]
        ranks = _ranks(args)
        count = sum(t.numel() * t.element_size() for t in _tensors(args[place]))
        elements = count * ranks if kind == "all_gather" else count
        self.calls[kind] += 1
        self.sent_bytes[kind] += KINDS[kind].link({"elements": elements, "ranks": ranks})


def written_bytes() -> int:
    """Bytes that this process has written to files and sockets since it began, by the kernel's own count."""
    with open(f"/proc/{os.getpid()}/io") as file:
        return int(next(line for line in file if line.startswith("wchar")).split()[1])


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [t for part in value for t in _tensors(part)]


def _ranks(args: Any) -> int:
    for value in args:
        if isinstance(value, torch.ScriptObject):
            group = dist.ProcessGroup.unbox(value)
            if isinstance(group, dist.ProcessGroup):
                return int(group.size())
    name = next(value for value in reversed(args) if isinstance(value, str))
    return int(_resolve_process_group(name).size())
