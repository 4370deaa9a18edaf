"""Count the carbon of a model over its life: the electricity it computes with, what idles for it, and making its hardware.

Dynamic emissions are the energy of the computation times the intensity of the grid it came from. Idle emissions are those of
nodes and network that are on while they compute nothing, as a share of the dynamic energy. Embodied emissions are those of
making servers and devices, spread evenly over the hours that they will be used.

## When it helps
Comparing places and machines to train or serve at: on a clean grid making the hardware weighs as much as running it, so that
a longer life or a better use of it saves more than a lower clock does.

## When it does not
Embodied figures of accelerators are estimates, makers publish few; the idle share is that of one computing centre. It leaves
out what users' computers draw, cooling water, and the experiments before the final run, which cost BLOOM more than the run.

## Reference
Luccioni, Viguier and Ligozat, Estimating the Carbon Footprint of BLOOM, a 176B Parameter Language Model, JMLR 24, 2023,
arXiv 2211.02001: Jean Zay's A100 nodes, sections 4.1 (embodied), 4.2 (dynamic) and 4.3 (idle).
"""

from dataclasses import dataclass
from typing import ClassVar

from narrows.cost import Limit
from narrows.diagnose import diagnose
from narrows.energy import JOULES_PER_KWH, carbon_grams
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

IDLE_PER_DYNAMIC = 256_646 / 433_196  # kWh over kWh on Jean Zay (section 4.3): nodes that wait, switches, storage
USED_HOURS = 6 * 365 * 24 * 0.85  # six years at 85 % of the time (section 4.1)


@dataclass(frozen=True)
class LifeCycle(Measures):
    """Energy and CO2-equivalent of a step, or of a whole training run, with idling and the hardware's making."""

    card: ClassVar[Card] = Card(
        "bloom-carbon-footprint",
        relieves=(Limit.ENERGY,),
        phases=("prefill", "decode", "forward", "train"),
        exact=True,
        claims=(
            Claim("dynamic_tonnes", "t CO2eq", 24.7, "1,082,990 A100 hours at the bundled machine's rated power, French grid",
                  "abstract; table 1", "checked", "the paper's inputs: 5 % either way", at_least=23.47, at_most=25.94),
            Claim("total_tonnes", "t CO2eq", 50.5, "the same, with idling and the making of servers and GPUs",
                  "abstract", "checked", "the paper's inputs: 5 % either way", at_least=47.98, at_most=53.03),
            Claim("tonnes_from_shapes", "t CO2eq", 24.7, "hours predicted from BLOOM's shape, its split over 384 A100 and "
                  "366 billion tokens instead of taken from the log", "abstract", "simulated",
                  "restarts and evaluations are in the log and not in the prediction: a quarter either way",
                  at_least=18.5, at_most=30.9),
            Claim("request_over_predicted", "x", None, "SmolLM2-135M, fp32, one core: grams of a request of 128 tokens with 32 "
                  "written, dynamic, from measured seconds at 57 g/kWh, over the prediction", "inference", "run",
                  "roofline of a measured core against a real model on a noisy machine: a factor of two",
                  at_least=0.5, at_most=2.0),
        ),
    )  # fmt: skip
    grams_per_kwh: float = choice(57.0, 20.0, 394.0, 475.0, help="the grid's: France, Norway, central US in 2022, world")
    scope: str = choice("life", "dynamic", help="dynamic leaves idling and making the hardware out")
    server_grams: float = 2.5e6
    device_grams: float = 1.5e5
    devices_per_server: int = 8

    def __post_init__(self) -> None:
        if self.scope not in ("life", "dynamic"):
            raise NarrowsError(f"{self.scope!r} is not a scope.", where=f"{self.card.slug}: scope", remedy="Use life or dynamic.")

    def baseline(self) -> "LifeCycle":
        """What calculators did: energy alone, at the world's average."""
        return LifeCycle(grams_per_kwh=475.0, scope="dynamic")

    def grams(self, device_hours: float, joules: float) -> dict[str, float]:
        """Grams of CO2-equivalent by origin, for devices that run so many hours and draw so many joules in all."""
        dynamic = carbon_grams(joules, self.grams_per_kwh)
        if self.scope == "dynamic":
            return {"dynamic": dynamic}
        making = (self.server_grams / self.devices_per_server + self.device_grams) / USED_HOURS
        return {"dynamic": dynamic, "idle": dynamic * IDLE_PER_DYNAMIC, "embodied": making * device_hours}

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Joules and grams of one step on one device, by origin, and per sequence.

        Raises NarrowsError where the machine's power is not known.
        """
        found = diagnose(graph, machine, step)
        if found.energy is None:
            raise NarrowsError("its power is not known.", where=machine.name, remedy="Add power_watts to the machine's file.")
        joules, (low, high) = found.energy.joules, found.energy.joules_interval
        parts = self.grams(found.seconds / 3600, joules)
        whole = sum(parts.values())
        values = {"joules": joules, "joules_low": low, "joules_high": high, "watts": found.energy.watts, "grams": whole,
                  "grams_per_sequence": whole / float(step["sequences"])}  # fmt: skip
        units = {"joules": "J", "joules_low": "J", "joules_high": "J", "watts": "W", "grams": "g", "grams_per_sequence": "g"}
        rows = tuple({"origin": origin, "grams": g, "share": g / whole} for origin, g in parts.items())
        return Reading(values, units, rows)


def rated_joules(device_hours: float, machine: Machine) -> float:
    """What devices draw at most, as the paper counts it; NarrowsError where the machine's rated power is not known."""
    if machine.power_watts is None:
        raise NarrowsError("its power is not known.", where=machine.name, remedy="Add power_watts to the machine's file.")
    return device_hours / 1e3 * machine.power_watts * JOULES_PER_KWH
