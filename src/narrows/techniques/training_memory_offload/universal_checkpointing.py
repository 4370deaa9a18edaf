"""Save what each rank has, as it has it; turn it into one atom per parameter when it is needed elsewhere, and load that anywhere.

A file of fragments says of which tensor each is a part, and where in it. Saving therefore costs what any sharded save costs.
Offline, fragments are joined into atoms, a file for each parameter with its optimizer states, of which the ranks of any other
layout read the slices that they hold.

## When it helps
Going on with fewer devices after a failure, or with more; changing the layout as a run grows; fine-tuning what was trained
elsewhere.

## When it does not
Going on in the same layout: then the fragments are what is needed, and joining them reads and writes everything once more.

## Reference
Lian et al., Universal Checkpointing: Efficient and Flexible Checkpointing for Large Scale Distributed Training,
arXiv 2406.18820. Their pattern language describes frameworks' files; here a fragment carries its place itself.
"""

from dataclasses import dataclass
from typing import ClassVar

from narrows.cost import Limit
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

MASTER_BYTES = 12  # of a parameter, beside its weight: two moments of Adam, and a master copy where weights have 16 bits


@dataclass(frozen=True)
class UniversalCheckpointing(Measures):
    """What a checkpoint holds, and what it takes to save it and to make it independent of the layout."""

    card: ClassVar[Card] = Card(
        "universal-checkpointing",
        relieves=(Limit.STORAGE,),
        phases=("train",),
        exact=True,
        price="everything is read and written once when the layout changes",
        claims=(
            Claim("resumed", "of pairs", None, "weights and moments equal bit for bit, saved by a small Llama in one layout and "
                  "loaded in another: 9 pairs of tensor = 2, data = 2 with ZeRO-3, tensor = 2 x pipeline = 2",
                  "abstract: resuming on arbitrary parallelism strategy", "run", "equal or not", at_least=1.0),
            Claim("continued", "of the largest number", None, "weights and moments after four steps: four ranks did some, "
                  "until one was killed, two the rest in another layout, against an undisturbed run; infinite if they stop",
                  "abstract: continued training on remaining healthy hardware", "run", "rounding alone", at_most=1e-9),
            Claim("save_cost", "x", 1.0, "bytes that four ranks wrote over those of weights and moments; infinite if another "
                  "layout cannot load them", "section 3.2: distributed representation for saving", "run",
                  "headers of small tensors take a twentieth", at_most=1.05),
        ),
    )  # fmt: skip
    devices: int = choice(64, 2, 8, 512, help="that save, each its part")
    universal: bool = choice(True, False, help="without it: a rank reads what the rank of its number wrote")

    def baseline(self) -> "UniversalCheckpointing":
        return UniversalCheckpointing(self.devices, False)

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Bytes of a checkpoint and of a device's part; with the machine's storage, seconds to save it and to join it."""
        whole = sum(op.weight_bytes + op.parameters * (MASTER_BYTES - 4 * ((op.weight or op.act).bits >= 32)) for op in graph)
        values = {"checkpoint_bytes": whole, "device_bytes": whole / self.devices}
        if machine.storage:
            rate = machine.storage.bandwidth_bytes_per_s
            values |= {"save_seconds": whole / self.devices / rate, "join_seconds": 2 * whole / rate * self.universal}
        return Reading(values, {name: "s" if name.endswith("seconds") else "B" for name in values})
