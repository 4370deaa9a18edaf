"""One training step of a model that does not fit its device: weights, optimizer states and activations lie on the host or a disk.

The network is a row of equal blocks. Each is a handful of tasks on the device, the wire to other devices, the link to the host in
and out, the disk that reads and writes, and the processor; what needs what says the policy, and the schedule engine plays
them. Rates are of one device: of a host that several share, each has its part.
"""

from dataclasses import dataclass

from narrows.backward import training
from narrows.cost import cost
from narrows.costmodel import op_time
from narrows.errors import NarrowsError
from narrows.graph import DType, Graph, Op
from narrows.host import Host
from narrows.layout import Layout
from narrows.machine import Cluster, Link, Machine
from narrows.simulate.memory import memory
from narrows.simulate.network import Axes, constants, network, wire
from narrows.simulate.schedule import Need, Task, play
from narrows.simulate.timeline import Timeline
from narrows.simulate.training import spent
from narrows.step import Step

WEIGHT_BYTES, STATE_BYTES, GRADIENT_BYTES = 2, 12, 4  # of a parameter: 16 bits; fp32 copy and two moments; fp32
PLACES = ("device", "host", "disk")


@dataclass(frozen=True, slots=True)
class Block:
    """One of `count` equal blocks: parameters that this device brings in and updates, seconds, and bytes kept for backward.

    parameters   whose weights come over this device's link;  updated   whose states this device's share of the host updates
    backward     with what is computed again;  gather   seconds of the exchange among devices each time the weights come
    """

    count: int
    parameters: float
    updated: float
    forward: float
    backward: float
    kept_bytes: float
    gather: float = 0.0


@dataclass(frozen=True, slots=True)
class Policy:
    """Where things lie, and what may run beside what.

    weights, states, kept   device, host or disk (kept: bytes for the backward pass)
    ahead     blocks whose weights may come in before they are needed; 0: a block waits for its own
    early     a block is updated as soon as its gradients are there; otherwise after the whole backward pass
    piped     reading, updating and writing states of different blocks run beside each other
    gradients where they wait, in fp32, for an update that is not early;  tiles   pieces that a block's weights come in
    """

    weights: str = "host"
    states: str = "disk"
    kept: str = "host"
    ahead: int = 2
    early: bool = True
    piped: bool = True
    gradients: str = "host"
    tiles: int = 1

    def __post_init__(self) -> None:
        for name in ("weights", "states", "kept", "gradients"):
            if getattr(self, name) not in PLACES:
                raise NarrowsError(
                    f"{getattr(self, name)!r} is no place.", where=f"offload: {name}", remedy=f"Use {', '.join(PLACES)}."
                )


def play_offloaded(block: Block, host: Host, policy: Policy) -> Timeline:
    """A step: blocks forward, backward in reverse, and their updates. Resources are named as in the module's first words."""
    if block.count < 1:
        raise NarrowsError(f"{block.count} blocks.", where="offload", remedy="Give one or more.")
    tasks: list[Task] = []

    def add(name: str, i: int, on: str, seconds: float, *needs: int) -> int:
        wanted: tuple[Need, ...] = tuple((need, 0.0) for need in needs if need >= 0)
        tasks.append(Task(f"{name} {i}", name, on, seconds, wanted))
        return len(tasks) - 1

    weight, kept, link = block.parameters * WEIGHT_BYTES, block.kept_bytes, host.link_bytes_per_s

    def bring(i: int, done: list[int], back: bool) -> list[int]:
        """What a block needs besides its turn: weights, and backward what was kept, when those `ahead` before it are done."""
        free, came = done[-1 - policy.ahead] if len(done) > policy.ahead else -1, -1
        for what, place, size in (("weights", policy.weights, weight), ("kept", policy.kept, kept * back)):
            if place != "device" and size:
                read = add(f"read {what}", i, "disk read", size / host.read_bytes_per_s, free) if place == "disk" else free
                came = add(f"{what} in", i, "in", size / link, read, free)
        return [*done[-1:], came, *([add("gather", i, "wire", block.gather, came, free)] if block.gather else [])]

    done: list[int] = []
    for i in range(block.count):
        done.append(add("forward", i, "device", block.forward, *bring(i, done, False)))
        if policy.kept != "device":
            out = add("kept out", i, "out", kept / link, done[-1])
            if policy.kept == "disk":
                add("write kept", i, "disk write", kept / host.write_bytes_per_s, out)
    gone: list[int] = []
    for i in reversed(range(block.count)):
        done.append(add("backward", i, "device", block.backward, *bring(i, done, True)))
        summed = add("scatter", i, "wire", block.gather, done[-1]) if block.gather else done[-1]
        gone.append(add("gradients out", i, "out", weight / link, summed) if policy.states != "device" else summed)
    last = -1
    if policy.states == "device":
        return play(tasks)
    waits = block.updated * GRADIENT_BYTES * (policy.gradients == "disk" and not policy.early)
    states = block.updated * STATE_BYTES
    for at, i in enumerate(reversed(range(block.count))):
        start = gone[at] if policy.early else gone[-1]
        if waits:
            add("write gradients", i, "disk write", waits / host.write_bytes_per_s, gone[at])
        wait = -1 if policy.piped else last
        if policy.states == "disk":
            wait = add("read states", i, "disk read", (states + waits) / host.read_bytes_per_s, start, wait)
        last = add("update", i, "processor", block.updated / host.adam_per_s, start, wait)
        if policy.states == "disk":
            both = states + block.updated * WEIGHT_BYTES * (policy.weights == "disk")
            last = add("write states", i, "disk write", both / host.write_bytes_per_s, last)
    # states give way to weights and activations, which the device waits for
    return play([task._replace(priority=float(task.kind in ("read states", "write states"))) for task in tasks])


@dataclass(frozen=True, slots=True)
class Offloaded:
    """A model on `devices` of one kind: its blocks, parameters of all, and what a device needs at once."""

    block: Block
    devices: int
    parameters: float
    working_bytes: float
    flop: float
    dtype: DType

    def held(self, policy: Policy) -> dict[str, float]:
        """Bytes of each place: of one device, and of host and disk for all devices.

        Until an update after the whole backward pass all gradients wait in fp32, as DeepSpeed keeps them.
        """
        states = STATE_BYTES * self.parameters
        found = dict.fromkeys(PLACES, 0.0)
        for place, size in ((policy.weights, WEIGHT_BYTES * self.parameters), (policy.states, states),
                            (policy.kept, self.block.kept_bytes * self.block.count * self.devices)):  # fmt: skip
            found[place] += size / (self.devices if place == "device" else 1)
        whole = self.parameters / self.block.count * WEIGHT_BYTES / policy.tiles
        found["device"] += self.working_bytes + whole * (policy.ahead + 2)  # blocks at hand and on their way, and a gradient
        if policy.kept != "device":
            found["device"] += self.block.kept_bytes * (policy.ahead + 1)
        if policy.states == "device":
            found["device"] += WEIGHT_BYTES * self.parameters / self.devices
        elif not policy.early:
            found[policy.gradients] += GRADIENT_BYTES * self.parameters
        return found

    def fits(self, machine: Machine, host: Host, policy: Policy, nodes: int = 1) -> bool:
        """Whether every place holds what is put there."""
        room = (machine.memory.capacity_bytes, host.memory_bytes * nodes, host.disk_bytes * nodes)
        return all(size <= most for size, most in zip(self.held(policy).values(), room, strict=True))

    def tflop_per_s(self, host: Host, policy: Policy) -> float:
        """FLOP/s of a device in units of 1e12: those of the model, without any computed again."""
        return self.flop / self.devices / play_offloaded(self.block, host, policy).seconds / 1e12


def alone(machine: Machine) -> Cluster:
    """A single device as a cluster."""
    link = machine.link or machine.host_link or Link("none", 1.0, 1.0)  # one device sends nothing
    return Cluster(machine.name, machine.title, machine, 1, 1, link, None, "switch", {})


def offloaded(graph: Graph, group: Cluster, devices: int, batch: int, sequence: int, redo: str = "full") -> Offloaded:
    """A decoder as ZeRO-3 spreads it over devices that take `batch` sequences each; embedding and output are spread evenly."""
    layout = Layout(data=devices, shard=3, microbatch=batch, recompute=redo)
    net, axes = network(graph, group, layout, sequence, framework="deepspeed"), Axes.of(layout)
    parts = [spent(part, group, layout, axes, "deepspeed").causes for part in (net.layer, net.first, net.last)]
    ahead, back = (
        [float(sum(part[cause] for cause in causes)) for part in parts] for causes in (("forward",), ("backward", "recompute"))
    )
    parameters = net.layers * (net.layer.owned + net.layer.experts) + net.first.owned + net.last.owned
    each = parameters / net.layers
    on, gather = wire(group, 1, devices, constants("deepspeed")["network"]), 0.0
    if devices > 1:
        op = Op("gather", "all_gather", {"elements": each, "ranks": devices}, act=net.dtype)
        gather = float(op_time(op, Step.train(1, 1), on).seconds)
    block = Block(net.layers, each / devices, each / devices, ahead[0] + sum(ahead[1:]) / net.layers,
                  back[0] + sum(back[1:]) / net.layers, float(net.layer.saved[axes.redo, 0]), gather)  # fmt: skip
    needs = memory(net, layout, axes, 0, "deepspeed")
    step = Step.train(batch * devices, sequence)
    flop = sum(float(cost(op, step).flop) for op in training(graph) if op.spec.matmul and op.phase != "update")
    return Offloaded(block, devices, parameters, float(needs.working + needs.runtime), flop, net.dtype)
