"""What limits a step: the time of each op and of the whole, split into causes that add up exactly."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from narrows.backward import gradient_exchange, training
from narrows.cost import CAUSES, Cost, Limit, cost
from narrows.costmodel import OpTime, op_time, peak
from narrows.energy import Energy, Load, energy
from narrows.errors import NarrowsError
from narrows.footprint import Footprint, footprint
from narrows.graph import Graph, Op
from narrows.machine import Machine
from narrows.parallel import require_cut, tensor_parallel
from narrows.step import Amount, Step

OUTSIDE = "Outside of the validated domain: {:.0%} of the time rests on constants not measured on this generation of hardware."

# what-if: how Machine.scaled is told to widen a limit
WIDENED: dict[Limit, Callable[[Machine, float], Machine]] = {
    Limit.COMPUTE: lambda machine, factor: machine.scaled(compute=factor),
    Limit.BANDWIDTH: lambda machine, factor: machine.scaled(bandwidth=factor),
    Limit.COMMUNICATION: lambda machine, factor: machine.scaled(link=factor),
    Limit.LAUNCH: lambda machine, factor: machine.scaled(launch=1 / factor),  # seconds: twice as much is half of them
}


@dataclass(frozen=True)
class OpDiagnosis:
    """One op over all its repeats. `bound_seconds` is the roofline at the datasheet's peaks: no kernel can be faster.

    `inside`: the constants behind its time were fitted on measurements of this generation of hardware.
    """

    op: Op
    cost: Cost
    causes: dict[str, float]
    low_seconds: float
    high_seconds: float
    bound_seconds: float
    inside: bool = True

    @property
    def seconds(self) -> float:
        return math.fsum(self.causes.values())

    @property
    def limit(self) -> Limit:
        return _limit(self.causes)

    @property
    def intensity(self) -> float:
        """FLOP per byte of main memory."""
        return float(self.cost.flop) / max(float(self.cost.read_bytes + self.cost.write_bytes), 1.0)


@dataclass(frozen=True)
class Diagnosis:
    """A step on a machine: seconds with an 80 % interval, the causes in a ledger, memory, and what more of each resource gives.

    what_if: for each limit, the speed-up from 10 % more and from twice as much of it.
    """

    model: str
    machine: Machine
    devices: int
    step: Step
    ops: tuple[OpDiagnosis, ...]
    cost: Cost
    footprint: Footprint
    what_if: dict[Limit, tuple[float, float]]
    notes: tuple[str, ...]
    eager: bool = False

    @cached_property
    def ledger(self) -> dict[str, float]:
        """Seconds by cause, largest first; their sum is `seconds`."""
        found: dict[str, list[float]] = {}
        for entry in self.ops:
            for cause, seconds in entry.causes.items():
                found.setdefault(cause, []).append(seconds)
        return dict(sorted(((c, math.fsum(s)) for c, s in found.items()), key=lambda item: -item[1]))

    @cached_property
    def seconds(self) -> float:
        return math.fsum(self.ledger.values())

    @property
    def interval(self) -> tuple[float, float]:
        return math.fsum(o.low_seconds for o in self.ops), math.fsum(o.high_seconds for o in self.ops)

    @property
    def limit(self) -> Limit:
        """What holds the step back: capacity if it does not fit, else the limit with the largest share of the time."""
        return _limit(self.ledger) if self.fits else Limit.CAPACITY

    @property
    def fits(self) -> bool:
        return bool(self.footprint.fits(self.machine))

    @property
    def bound_seconds(self) -> float:
        return math.fsum(o.bound_seconds for o in self.ops)

    @cached_property
    def energy(self) -> Energy | None:
        """What one device draws over the step; None where the machine's power is not known."""
        return energy(self.machine, (_load(o, self.machine) for o in self.ops))


def _load(entry: OpDiagnosis, machine: Machine) -> Load:
    moved = float(entry.cost.read_bytes + entry.cost.write_bytes) / machine.memory.bandwidth_bytes_per_s
    arithmetic = math.fsum(s for cause, s in entry.causes.items() if CAUSES[cause] == Limit.COMPUTE)
    times = (entry.seconds, entry.low_seconds, entry.high_seconds)
    return Load(times, float(entry.cost.flop) / peak(entry.op, machine), moved, arithmetic)


def _limit(causes: dict[str, float]) -> Limit:
    shares: dict[Limit, float] = {}
    for cause, seconds in causes.items():
        shares[CAUSES[cause]] = shares.get(CAUSES[cause], 0.0) + seconds
    return max(shares, key=lambda limit: shares[limit], default=Limit.LAUNCH)


def prepared(graph: Graph, step: Step, machine: Machine, devices: int = 1, replicas: int = 1) -> Graph:
    """The graph that one device executes: cut over `devices`, with backward and optimizer for a training step.

    `replicas` train data-parallel and exchange their gradients over the machine's link.
    """
    for name, count in (("devices", devices), ("replicas", replicas)):
        if count < 1:
            raise NarrowsError(f"{count} is not a number of {name}.", where=name, remedy="Give 1 or more.")
        if count > 1 and not machine.links:
            raise NarrowsError(
                f"{machine.name} has no link to others.", where=name, remedy=f"Give 1 of {name}, or a machine with a link."
            )
    if replicas > 1 and step.phase != "train":
        raise NarrowsError(f"replicas do not meet in a {step.phase} step.", where="replicas", remedy="Use --train, or --devices.")
    if replicas > 1 and devices > 1:
        raise NarrowsError("both cannot share one link here.", where="replicas", remedy="Give --devices or --replicas.")
    require_cut(graph, devices)
    cut = tensor_parallel(graph, devices)
    if step.phase != "train":
        return cut
    return gradient_exchange(training(cut), replicas) if replicas > 1 else training(cut)


def timed(ready: Graph, machine: Machine, step: Step) -> tuple[Amount, Amount, Amount]:
    """(predicted, low, high) seconds of a graph as it stands; arrays where the step's fields are arrays."""
    times = [op_time(op, step, machine, ready.eager) for op in ready if op.runs(step)]
    return sum((t.seconds for t in times), 0.0), sum((t.low for t in times), 0.0), sum((t.high for t in times), 0.0)


def seconds(graph: Graph, machine: Machine, step: Step, devices: int = 1) -> tuple[Amount, Amount, Amount]:
    """(predicted, low, high) seconds of a step; arrays where the step's fields are arrays."""
    return timed(prepared(graph, step, machine, devices), machine, step)


def diagnose(graph: Graph, machine: Machine, step: Step, devices: int = 1, replicas: int = 1) -> Diagnosis:
    """Where the time of one step goes on a machine, what limits it, and what widening each limit would give.

    `devices` > 1 cuts the model over that many by tensor parallelism; `replicas` > 1 train it data-parallel. Raises
    NarrowsError for a step of several points (use `seconds` for those).
    """
    if np.ndim(step["tokens"]):
        raise NarrowsError("the step has several points.", where="diagnose", remedy="Diagnose one at a time, or use `seconds`.")
    ready = prepared(graph, step, machine, devices, replicas)
    ops = tuple(_diagnose_op(op, step, machine, ready.eager) for op in ready if op.runs(step))
    base = math.fsum(o.seconds for o in ops)

    def faster(limit: Limit, factor: float) -> float:
        wider = WIDENED[limit](machine, factor)
        return base / max(float(timed(ready, wider, step)[0]), 1e-300)  # type: ignore[arg-type]

    whole = sum((o.cost for o in ops), Cost())
    what_if = {limit: (faster(limit, 1.1), faster(limit, 2.0)) for limit in WIDENED} if base else {}
    outside = sum(o.seconds for o in ops if not o.inside) / max(base, 1e-300)
    notes = (*ready.notes, OUTSIDE.format(outside)) if outside > 0.2 else ready.notes
    return Diagnosis(graph.name, machine, devices, step, ops, whole, footprint(ready, step), what_if, notes, ready.eager)


def _diagnose_op(op: Op, step: Step, machine: Machine, eager: bool) -> OpDiagnosis:
    time: OpTime = op_time(op, step, machine, eager)
    work = cost(op, step, eager)
    moved = float(work.read_bytes + work.write_bytes) / machine.memory.bandwidth_bytes_per_s
    wire = machine.link or machine.host_link
    sent = float(work.link_bytes) / wire.bandwidth_bytes_per_s if wire else 0.0
    bound = max(float(work.flop) / peak(op, machine), moved, sent)
    causes = {c: float(s) for c, s in time.causes.items()}
    return OpDiagnosis(op, work, causes, float(time.low), float(time.high), bound, time.inside)


def _energy_json(found: Diagnosis) -> dict[str, Any]:
    """Joules of all devices, watts of one; null where the machine's power is not known."""
    spent, n = found.energy, found.devices
    return {
        "energy_joules": spent and spent.joules * n,
        "energy_interval": spent and [joules * n for joules in spent.joules_interval],
        "watts": spent and spent.watts,
        "watts_interval": spent and list(spent.watts_interval),
    }


def as_json(found: Diagnosis) -> dict[str, Any]:
    """A diagnosis as plain data: the stable contract of `narrows diagnose --json` (SI units)."""
    memory = {
        name: round(float(getattr(found.footprint, name)))
        for name in (
            "weights_bytes",
            "kv_bytes",
            "activation_bytes",
            "gradient_bytes",
            "optimizer_bytes",
            "temporary_bytes",
            "total_bytes",
        )
    }
    return {
        "model": found.model,
        "machine": found.machine.name,
        "devices": found.devices,
        "step": {
            "phase": found.step.phase,
            "sequences": found.step["sequences"],
            "tokens": found.step["tokens"],
            "context": found.step["context"],
        },
        "step_seconds": found.seconds,
        "interval": list(found.interval),
        "provenance": found.machine.provenance,
        "limit": found.limit.value,
        "ledger": [{"cause": cause, "seconds": s, "limit": CAUSES[cause].value} for cause, s in found.ledger.items()],
        "flop": float(found.cost.flop),
        "read_bytes": float(found.cost.read_bytes),
        "write_bytes": float(found.cost.write_bytes),
        "link_bytes": float(found.cost.link_bytes),
        "bound_seconds": found.bound_seconds,
        **_energy_json(found),
        "memory": {**memory, "capacity_bytes": round(found.machine.memory.capacity_bytes), "fits": found.fits},
        "what_if": [{"limit": limit.value, "plus_10_percent": a, "times_2": b} for limit, (a, b) in found.what_if.items()],
        "notes": list(found.notes),
        "ops": [
            {
                "name": o.op.name,
                "kind": o.op.kind,
                "phase": o.op.phase,
                "repeat": o.op.repeat,
                "seconds": o.seconds,
                "interval": [o.low_seconds, o.high_seconds],
                "limit": o.limit.value,
                "flop": float(o.cost.flop),
                "read_bytes": float(o.cost.read_bytes),
                "write_bytes": float(o.cost.write_bytes),
                "intensity": o.intensity,
                "bound_seconds": o.bound_seconds,
            }
            for o in found.ops
        ],
    }
