"""What a checkpoint of a training run takes: where it is written, for how long the steps stop, and when it is safe."""

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Self

from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.host import Host
from narrows.machine import Cluster
from narrows.simulate.training import STATES
from narrows.units import format_bytes

# Of a device: the file system of Llama 3's 16,384 sustains 2 TB/s (Dubey et al., 2024, section 3.3).
STORE_BYTES_PER_S = 2e12 / 16384
PLACES = ("store", "disk", "host")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint takes: the steps stop for `stall_seconds`, it is safe `lag_seconds` later, and read in `read_seconds`."""

    stall_seconds: float
    lag_seconds: float = 0.0
    read_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("stall_seconds", "lag_seconds", "read_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                problem = f"it is {getattr(self, name):g} s."
                raise NarrowsError(problem, where=f"checkpoint: {name}", remedy="Give a finite time from 0 up.")

    @classmethod
    def slowest(cls, some: Iterable["Checkpoint"]) -> Self:
        """What they take that are written at the same time, each to its own place."""
        return cls(*(max(times) for times in zip(*(astuple(one) for one in some), strict=True)))


def held_bytes(graph: Graph) -> float:
    """Bytes of a checkpoint: weights as they are, and what the optimizer keeps of each parameter."""
    return graph.weight_bytes + graph.parameters * 4 * STATES


def checkpoint(
    cluster: Cluster,
    held_bytes: float,
    devices: int,
    to: str = "store",
    host: Host | None = None,
    store_bytes_per_s: float = 0.0,
    store_bytes: float = math.inf,
    hidden_seconds: float | None = None,
) -> Checkpoint:
    """The checkpoint of `held_bytes` that so many devices write together, each an equal share.

    to               a file system that all share (`store`), the disks or the memory of the hosts (`disk`, `host`); the last two
                     are lost with their node, so the next node keeps a second copy
    host             what lies behind the devices (default: the machine's own link and storage)
    store_bytes_per_s, store_bytes   of the file system in all (default: STORE_BYTES_PER_S a device, without end)
    hidden_seconds   asynchronously: the steps go on for so long (until the next update) beside the copy to the host, which
                     is then written beside all that follows, which it is taken not to slow; None: the steps wait for the whole

    Raises NarrowsError for a place that the cluster lacks, or in which the new checkpoint has no room beside the old one.
    """
    if to not in PLACES:
        raise NarrowsError(f"{to!r} is no place for checkpoints.", where="checkpoint", remedy=f"Use {', '.join(PLACES)}.")
    if not 0 < held_bytes < math.inf or devices < 1:
        problem = f"{held_bytes:g} bytes of {devices} devices."
        raise NarrowsError(problem, where="checkpoint", remedy="Give more than 0 of both.")
    machine, each = cluster.machine, held_bytes / devices
    beside, disk, out = cluster.devices_per_node, machine.storage, cluster.scale_out
    nodes = -(-devices // beside)
    if to == "host" and nodes == 1:
        raise NarrowsError("there is one node, whose memory is lost with it.", where="checkpoint: host", remedy="Use the store.")
    if to == "disk" and host is None and disk is None:
        problem = f"it is not known what disks lie behind {machine.name}."
        raise NarrowsError(problem, where="checkpoint: disk", remedy="Give a host (`--host`), or use the store.")
    if to == "store":
        write = read = (store_bytes_per_s or STORE_BYTES_PER_S * devices) / devices
        room = store_bytes / devices
    elif to == "host":
        write = read = math.inf
        room = host.memory_bytes / beside if host else math.inf
    elif host:
        write, read, room = host.write_bytes_per_s, host.read_bytes_per_s, host.disk_bytes / beside
    elif disk:
        write, read, room = disk.bandwidth_bytes_per_s, disk.bandwidth_bytes_per_s, disk.capacity_bytes
    copies = 2 if to != "store" and nodes > 1 else 1
    if 2 * copies * each > room:
        kept = "the old one and the new one" + ", here and on the next node," * (copies - 1)
        problem = f"{kept} take {format_bytes(2 * copies * each)} of each device, and it has {format_bytes(room)}."
        raise NarrowsError(problem, where=f"checkpoint: {to}", remedy="Give more room, or write elsewhere.")
    link = host.link_bytes_per_s if host else machine.host_link.bandwidth_bytes_per_s if machine.host_link else math.inf
    wire = out.bandwidth_bytes_per_s if out and nodes > 1 else math.inf
    copy, store, read_seconds = each / link, each / min(write, wire), each / min(link, read, wire)
    if hidden_seconds is None:
        return Checkpoint(max(copy, store), 0.0, read_seconds)
    stall = max(0.0, copy - hidden_seconds)
    return Checkpoint(stall, copy + store - stall, read_seconds)
