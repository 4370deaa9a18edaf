"""Split each sequence over devices; before attention trade tokens for heads, and trade back after it.

Everything but attention works on a device's own tokens. An all-to-all then gives each device all tokens of its share of the
heads, on which any attention kernel works as it is, and a second one brings the results home.

## When it helps
Long sequences on several devices: what a device sends stays the same when the sequence and the devices grow together, while
tensor parallelism with split norms sends more with every token.

## When it does not
There can be no more devices than heads; keys and values of fewer heads are sent to several. Weights lie whole on every
device unless ZeRO splits them. Among few devices of a node tensor parallelism is as fast.

## Reference
Jacobs et al., DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence Transformer Models,
arXiv 2309.14509.
"""

from dataclasses import dataclass
from typing import ClassVar

from narrows.cost import Limit
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.modules.split_sequence import exchanged
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice


@dataclass(frozen=True)
class Ulysses(Measures):
    """What devices send if they share each sequence and trade its tokens for heads around attention."""

    card: ClassVar[Card] = Card(
        "deepspeed-ulysses",
        relieves=(Limit.COMMUNICATION, Limit.CAPACITY),
        phases=("train", "prefill"),
        exact=True,
        price="every device holds all weights, or gathers them; no more devices than heads",
        claims=(
            Claim("error", "of the largest number", None, "losses, gradients, weights and moments of two AdamW steps of a small "
                  "Llama in double precision, 2 and 4 ranks over gloo, against one process", "section 3.1", "run",
                  "rounding alone", at_most=1e-9),
            Claim("sent_bytes", "of predicted", None, "bytes that 2 and 4 ranks sent in all-to-alls, counted, over those of the "
                  "training graph that context_parallel cuts; the farther from one", "section 3.2", "run",
                  "exchanges and their sizes are known exactly", at_least=0.999, at_most=1.001),
            Claim("volume_growth", "x", 1.0, "bytes a device sends: Llama-2-7B, 262,144 tokens on 32 devices over 65,536 on 8",
                  "abstract: constant when length and devices grow in proportion", "simulated",
                  "(1 - 1/32) / (1 - 1/8) is 1.11: a device keeps its own part; Megatron's way sends 4.4 times as much",
                  at_least=0.9, at_most=1.15),
            Claim("speed", "x", 2.5, "FLOP/s of a GPT of 30 B parameters on 64 A100, all recomputed: this at 131,072 tokens with "
                  "ZeRO-3, over Megatron-LM's tensor and sequence parallelism at 32,768; 0 if its results are wrong",
                  "abstract: 2.5x faster with 4x longer sequences", "simulated", "the row asks for 30 %",
                  at_least=1.75, at_most=3.25),
        ),
    )  # fmt: skip
    devices: int = choice(8, 2, 4, 16, 32, help="that share each sequence")
    exchange: str = choice("ulysses", "none", help="none: a device attends over its own tokens, and no sequence is shared")

    def baseline(self) -> "Ulysses":
        return Ulysses(self.devices, "none")

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Bytes that one device sends in a step, and their seconds, beside those of other ways to share a sequence."""
        sent = exchanged(graph, machine, step, self.devices, self.exchange)
        rows = tuple({"shared by": by, "sent, bytes": exchanged(graph, machine, step, self.devices, by).sent_bytes}
                     for by in ("ulysses", "ring", "megatron"))  # fmt: skip
        values = {"sent_bytes": sent.sent_bytes} | ({"seconds": sent.seconds} if machine.link else {})
        return Reading(values, {name: "s" if name == "seconds" else "B" for name in values}, rows)
