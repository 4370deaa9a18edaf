"""Tell at design time how energy-efficient a network's operations will be, from weights and activations weighed apart.

Plain arithmetic intensity divides the multiply-adds by all the numbers they need, as if each cost the same to bring.
Weights serve every image of a batch and every position of a map; activations are made, stored and read again for each.
DI counts an activation `activation_share` and a weight the rest: MAC / (2 (share x activations + (1 - share) x weights)),
per image and layer by layer; a share of one half is plain intensity. Activations are what each layer reads and writes.

## When it helps
Comparing convolutional networks before there is hardware or a batch size: which of two designs of equal MAC count
will do more of them per joule.

## When it does not
One image at a time: every weight is then brought for a single image, and plain intensity ranks better. Where the batch
is known, plain intensity counted over that batch says the same: a share of 0.8 is what a batch of four amounts to.
Latency, which it does not claim to predict.

## Reference
Jha and Mittal, Modeling Data Reuse in Deep Neural Networks by Taking Data-Types into Cognizance, IEEE Transactions on
Computers 2020, arXiv 2008.02565. The share here is chosen on every second network of ours, and reported on the rest.
"""

from dataclasses import dataclass
from typing import ClassVar

from narrows.cost import Limit, cost
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

_SETTING = "against energy modelled from 45 nm access energies (Horowitz 2014), batch 8, "


@dataclass(frozen=True)
class DataTypeAwareIntensity(Measures):
    """MAC per number moved, with activations and weights weighed differently."""

    card: ClassVar[Card] = Card(
        "di-data-type-aware-arithmetic-intensity",
        relieves=(Limit.ENERGY, Limit.BANDWIDTH),
        phases=("forward",),
        exact=True,
        claims=(
            Claim("energy_rank_correlation", "Spearman", None, _SETTING + "21 networks", "abstract", "simulated",
                  "a perfect indicator is 1; plain intensity stays below 0.87", at_least=0.88),
            Claim("gain_over_plain", "Spearman", None, _SETTING + "21 networks", "abstract", "simulated",
                  "better, and by more than exchanging two neighbours (0.001) gives", at_least=0.03),
            Claim("gain_held_out", "Spearman", None, _SETTING + "the 10 networks that the share was not chosen on", "abstract",
                  "simulated", "better as well where nothing was fitted; two neighbours exchanged give 0.012", at_least=0.03),
        ),
    )  # fmt: skip
    activation_share: float = choice(0.8, 0.5, 0.7, 0.9, help="what an activation counts; a weight counts the rest; 0.5 is plain")

    def __post_init__(self) -> None:
        if not 0 <= self.activation_share <= 1:
            raise NarrowsError(f"the share is {self.activation_share}.", where=f"{self.card.slug}: activation_share",
                               remedy="Give a fraction between 0 and 1.")  # fmt: skip

    def baseline(self) -> "DataTypeAwareIntensity":
        return DataTypeAwareIntensity(0.5)

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """DI and plain intensity of the whole and of every op that multiplies, per image (or sequence) of the step.

        They hang on the network alone: the machine does not enter. Raises NarrowsError where nothing multiplies.
        """
        images = float(step["sequences"])
        rows = []
        macs = weights = activations = 0.0
        for op in graph:
            if not op.spec.matmul or op.phase != "forward":
                continue
            work, width = cost(op, step), op.act.bits / 8
            mac, moved = float(work.flop) / 2 / images, float(work.input_bytes + work.write_bytes) / width / images
            owned = op.spec.parameters(op.sized(step)) * op.repeat
            rows.append({"op": op.name, "kind": op.kind, "mac": mac, "weights": owned, "activations": moved,
                         "intensity": mac / (owned + moved), "di": self._di(mac, owned, moved)})  # fmt: skip
            macs, weights, activations = macs + mac, weights + owned, activations + moved
        if not rows:
            raise NarrowsError("no op multiplies.", where=graph.name, remedy="Give a graph with convolutions or linear layers.")
        values = {"di": self._di(macs, weights, activations), "intensity": macs / (weights + activations),
                  "mac": macs, "weights": weights, "activations": activations}  # fmt: skip
        units = {"di": "MAC per number", "intensity": "MAC per number", "mac": "MAC", "weights": "numbers",
                 "activations": "numbers"}  # fmt: skip
        return Reading(values, units, tuple(rows))

    def _di(self, mac: float, weights: float, activations: float) -> float:
        return mac / (2 * (self.activation_share * activations + (1 - self.activation_share) * weights))
