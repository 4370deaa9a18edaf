"""Train a model larger than all devices of a server by ordering its work around what must be swapped, not the reverse.

A device with virtual memory swaps what it has used least recently: every microbatch passes through all layers, so each brings
every layer's weights in, and out, twice. Harmony runs all microbatches through a layer while its weights are there, forward and
again backward, updates the layer as soon as its gradients are complete, gives each device other layers, and hands activations
from device to device.

## When it helps
Weights, gradients and moments that exceed the memory of all devices, several microbatches a step, and a host's link that devices
share, as in servers of consumer cards.

## When it does not
Models that fit, if need be over the devices of a server: nothing is swapped. One microbatch a step leaves little to group.

## Reference
Li et al., Harmony: Overcoming the Hurdles of GPU Memory Capacity to Train Massive DNN Models on Commodity Servers, VLDB 2022,
arXiv 2202.01306. The baseline is data parallelism over virtual memory, least recently used out first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.host import Host, host
from narrows.machine import Machine
from narrows.simulate.offload import alone, offloaded
from narrows.simulate.pipeline import Pass
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

STATE_BYTES = 8  # of a parameter: Adam's two moments in fp32

Tensor = tuple[str, int, int]  # weight, gradient, moments or input; its layer; its microbatch, or 0


class Use(NamedTuple):
    """One kernel of a device: seconds, tensors that must be there, of them those that it makes, and what it frees."""

    seconds: float
    reads: tuple[Tensor, ...]
    makes: tuple[Tensor, ...] = ()
    frees: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Layers:
    """`count` equal layers: bytes of the weights and moments of one, and of a microbatch's input; seconds of its passes.

    backward  with the forward pass that it does again: a layer keeps its input alone
    """

    count: int
    weight_bytes: float
    moment_bytes: float
    input_bytes: float
    forward: float
    backward: float

    def size(self, tensor: Tensor) -> float:
        """Bytes of a tensor by its name."""
        weight = self.weight_bytes
        return {"weight": weight, "gradient": weight, "moments": self.moment_bytes, "input": self.input_bytes}[tensor[0]]


@dataclass(frozen=True)
class Swapped:
    """A device's step: bytes to and from the host by what they are, from other devices, and seconds of its kernels."""

    moved_bytes: dict[str, float]
    peer_bytes: float
    busy: float

    def seconds(self, behind: Host, ahead: bool) -> float:
        """Of the step: kernels wait for what they need, or run beside what later ones need (`ahead`)."""
        ways = [self.busy, sum(self.moved_bytes.values()) / behind.link_bytes_per_s, self.peer_bytes / behind.link_bytes_per_s]
        return max(ways) if ahead else sum(ways)


def swapped(uses: Iterable[Use], layers: Layers, capacity_bytes: float) -> Swapped:
    """Kernels on a device that keeps what it used last, and the rest on the host; NarrowsError where one does not fit.

    An input that is read and not there was made by another device, which hands it on, unless it was put out.
    """
    there, out = OrderedDict[Tensor, float](), set[Tensor]()
    held = busy = peer = 0.0
    moved = dict.fromkeys(("weight", "gradient", "moments", "input"), 0.0)
    for use in uses:
        busy += use.seconds
        needed = {*use.reads, *use.makes}
        if sum(map(layers.size, needed)) > capacity_bytes:
            problem = f"{sum(map(layers.size, needed)) / 1e9:.3g} GB of one layer do not fit {capacity_bytes / 1e9:.3g} GB."
            raise NarrowsError(problem, where="harmony", remedy="Give smaller microbatches or a larger device.")
        for tensor in (*use.reads, *use.makes):
            size = layers.size(tensor)
            if tensor in there:
                there.move_to_end(tensor)
                continue
            while held + size > capacity_bytes:
                oldest = next(name for name in there if name not in needed)
                held -= there[oldest]
                moved[oldest[0]] += there.pop(oldest)
                out.add(oldest)
            there[tensor], held = size, held + size
            if tensor in out or tensor[0] in ("weight", "moments"):
                moved[tensor[0]] += size
            elif tensor not in use.makes:
                peer += size
        for tensor in use.frees:
            held -= there.pop(tensor)
            out.discard(tensor)
    return Swapped(moved, peer, busy)


@dataclass(frozen=True)
class Harmony(Measures):
    """What a step swaps on a server whose devices do not hold the model, and how long it takes, by the order of its work."""

    card: ClassVar[Card] = Card(
        "harmony",
        relieves=(Limit.CAPACITY, Limit.BANDWIDTH),
        phases=("train",),
        exact=True,
        price="each layer computes its forward pass again; inputs of all microbatches wait in the host's memory",
        claims=(
            Claim("swap_load", "x less", 100, "OPT-13B in fp32, 4 T4 on one PCIe 3.0 way, 16 sequences each: bytes to and from "
                  "the host, virtual memory over ours", "abstract: up to two orders of magnitude", "simulated",
                  "the row asks for 10 to 100", at_least=10, at_most=200),
            Claim("throughput", "x", 7.6, "the same, in time", "abstract: up to 7.6x", "simulated",
                  "a third either way of the paper's most", at_least=5.1, at_most=10.1),
            Claim("weight_swaps", "of 3 |W|", None, "the same: bytes of weights that all devices move, over thrice the model's",
                  "counted by hand: in for each pass, out after the update", "checked", "less what stays between passes",
                  at_most=1.0),
            Claim("visits", "a layer", 2, "a small language model, 4 microbatches: times a layer's weights are turned to; not "
                  "a number unless the gradients are those of one batch, to 1e-9", "counted by hand", "run",
                  "forward and backward; the last layer's are one", at_most=2),
        ),
    )  # fmt: skip
    devices: int = choice(4, 2, 8, help="of the server; each takes every so-manyth layer")
    grouped: bool = choice(True, help="all microbatches through a layer at once; False: virtual memory, each its own replica")
    host: str = choice("4x-pcie3", "1-ssd", help="what lies behind each device")

    def __post_init__(self) -> None:
        host(self.host)
        if self.devices < 1:
            raise NarrowsError(f"devices={self.devices}.", where=self.card.slug, remedy="Give one or more.")

    def baseline(self) -> "Harmony":
        return replace(self, grouped=False)

    def layers(self, graph: Graph, machine: Machine, sequence: int) -> Layers:
        """The layers of a decoder, for microbatches of one sequence; embedding and output are spread evenly."""
        block = (model := offloaded(graph, alone(machine), 1, 1, sequence)).block
        sizes = (block.parameters * model.dtype.bits / 8, block.parameters * STATE_BYTES, block.kept_bytes)
        return Layers(block.count, *sizes, block.forward, block.backward)

    def passes(self, own: Sequence[int], microbatches: int) -> Iterator[Pass]:
        """The order in which a device runs microbatches through layers of its own."""
        many = range(microbatches)
        if self.grouped:
            yield from (Pass("F", at, m) for at in own for m in many)
            yield from (Pass("B", at, m) for at in reversed(own) for m in many)
        for m in many if not self.grouped else ():
            yield from (Pass("F", at, m) for at in own)
            yield from (Pass("B", at, m) for at in reversed(own))

    def uses(self, layers: Layers, microbatches: int) -> Iterator[Use]:
        """The kernels of the first device, in turn, where each device has so many microbatches a step."""
        own = range(0, layers.count, self.devices if self.grouped else 1)
        many = microbatches * (self.devices if self.grouped else 1)
        for kind, at, m in self.passes(own, many):
            weight, gradient, given = ("weight", at, 0), ("gradient", at, 0), ("input", at, m)
            if kind == "F":
                handed = ("input", at + 1, m)
                yield Use(layers.forward, (weight, given), (handed,) if at + 1 in own else ())
            else:
                first = m == 0
                yield Use(layers.backward, (weight, given) if first else (weight, given, gradient), (gradient,) * first, (given,))
            if kind == "B" and self.grouped and m == many - 1:
                yield _update(at)
        if not self.grouped:
            yield from map(_update, own)

    def step(self, layers: Layers, machine: Machine, microbatches: int) -> Swapped:
        """What one device does in a step."""
        return swapped(self.uses(layers, microbatches), layers, machine.memory.capacity_bytes)

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Seconds of a step and bytes that one device moves; the same for virtual memory beside it."""
        sequence = int(step["tokens"] / step["sequences"])
        layers, behind = self.layers(graph, machine, sequence), host(self.host)
        many, found, rows = max(1, int(step["sequences"]) // self.devices), dict[str, float](), []
        for way in (self, replace(self, grouped=not self.grouped)):
            one = way.step(layers, machine, many)
            total = {"seconds": one.seconds(behind, way.grouped), "swapped_bytes": sum(one.moved_bytes.values())}
            moved = {f"{what}, B": size for what, size in {**one.moved_bytes, "peers": one.peer_bytes}.items()}
            rows.append({"order": "Harmony" if way.grouped else "virtual memory", "seconds": total["seconds"], **moved})
            found = found or total
        return Reading(found, {"seconds": "s", "swapped_bytes": "B"}, tuple(rows))


def _update(layer: int) -> Use:
    gradient = ("gradient", layer, 0)
    return Use(0.0, (("weight", layer, 0), gradient, ("moments", layer, 0)), (), (gradient,))
