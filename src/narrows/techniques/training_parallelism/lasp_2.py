"""Split each sequence of a linear-attention model over devices; one all-gather of states tells each what came before it.

All that linear attention knows of earlier tokens is a matrix of key by value size. Each device makes that of its own tokens,
all gather all of them, and each adds those before its own: one collective forward and one backward, however long the
sequence. LASP handed the same states from device to device, each waiting for the one before.

## When it helps
Sequences of a hundred thousand tokens and more of linear attention, retention or gated linear attention, where a ring of
keys and values sends gigabytes for what one matrix says.

## When it does not
What is gathered grows with the devices: at hundreds of them All-Scan (ZeCO) sends less. Layers with softmax attention need
all keys: LASP-2H gathers those too.

## Reference
Sun et al., LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid, arXiv 2502.07563.
"""

from dataclasses import dataclass
from typing import ClassVar

from narrows.cost import Limit
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.modules.split_sequence import exchanged, passed
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice


@dataclass(frozen=True)
class LASP2(Measures):
    """What devices send that share sequences of linear attention by one all-gather of states."""

    card: ClassVar[Card] = Card(
        "lasp-2",
        relieves=(Limit.COMMUNICATION, Limit.CAPACITY),
        phases=("train", "prefill"),
        exact=True,
        price="for linear attention alone; every device holds all weights",
        claims=(
            Claim("error", "of the largest number", None, "losses, gradients, weights and moments of two AdamW steps of a small "
                  "Llama with linear attention, plain and gated, in double precision, 2 and 4 ranks over gloo, against one "
                  "process", "section 3.1", "run", "rounding alone", at_most=1e-9),
            Claim("gathers", "a layer and pass", 1.0, "all-gathers that 4 ranks called in a step, over layers and passes",
                  "abstract: one single AllGather on intermediate memory states", "run", "a count", at_least=1.0, at_most=1.0),
            Claim("length_growth", "x", 1.0, "bytes of states that 4 ranks sent for 128 tokens over those for 32",
                  "abstract: sizes independent of the sequence length", "run", "a count", at_least=1.0, at_most=1.0),
            Claim("over_ring", "x", 1.366, "step of a Llama-3.2-1B shape with linear attention, 2,097,152 tokens on 64 A100, the "
                  "ring's messages behind its computing as far as they go; 0 if its results are wrong", "abstract",
                  "simulated", "a quarter: attention's own products are left out under both", at_least=1.1, at_most=1.7),
            Claim("over_lasp", "x", 1.152, "the same, over states handed from device to device", "abstract", "simulated",
                  "the direction: waiting for 63 messages in a row is in our time, the paper's waiting for hosts is not",
                  at_least=1.01),
        ),
    )  # fmt: skip
    devices: int = choice(64, 2, 4, 8, 16, help="that share each sequence")
    exchange: str = choice("gather", "none", help="none: a device attends over its own tokens alone")

    def baseline(self) -> "LASP2":
        return LASP2(self.devices, "none")

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Bytes that one device sends in a step if its layers mix tokens by states, and their seconds, beside other ways."""
        sent = passed(graph, machine, step, self.devices, self.exchange)
        rows = [{"passed by": by, "sent, bytes": passed(graph, machine, step, self.devices, by).sent_bytes}
                for by in ("gather", "scan", "chain")]  # fmt: skip
        rows += [{"passed by": "ring of keys", "sent, bytes": exchanged(graph, machine, step, self.devices, "ring").sent_bytes}]
        values = {"sent_bytes": sent.sent_bytes} | ({"seconds": sent.seconds} if machine.link else {})
        return Reading(values, {name: "s" if name == "seconds" else "B" for name in values}, tuple(rows))
