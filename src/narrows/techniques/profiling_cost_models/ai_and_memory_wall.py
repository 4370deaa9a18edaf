"""Compare what a network asks of arithmetic and of memory with how fast hardware gives each, now and as it has grown.

Peak arithmetic has trebled every two years; memory bandwidth grew by 1.6 and the rate of an interconnect's lane by 1.4.
A network that does few operations for each byte falls further behind its hardware with every generation, and decoding
does fewest: it reads every weight for a single token. Growth is fitted to hardware_history.csv, one line of slope per
resource in the logarithm; intensity and time come from the graph at the machine's roofline.

## When it helps
Deciding whether a faster chip will help a workload, and which: on which side of the machine's ridge it lies, and how
soon that ridge doubles.

## When it does not
Latency of small kernels, launches and collectives are not in a roofline. Trends say nothing of one product; numbers
per chip hide that formats became narrower and chips larger meanwhile.

## Reference
Gholami et al., AI and Memory Wall, IEEE Micro 44(3), 2024, arXiv 2403.14123. As there, an interconnect is counted by
the rate of one lane, and peak arithmetic is that of the format used for training at the time.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar

import numpy as np

from narrows.cost import Limit, cost
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import Machine, machine
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

RESOURCES = ("compute", "memory", "interconnect")
_TABLE = "19 chips, 18 memories and 10 links, 1996 to 2024"


@dataclass(frozen=True)
class MemoryWall(Measures):
    """Growth of compute, memory and interconnect, and where a network lies between the first two."""

    card: ClassVar[Card] = Card(
        "ai-and-memory-wall",
        relieves=(Limit.BANDWIDTH, Limit.COMMUNICATION),
        phases=("prefill", "decode", "forward", "train"),
        exact=True,
        claims=(
            Claim("compute_growth", "x in 2 years", 3.0, _TABLE, "figure 1", "checked",
                  "other chips than the paper's: a tenth either way", at_least=2.7, at_most=3.3),
            Claim("memory_growth", "x in 2 years", 1.6, _TABLE, "figure 1", "checked",
                  "other products than the paper's: a tenth either way", at_least=1.44, at_most=1.76),
            Claim("interconnect_growth", "x in 2 years", 1.4, _TABLE, "figure 1", "checked",
                  "the same standards: 5 % either way", at_least=1.33, at_most=1.47),
            Claim("encoder_over_decoder", "x intensity", None, "BERT-base on 512 tokens over GPT-2 decoding after 512, batch 1",
                  "section 3", "checked", "orders of magnitude are at least two", at_least=100.0),
            Claim("decode_time_over_predicted", "x", None, "SmolLM2-135M, fp32, one core: time of a decoded token over that of a "
                  "prefilled one, measured over predicted", "section 3", "run",
                  "a roofline of two measured numbers: a factor of two either way", at_least=0.5, at_most=2.0),
        ),
    )  # fmt: skip
    apart: bool = choice(True, help="take the three resources each on its own; False lumps them, as counting FLOP does")
    until: float = choice(2026.0, 2023.0, help="last year of the table to fit; the paper's ends in 2022")

    def baseline(self) -> "MemoryWall":
        return MemoryWall(apart=False, until=self.until)

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Growth per two years, and of this step: intensity and ridge (FLOP per byte), seconds, share bound by bandwidth.

        A row an op: intensity, seconds at the roofline and its limit. `ridge_doubles_years`: how soon the machine's
        ridge doubles if both trends go on.
        """
        bandwidth = machine.memory.bandwidth_bytes_per_s
        rows: list[dict[str, Any]] = []
        for op in graph:
            work = cost(op, step, graph.eager)
            peak = machine.peak(op.compute or op.act.name) if op.spec.matmul else machine.peak("fp32")
            flop, moved = float(work.flop), float(work.read_bytes + work.write_bytes)
            computing, moving = flop / peak, moved / bandwidth if self.apart else 0.0
            rows.append({"op": op.name, "flop": flop, "bytes": moved, "seconds": max(computing, moving),
                         "intensity": flop / moved if moved else 0.0,
                         "limit": str(Limit.COMPUTE if computing >= moving else Limit.BANDWIDTH)})  # fmt: skip
        seconds, moved = sum(row["seconds"] for row in rows), sum(row["bytes"] for row in rows)
        if not seconds:
            raise NarrowsError("it does no work.", where=graph.name, remedy="Give a graph with ops.")
        waiting = sum(row["seconds"] for row in rows if row["limit"] == Limit.BANDWIDTH)
        peaks = [machine.peak(op.compute or op.act.name) for op in graph if op.spec.matmul] or [machine.peak("fp32")]
        ridge = max(peaks) / bandwidth
        grown = {name: self.growth(name) for name in RESOURCES}
        closing = np.log2(grown["compute"] / grown["memory"])
        values = {**{f"{name}_growth": factor for name, factor in grown.items()},
                  "intensity": sum(row["flop"] for row in rows) / moved if self.apart else ridge,
                  "ridge": ridge, "seconds": seconds, "bandwidth_share": waiting / seconds,
                  "ridge_doubles_years": float(2 / closing) if closing > 0 else float("inf")}  # fmt: skip
        units = {**{f"{name}_growth": "x in 2 years" for name in RESOURCES}, "intensity": "FLOP/B", "ridge": "FLOP/B",
                 "seconds": "s", "ridge_doubles_years": "years"}  # fmt: skip
        return Reading(values, units, tuple(rows))

    def growth(self, resource: str) -> float:
        """Fitted growth of a resource in two years: least squares in the logarithm, all resources on one slope if lumped."""
        if resource not in RESOURCES:
            raise NarrowsError(f"{resource!r} is not a resource.", where=self.card.slug, remedy=f"Use {', '.join(RESOURCES)}.")
        return _growth((resource,) if self.apart else RESOURCES, self.until)


@cache
def history() -> tuple[dict[str, str], ...]:
    """The table of hardware: resource, year, name, value (empty where a bundled machine of that name has it), unit, source."""
    with files("narrows.data").joinpath("hardware_history.csv").open(encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def figure(row: dict[str, str]) -> float:
    """The figure of a row of `history`, from the bundled machine where the row refers to one."""
    if row["value"]:
        return float(row["value"])
    found = machine(row["name"])
    if row["resource"] == "memory":
        return found.memory.bandwidth_bytes_per_s
    return max(found.peak_flop_per_s.get("fp16", 0.0), found.peak_flop_per_s.get("bf16", 0.0))


@cache
def _growth(resources: Sequence[str], until: float) -> float:
    """One slope through the points of all `resources`, each with its own level."""
    along = across = 0.0
    for resource in resources:
        rows = [row for row in history() if row["resource"] == resource and float(row["year"]) <= until]
        if len(rows) < 3:
            problem = f"it has {len(rows)} points of {resource} until {until:g}."
            raise NarrowsError(problem, where="hardware_history.csv", remedy="Take a later year.")
        points = np.array([(float(row["year"]), np.log2(figure(row))) for row in rows])
        years, logs = (points - points.mean(0)).T
        along, across = along + float(years @ logs), across + float(years @ years)
    return float(2 ** (2 * along / across))
