"""A cap on the power of a device: the clock falls until a step's draw stays under it, and what arithmetic bounds takes longer."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from narrows.cost import CAUSES, Limit, cost
from narrows.costmodel import op_time, peak
from narrows.energy import LOWEST_CLOCK, power
from narrows.errors import NarrowsError
from narrows.graph import Op
from narrows.machine import Machine
from narrows.step import Step


def slower(ops: Sequence[Op], step: Step, machine: Machine, cap_watts: float, beside: float = 0.0) -> Any:
    """Time under a cap over that without, of ops that run one after another at each point of a step.

    `beside` is the share of the memory's bandwidth that others take meanwhile, as far as the ops leave it. Watts are those of
    `energy.power`. Raises NarrowsError where the machine's power is not known, and for a cap that the lowest clock breaks at
    some point.
    """
    model = power(machine)
    if model is None:
        raise NarrowsError("its power is not known.", where=machine.name, remedy="Add power_watts to the machine's file.")
    whole: Any = 0.0
    joules: Any = 0.0
    bound: Any = 0.0  # seconds that arithmetic bounds
    for op in ops:
        times, work = op_time(op, step, machine), cost(op, step)
        seconds = np.maximum(times.seconds, 1e-15)
        moved = (work.read_bytes + work.write_bytes) / machine.memory.bandwidth_bytes_per_s
        used = np.minimum(moved / seconds + beside, 1.0)
        drawn = model.floor + model.compute * work.flop / peak(op, machine) / seconds + model.memory * used
        joules = joules + seconds * model.rated * np.minimum(model.ceiling, drawn)
        bound = bound + sum((s for cause, s in times.causes.items() if CAUSES[cause] == Limit.COMPUTE), 0.0)
        whole = whole + seconds
    watts = np.asarray(joules / whole)
    idle = np.minimum(model.idle, watts)
    lowest = float(np.max(idle + (watts - idle) * LOWEST_CLOCK**model.exponent))
    if cap_watts < lowest:
        raise NarrowsError(f"{cap_watts:g} W: at {LOWEST_CLOCK:g} of its clock it draws up to {lowest:.0f} W.",
                           where=f"power cap of {machine.name}", remedy=f"Give {lowest:.0f} W or more.")  # fmt: skip
    clock = np.minimum(1.0, ((cap_watts - idle) / np.maximum(watts - idle, 1e-9)) ** (1 / model.exponent))
    return 1 + np.asarray(bound / whole) * (1 / clock - 1)
