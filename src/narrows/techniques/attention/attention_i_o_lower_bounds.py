"""Count what exact attention must move between fast and slow memory, and which order of its loops comes near the least.

For N queries and keys of width d and a fast memory of M numbers no exact attention moves less than the order of
N^2 d^2 / M where M >= d^2, and of N^2 d / sqrt(M) below. FlashAttention reaches the first: it keeps a strip of queries with
their outputs in fast memory and streams the keys and values past it. In a memory below d^2 that strip becomes too thin;
there it is better to make the scores in square tiles, as any matrix product is, and to write them out.

## When it helps
Sizing the fast memory of an accelerator, or knowing whether a faster attention kernel can exist: where the schedule in
use moves a small multiple of the bound, the rest is arithmetic.

## When it does not
The bound has no constant: a ratio of four to it is not a promise of a gain of four. Queries and keys that are used once
(a decoded token) or fit into fast memory move what they are: every schedule is then the same. Approximate and sparse
attention lie below the bound.

## Reference
Saha and Ye, The I/O Complexity of Attention, or How Optimal is Flash Attention?, ICML 2024, arXiv 2402.07443. The counts
of the schedules are ours; they move whole tiles, as the loops in the experiments do, that compute attention meanwhile.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice


def bound(queries: float, keys: float, width: float, memory: float) -> float:
    """The order of the least numbers that attention moves, with one for its constant (and its inputs and outputs at least)."""
    return max(queries * keys * width * min(width / memory, 1 / math.sqrt(memory)), 2 * (queries + keys) * width)


def strip(width: int, memory: int) -> int:
    """Rows of queries with outputs, maxima and sums that fit beside one key, one value and a score for each row (0: none)."""
    return max((memory - 2 * width) // (2 * width + 3), 0)


def side(memory: int) -> int:
    """Side of the square tile of scores that fits beside a column, a row, and two statistics for each of its rows (0: none)."""
    return max(math.isqrt(memory + 4) - 2, 0)


def flash_moves(queries: int, keys: int, width: int, memory: int) -> float:
    """Numbers moved if strips of queries meet a stream of keys and values; infinite where no strip fits."""
    rows = strip(width, memory)
    return 2 * queries * width + -(-queries // rows) * 2 * keys * width if rows else math.inf


def tiles_moves(queries: int, keys: int, width: int, memory: int) -> float:
    """Numbers moved if scores are made in square tiles and written, then read for tiles of the output; infinite if none fit."""
    b = side(memory)
    if not b:
        return math.inf
    down, across, wide = -(-queries // b), -(-keys // b), -(-width // b)
    scores = down * keys * width + across * queries * width + queries * keys + 2 * queries
    return scores + wide * queries * (keys + 2) + down * keys * width + queries * width


def rows_moves(queries: int, keys: int, width: int, memory: int) -> float:
    """Numbers moved if each query meets all keys and values on its own; infinite where not even one fits."""
    return 2 * queries * width * (1 + keys) if strip(width, memory) else math.inf


SCHEDULES: dict[str, Callable[[int, int, int, int], float]] = {"flash": flash_moves, "tiles": tiles_moves, "rows": rows_moves}


@dataclass(frozen=True)
class AttentionIO(Measures):
    """Numbers that attention moves by a schedule of its loops, beside the order of the least."""

    card: ClassVar[Card] = Card(
        "attention-i-o-lower-bounds",
        relieves=(Limit.BANDWIDTH,),
        phases=("prefill", "forward", "train"),
        exact=True,
        claims=(
            Claim("large_memory_exponent", "power of M", -1.0, "counted loops, N = 1024, d = 16, M from d^2 to 16 d^2",
                  "abstract", "simulated", "inputs and outputs and whole tiles bend the line by a tenth",
                  at_least=-1.1, at_most=-0.9),
            Claim("small_memory_exponent", "power of M", -0.5, "counted loops, N = d = 256, M from d^2 / 57 to d^2 / 4",
                  "abstract", "simulated", "the written scores and the room beside a tile bend the line by a tenth",
                  at_least=-0.6, at_most=-0.4),
            Claim("width_exponent", "power of d", 2.0, "counted loops, N = 512, M = 2048, d from 16 to 45 = sqrt(M)",
                  "abstract", "simulated", "inputs and outputs bend the line by a tenth", at_least=1.8, at_most=2.2),
            Claim("crossover", "M / d^2", None, "N = 65,536, d = 128: where strips begin to move less than tiles", "abstract",
                  "checked", "the theorem has no constant: a factor of two either way of M = d^2", at_least=0.5, at_most=2.0),
            Claim("spread", "x", None, "counted loops over bound, largest over smallest: N = 1024, d = 64, M from d^2/8 to 4 d^2",
                  "abstract", "simulated", "optimal up to a constant: the ratio stays within a factor of two", at_most=2.0),
            Claim("gain_over_flash", "x", None, "counted loops, N = d = 256, M = d^2 / 32", "abstract", "simulated",
                  "d / sqrt(M) is 5.7; half of it, as the constants differ", at_least=2.8),
        ),
    )  # fmt: skip
    schedule: str = choice("best", "flash", "tiles", "rows", help="best: what moves least; rows tiles nothing")

    def __post_init__(self) -> None:
        if self.schedule not in ("best", *SCHEDULES):
            raise NarrowsError(f"{self.schedule!r} is not a schedule.", where=f"{self.card.slug}: schedule",
                               remedy=f"Use best, {', '.join(SCHEDULES)}.")  # fmt: skip

    def baseline(self) -> "AttentionIO":
        return AttentionIO("rows")

    def choose(self, queries: int, keys: int, width: int, memory: int) -> str:
        """The schedule it uses for a problem: the one asked for, or that which moves least.

        Raises NarrowsError where it does not fit into `memory` numbers.
        """
        names = list(SCHEDULES) if self.schedule == "best" else [self.schedule]
        name = min(names, key=lambda one: SCHEDULES[one](queries, keys, width, memory))
        if math.isinf(SCHEDULES[name](queries, keys, width, memory)):
            raise NarrowsError(f"{name} with heads of {width} does not fit into {memory} numbers.", where=self.card.slug,
                               remedy="Take a machine with a larger fast memory, or another schedule.")  # fmt: skip
        return name

    def crossover(self, queries: int, keys: int, width: int) -> float:
        """Numbers of fast memory from which on strips are used, NaN where it never changes to them."""
        sizes = [round(width**2 * 2 ** (power / 16)) for power in range(-64, 65)]
        used = [self.choose(queries, keys, width, memory) for memory in sizes]
        return float(sizes[used.index("flash")]) if "flash" in used[1:] and used[0] != "flash" else math.nan

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Bytes that each attention op moves on the machine's innermost memory (one unit's share), and the bound's.

        Totals over all heads, sequences and repeats, and `share_small`: the part of the bytes moved by heads wider than
        sqrt(M). A key that a mask hides counts nothing. A network without attention moves nothing.
        """
        if len(machine.memories) < 2:
            raise NarrowsError("it has one memory alone.", where=f"{machine.name}: memories", remedy="Add its cache.")
        room = machine.memories[-1].capacity_bytes / machine.units
        rows: list[Mapping[str, Any]] = []
        for op in graph.find("attention"):
            dims, byte = op.sized(step), op.act.bits / 8
            if not dims["queries"]:
                continue
            sequences = float(step["sequences"])
            queries, keys = math.ceil(dims["queries"] / sequences), math.ceil(dims["pairs"] / dims["queries"])
            width, memory = round((dims["head_dim"] + dims["value_dim"]) / 2), int(room / byte)
            name = self.choose(queries, keys, width, memory)
            heads = sequences * dims["heads"] * op.repeat
            rows.append({"op": op.name, "schedule": name, "queries": queries, "keys": keys, "width": width, "memory": memory,
                         "bytes": SCHEDULES[name](queries, keys, width, memory) * byte * heads,
                         "bound_bytes": bound(queries, keys, width, memory) * byte * heads})  # fmt: skip
        moved, least = sum(row["bytes"] for row in rows), sum(row["bound_bytes"] for row in rows)
        small = sum(row["bytes"] for row in rows if row["width"] ** 2 > row["memory"])
        values = {"bytes": moved, "bound_bytes": least, "over_bound": moved / least if least else 1.0,
                  "seconds": moved / machine.memory.bandwidth_bytes_per_s,
                  "share_small": small / moved if moved else 0.0}  # fmt: skip
        return Reading(values, {"bytes": "B", "bound_bytes": "B", "over_bound": "x", "seconds": "s"}, tuple(rows))
