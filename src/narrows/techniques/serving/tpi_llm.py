"""Serve a model far larger than a device's memory on a few of them at home: tensor parallel, weights read as they are needed.

Each device keeps a window of blocks (a layer's attention, or its feed-forward part) and reads the next from its own disk while
the ones before are computed and their results summed. Sums of a token are small, so that what counts is how often a message is
waited for: all devices send to one, and that one to all, in two messages where a ring takes two for each device.

## When it helps
One user, several devices of little memory each with a disk of its own, and a network whose latency is long beside its messages.

## When it does not
A model that fits is slower when read from disk for each token. Prompts of more than some tokens are bound by what one device
receives from all others; a ring is then faster.

## Reference
Li et al., TPI-LLM: Serving 70B-scale LLMs Efficiently on Low-resource Edge Devices, 2024, arXiv 2410.00531. The baseline is one
device that reads a layer, computes it, and frees it, as Accelerate does.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, log2
from typing import ClassVar

from narrows.cost import Limit
from narrows.costmodel import op_time
from narrows.errors import NarrowsError
from narrows.graph import Graph, Op
from narrows.host import host
from narrows.kinds import COLLECTIVES
from narrows.machine import Machine
from narrows.parallel import is_layer, layer_count, require_cut, tensor_parallel
from narrows.simulate.schedule import Need, Task, play
from narrows.simulate.timeline import Timeline
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

SUMS = ("star", "ring", "tree")


@dataclass(frozen=True)
class Block:
    """A run of operators up to the next sum: bytes of weights and cache of one device, seconds, bytes that are summed."""

    weight_bytes: float
    cache_bytes: float
    seconds: float
    sum_bytes: float


@dataclass(frozen=True)
class TPILLM(Measures):
    """A step of one user on several devices that read their share of the weights from disk, block by block."""

    card: ClassVar[Card] = Card(
        "tpi-llm",
        relieves=(Limit.CAPACITY, Limit.STORAGE, Limit.COMMUNICATION),
        phases=("prefill", "decode"),
        exact=True,
        price="every token reads all weights from disk",
        claims=(
            Claim("peak", "GB", 3.1, "Llama-2-70B in fp32 on 8 devices, a context of 1024, two layers in the window: the device "
                  "that also has embedding and output", "abstract", "simulated", "15 % either way", at_least=2.6, at_most=3.6),
            Claim("token_saved", "of the latency", 0.8, "the same, a token on 8 desktops, 1 Gb/s and 3 ms apart, beside "
                  "one that reads each block before it computes it", "abstract: 80 % less than Accelerate", "simulated",
                  "the paper's least", at_least=0.8),
            Claim("star_gain", "x", None, "time of a token's sums on the same 8 devices, the better of ring and tree over ours",
                  "abstract: link latency, not bandwidth", "checked", "three messages each way for one, and what they carry",
                  at_least=1.5, at_most=3.0),
        ),
    )  # fmt: skip
    devices: int = choice(8, 2, 4, 16)
    window: int = choice(4, 2, 8, help="blocks whose weights a device keeps")
    sums: str = choice("star", *SUMS[1:], help="how results are summed")
    latency: float = choice(3e-3, 1e-4, 1e-2, help="seconds from one device to another")
    host: str = choice("1-ssd", help="whose disk each device reads")
    bandwidth: float = choice(125e6, 37.5e6, 1.25e9, help="bytes a second of a device's network, each way")

    def __post_init__(self) -> None:
        host(self.host)
        if min(self.devices, self.window) < 1 or self.sums not in SUMS or self.latency < 0 or self.bandwidth <= 0:
            asked = (
                f"devices={self.devices}, window={self.window}, sums={self.sums}, latency={self.latency}, {self.bandwidth} B/s."
            )
            raise NarrowsError(asked, where=self.card.slug, remedy=f"Give one or more of each, and one of {', '.join(SUMS)}.")

    def baseline(self) -> "TPILLM":
        return replace(self, devices=1, window=1)

    def sum_seconds(self, size: float) -> float:
        """Seconds in which all devices come to the sum of `size` bytes of each."""
        n, wire = self.devices, size / self.bandwidth
        if n == 1:
            return 0.0
        return {"star": 2 * (self.latency + (n - 1) * wire), "ring": 2 * (n - 1) * (self.latency + wire / n),
                "tree": 2 * ceil(log2(n)) * (self.latency + wire)}[self.sums]  # fmt: skip

    def blocks(self, graph: Graph, machine: Machine, step: Step) -> Iterator[Block]:
        """The blocks of a device in the order of the step, each ended by a sum; embedding and output are no blocks."""
        require_cut(graph, self.devices)
        cut, deep = tensor_parallel(graph, max(self.devices, 2)), layer_count(graph)
        share = 1 if self.devices > 1 else 2  # cut in two to find where sums are: one device has both halves
        runs: list[list[Op]] = [[]]
        for op in (op for op in cut if is_layer(op)):
            runs[-1].append(op)
            if op.kind in COLLECTIVES:
                runs.append([])
        for _ in range(deep):
            for run in filter(None, runs):
                own = [replace(op, repeat=1) for op in run if op.kind not in COLLECTIVES]
                sums = [op for op in run if op.kind in COLLECTIVES]
                yield Block(share * sum(op.stored_bytes for op in own), share * sum(_cached(op, step) for op in own),
                            share * sum(float(op_time(op, step, machine).seconds) for op in own),
                            sum(float(op.sized(step)["elements"]) * op.act.bits / 8 for op in sums))  # fmt: skip

    def play(self, graph: Graph, machine: Machine, step: Step) -> Timeline:
        """A step: disk, device and network as resources."""
        tasks: list[Task] = []

        def add(name: str, on: str, seconds: float, *after: int) -> int:
            needs: tuple[Need, ...] = tuple((one, 0.0) for one in after if one >= 0)
            tasks.append(Task(f"{name} {len(tasks)}", name, on, seconds, needs))
            return len(tasks) - 1

        done, disk = list[int](), host(self.host).read_bytes_per_s
        for block in self.blocks(graph, machine, step):
            free = done[-self.window] if len(done) >= self.window else -1
            came = add("read", "disk", block.weight_bytes / disk, free)
            last = add("compute", "device", block.seconds, came, done[-1] if done else -1)
            done.append(add("sum", "network", self.sum_seconds(block.sum_bytes), last))
        return play(tasks)

    def peak_bytes(self, graph: Graph, machine: Machine, step: Step) -> float:
        """What the device holds that also has embedding and output: these, its window, and its share of the cache."""
        ends = sum(op.stored_bytes for op in graph if not is_layer(op))
        sizes = [(block.weight_bytes, block.cache_bytes) for block in self.blocks(graph, machine, step)]
        most = max(sum(weights for weights, _ in sizes[i : i + self.window]) for i in range(len(sizes) or 1))
        return ends + most + sum(cache for _, cache in sizes)

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Seconds of the step, the peak of memory, and how busy disk, device and network are; one device beside it."""
        rows, cuts = [], any(op.split for op in graph)  # what nobody knows how to cut stays on one device
        for way in (self, self.baseline()) if cuts else (self.baseline(),):
            timeline = way.play(graph, machine, step)
            busy = {str(on): seconds / timeline.seconds for on, seconds in timeline.busy_seconds.items()}
            rows.append(
                {"devices": way.devices, "seconds": timeline.seconds, "peak, B": way.peak_bytes(graph, machine, step), **busy}
            )
        return Reading({"seconds": rows[0]["seconds"], "peak_bytes": rows[0]["peak, B"]}, {"seconds": "s", "peak_bytes": "B"},
                       tuple(rows))  # fmt: skip


def _cached(op: Op, step: Step) -> float:
    """Bytes of keys and values that an operator keeps of what it has read."""
    if op.kind != "attention":
        return 0.0
    dims = op.sized(step)
    return float(dims["context"] * dims["kv_heads"] * (dims["head_dim"] + dims["value_dim"])) * op.act.bits / 8
