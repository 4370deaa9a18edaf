"""Copy weights and optimizer states to host memory while the next forward and backward pass leave them alone; write from there.

Between two updates nothing of a checkpoint changes. So nothing has to stop: tensors are copied to buffers that were set aside
beforehand, the update waits until the last copy is done, and a thread writes the buffers to storage meanwhile.

## When it helps
Frequent checkpoints, up to one for each step, of states that take seconds to write.

## When it does not
The host needs memory for a whole copy. What copies longer than forward and backward pass take makes the update wait, and
what writes longer than the time between two checkpoints makes the next one wait. On a host whose cores are all busy the
writing takes time from the steps: training on CPUs gains little.

## Reference
Maurya et al., DataStates-LLM: Lazy Asynchronous Checkpointing for Large Language Models, HPDC 2024, arXiv 2406.10707.
"""

from dataclasses import dataclass
from typing import ClassVar

from narrows.backward import training
from narrows.cost import Limit
from narrows.costmodel import op_time
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.simulate.schedule import Task, play
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

MASTER_BYTES = 12  # of a parameter, beside its weight: a master copy and two moments of Adam
WRITE_BYTES_PER_S = 1e9  # of one device to a shared file system, where the machine names no storage of its own


def seconds(steps: int, busy: float, update: float, copy: float, store: float, lazy: bool) -> float:
    """Of so many steps with a checkpoint after each: `busy` is forward and backward, `copy` to the host, `store` to storage.

    Lazily, a copy runs beside the next passes and ends before the next update; one copy fits the host, so the next waits
    for it to be stored. Otherwise nothing runs beside either.
    """
    tasks: list[Task] = []
    for i in range(steps):
        before, at = 4 * (i - 1), 4 * i
        blocked = () if lazy or not i else ((before + 3, 0.0),)
        held = ((before + 2, 0.0),) if lazy and i else ()
        free = ((before + 3, 0.0),) if i else ()
        tasks += [Task(f"passes {i}", "compute", "device", busy, blocked), Task(f"update {i}", "update", "device", update, held),
                  Task(f"copy {i}", "copy", "link", copy, ((at + 1, 0.0), *free)),
                  Task(f"store {i}", "store", "storage", store, ((at + 2, 0.0),))]  # fmt: skip
    return play(tasks).seconds


@dataclass(frozen=True)
class DataStates(Measures):
    """For how long checkpoints hold training up."""

    card: ClassVar[Card] = Card(
        "datastates-llm",
        relieves=(Limit.STORAGE,),
        phases=("train",),
        exact=True,
        price="host memory for a copy of weights and optimizer states",
        claims=(
            Claim("stall", "x", 48.0, "seconds for which a checkpoint of 63 MB every third step holds up two ranks that train a "
                  "small Llama, written before training goes on over ours: lower quartiles of 8; 0 unless a run that was killed "
                  "goes on from ours bit for bit", "abstract", "run", "the row asks for tenfold", at_least=10.0),
            Claim("end_to_end", "x", 2.2, "32 steps of Llama-2-13B on 32 A100 (tensor = 4, ZeRO-1 over 8), batch 64 of 2,048 "
                  "tokens, a checkpoint after each, 1 GB/s of storage a device", "abstract", "simulated",
                  "the direction: a step and a write that overlap save half of both at most; the paper's baseline also writes "
                  "more slowly", at_least=1.3),
        ),
    )  # fmt: skip
    devices: int = choice(32, 1, 8, 256, help="that share a checkpoint, each its part")
    lazy: bool = choice(True, False, help="without it: training waits until everything is written")

    def baseline(self) -> "DataStates":
        return DataStates(self.devices, False)

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Seconds that a checkpoint after each step adds to it, on one of the devices among which the work is split evenly."""
        whole = training(graph)
        spent = {phase: sum(float(op_time(op, step, machine).seconds) for op in whole if (op.phase == "update") == phase)
                 / self.devices for phase in (False, True)}  # fmt: skip
        held = sum(op.weight_bytes + op.parameters * MASTER_BYTES for op in graph) / self.devices
        rate = machine.storage.bandwidth_bytes_per_s if machine.storage else WRITE_BYTES_PER_S
        copy = held / machine.host_link.bandwidth_bytes_per_s if machine.host_link else 0.0
        ours = seconds(8, spent[False], spent[True], copy, held / rate, self.lazy) / 8 - spent[False] - spent[True]
        values = {"device_bytes": held, "step_seconds": spent[False] + spent[True], "copy_seconds": copy,
                  "store_seconds": held / rate, "added_seconds": ours}  # fmt: skip
        return Reading(values, {name: "B" if name == "device_bytes" else "s" for name in values})
