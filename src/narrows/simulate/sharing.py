"""Prompts and decoding side by side on one device: each on a share of its units, both on one memory.

A share of the units has as much of the arithmetic; of the bandwidth it has what so many units can ask for, which is all of
it long before all units do. What both ask for and there is not, they share: each gets what it wants up to half. A step keeps
the share with which it began, and who decodes in it keeps its room until it ends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from narrows.cost import cost
from narrows.costmodel import op_time
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.simulate.step_times import StepTimes
from narrows.step import Step

# Bytes a second that one unit can ask for: 43 of an A100's 108 units reach 0.8 of its 2.04 TB/s (NanoFlow, arXiv 2408.12757,
# section 4.1.4: attention on 0.4 of the units). An assumption for other machines.
UNIT_BYTES_PER_S = 38e9
SHARES = tuple(i / 10 for i in range(1, 10))  # of the units, for prompts


@dataclass(frozen=True, slots=True)
class Sharing:
    """Prompts are read in a stream of their own beside decoding.

    prompts   share of the device's units for them while both run; 0: before each step of prompts, by what it costs both
    scarce    share of the blocks in use above which decoding goes first: it frees them
    slower    times its shortest time that a step of the one may take while the other goes first
    """

    prompts: float = 0.0
    scarce: float = 0.7
    slower: float = 1.3

    def __post_init__(self) -> None:
        if not (0 <= self.prompts < 1 and self.slower >= 1):
            raise NarrowsError(f"{self} is no share.", where="sharing", remedy="Give a share below 1 and a factor from 1.")


def reach(machine: Machine, share: float) -> float:
    """The share of the memory's bandwidth that a share of the units can ask for."""
    return min(1.0, machine.units * share * UNIT_BYTES_PER_S / machine.memory.bandwidth_bytes_per_s)


def part(machine: Machine, share: float, bandwidth: float) -> Machine:
    """A share of a device's units, at least one, as a device with a share of its bandwidth; of its power, as of its units."""
    units = max(1, round(machine.units * share))
    kept = units / machine.units
    watts, idle = (drawn and drawn * kept for drawn in (machine.power_watts, machine.idle_watts))
    return replace(machine.scaled(compute=kept, bandwidth=bandwidth), units=units, power_watts=watts, idle_watts=idle)


@dataclass(frozen=True)
class Beside:
    """A device cut in two: the times of steps of prompts on their share of it, and of decoding on the rest."""

    prompts: StepTimes
    decoding: StepTimes


class Streams:
    """What each share of the units makes of the steps of both streams.

    `times` tables the steps of the model on a machine; `ready` is what one device does, `tokens` what a step of prompts reads
    at most.
    """

    def __init__(self, sharing: Sharing, ready: Graph, machine: Machine, tokens: int,
                 times: Callable[[Machine], StepTimes]) -> None:  # fmt: skip
        self.sharing, self._ready, self._machine, self._times = sharing, ready, machine, times
        self._step = Step.prefill(1, tokens)

    @cached_property
    def cuts(self) -> tuple[Beside, ...]:
        """The device cut at each share that may be chosen."""
        return tuple(self._cut(share) for share in ([self.sharing.prompts] if self.sharing.prompts else SHARES))

    def _cut(self, share: float) -> Beside:
        """Decoding asks for all the bandwidth it can; prompts for what a full step of theirs moves in its time."""
        whole = self._machine
        for_prompts, for_decoding = reach(whole, share), reach(whole, 1 - share)
        alone = part(whole, share, for_prompts)
        seconds = sum(float(op_time(op, self._step, alone).seconds) for op in self._ready)
        moved = sum(
            (float(work.read_bytes) + float(work.write_bytes) for op in self._ready if (work := cost(op, self._step))), 0.0
        )
        wanted = moved / seconds / whole.memory.bandwidth_bytes_per_s
        return Beside(
            self._times(part(whole, share, min(for_prompts, max(1 - for_decoding, 0.5)))),
            self._times(part(whole, 1 - share, min(for_decoding, max(1 - wanted, 0.5)))),
        )

    def choose(self, pieces: Sequence[tuple[int, int]], sequences: int, context: int, used: float) -> Beside:
        """The cut for a step of pieces of prompts (tokens, those before them) beside so many sequences that decode.

        While there is room the one on which prompts take least, of those on which decoding is not much slower than it can
        be; with `used` of the blocks in use above `scarce`, the other way round.
        """
        if len(self.cuts) == 1:
            return self.cuts[0]
        tokens = sum(new for new, _ in pieces)
        costs = []
        for cut in self.cuts:
            prompts = cut.prompts.reading(tokens, 0) + sum(cut.prompts.prompt(new, past) for new, past in pieces)
            segment = cut.decoding.decoding(sequences, context, sequences)
            decode = cut.decoding.rows(sequences) + segment.base + segment.slope * (context - segment.start)
            costs.append((prompts, decode) if used <= self.sharing.scarce else (decode, prompts))
        least = min(second for _, second in costs)
        allowed = [i for i, (_, second) in enumerate(costs) if second <= self.sharing.slower * least]
        return self.cuts[min(allowed, key=lambda i: costs[i])]
