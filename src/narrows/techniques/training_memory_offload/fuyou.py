"""Fine-tune a model that fits neither the device nor the host's memory: states, weights and activations go to SSDs, unseen.

Each block is updated by the processor as soon as its gradients arrive, its states read from and written to the disks
meanwhile, so that the update hides behind the backward pass; nothing waits on the host for the end. Activations are swapped
out or computed again, in the shares that take the least time; transfers run ahead of the blocks that need them.

## When it helps
One consumer device, little host memory, several SSDs: with a batch large enough the device never waits.

## When it does not
Small batches: a step is no faster than its states go to the disks and back. One SSD is as much too slow, and wears out.

## Reference
Liao et al., Adding NVMe SSDs to Enable and Accelerate 100B Model Fine-tuning on a Single GPU, 2024, arXiv 2403.06504. FLOP
are the model's, without those computed again. The baseline is ZeRO-Infinity as the paper describes it on such a server:
gradients wait on the host, and after the backward pass states are read, updated and written one after another.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.host import host
from narrows.machine import Machine
from narrows.simulate.offload import Offloaded, Policy, alone, offloaded, play_offloaded
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_13B = "GPT-3 of 13B, 1,024 tokens, RTX 4090, 12 SSDs, the best batch up to 32"


@dataclass(frozen=True, slots=True)
class Plan:
    """A way to run: sequences at once, share of activations that is swapped and not computed again, and what that gives."""

    batch: int
    swapped: float
    policy: Policy
    model: Offloaded
    tflop_per_s: float


@dataclass(frozen=True)
class Fuyou(Measures):
    """Batch, swapped share and places for a model on one device with a host and SSDs behind it."""

    card: ClassVar[Card] = Card(
        "fuyou",
        relieves=(Limit.CAPACITY, Limit.STORAGE),
        phases=("train",),
        exact=True,
        claims=(
            Claim("tflops_13b", "TFLOP/s", 156, _13B, "abstract", "simulated", "within 20 %", 156 * 0.8, 156 * 1.2),
            Claim("gain_13b", "x", 156 / 45, _13B + ", against ZeRO-Infinity with the same batches", "abstract", "simulated",
                  "half of it: our baseline is as fast as its disks, the paper's is not", at_least=1.7),
            Claim("tflops_175b", "TFLOP/s", None, "GPT-3 of 175B on the same server; not a number if it does not fit", "abstract",
                  "simulated", "a third of the device's peak at least is high utilisation for such a size", at_least=55),
            Claim("states_on_disk", "fraction", None, "a small language model, 6 steps with states in files, updated during the "
                  "backward pass; not a number unless every weight is that of Adam, bit by bit", "section 4", "run",
                  "all states", at_least=1.0),
        ),
    )  # fmt: skip
    host: str = choice("12-ssd", "1-ssd", help="what lies behind the device")
    most: int = choice(32, 8, 64, help="largest batch")
    overlapped: bool = choice(True, help="update during the backward pass; False is ZeRO-Infinity")

    def __post_init__(self) -> None:
        host(self.host)

    def baseline(self) -> "Fuyou":
        return replace(self, overlapped=False)

    def policies(self) -> Iterator[Policy]:
        """What lies where, and how much runs beside what."""
        if not self.overlapped:
            yield Policy("host", "disk", "host", ahead=0, early=False, piped=False)
            return
        for ahead in (2, 1):
            for weights in ("host", "disk"):
                for kept in ("host", "disk"):
                    yield Policy(weights, "disk", kept, ahead)

    def plans(self, graph: Graph, machine: Machine, sequence: int) -> Iterator[Plan]:
        """Every way that fits."""
        behind, group, batch = host(self.host), alone(machine), 1
        while batch <= self.most:
            full, none = (offloaded(graph, group, 1, batch, sequence, redo) for redo in ("full", "none"))
            for share in SHARES if self.overlapped else SHARES[:1]:
                block = replace(
                    full.block,
                    backward=full.block.backward + share * (none.block.backward - full.block.backward),
                    kept_bytes=full.block.kept_bytes + share * (none.block.kept_bytes - full.block.kept_bytes),
                )
                model = replace(full, block=block)
                for policy in self.policies():
                    if model.fits(machine, behind, policy):
                        yield Plan(batch, share, policy, model, model.tflop_per_s(behind, policy))
            batch *= 2

    def best(self, graph: Graph, machine: Machine, sequence: int) -> Plan:
        """The fastest way that fits; NarrowsError that names the fullest place where there is none."""
        found = list(self.plans(graph, machine, sequence))
        if not found:
            held = offloaded(graph, alone(machine), 1, 1, sequence).held(list(self.policies())[-1])
            sizes = ", ".join(f"{place} {size / 1e9:.0f} GB" for place, size in held.items())
            raise NarrowsError(
                f"it needs {sizes}.", where=f"{machine.name} with {self.host}", remedy="Give a larger host or device."
            )
        return max(found, key=lambda plan: plan.tflop_per_s)

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """The fastest way to train on sequences of the step's length, one device; a row says how busy each resource is.

        Raises NarrowsError where the model does not fit even so.
        """
        plan = self.best(graph, machine, int(step["tokens"] / step["sequences"]))
        timeline = play_offloaded(plan.model.block, host(self.host), plan.policy)
        held = plan.model.held(plan.policy)
        values = {
            "tflop_per_s": plan.tflop_per_s,
            "batch": float(plan.batch),
            "swapped": plan.swapped,
            "seconds": timeline.seconds,
        }
        values |= {f"{place}_bytes": size for place, size in held.items()}
        units = {"tflop_per_s": "TFLOP/s", "seconds": "s"} | {f"{place}_bytes": "B" for place in held}
        values |= {
            "weights_on_disk": float(plan.policy.weights == "disk"),
            "activations_on_disk": float(plan.policy.kept == "disk"),
        }
        rows = [{"resource": name, "busy": busy / timeline.seconds} for name, busy in timeline.busy_seconds.items()]
        return Reading(values, units, tuple(rows))
