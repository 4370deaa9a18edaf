"""Split each sequence of a linear-attention model over devices; the state goes through them in blocks, ahead of its use.

A device needs one thing of all tokens before its own: the state they leave. All-Scan cuts the state into blocks along the
key, and each device adds its own part to a block and hands it on while the next block arrives. A device sends one state a
layer and pass, the least there can be, and meanwhile works on its own tokens as if nothing had come before.

## When it helps
Linear attention over so many devices that an all-gather of every device's state is longer than the work beside it.

## When it does not
The pass through N devices takes N - 2 blocks more than the state has, so a short part of a sequence does not hide it. Where
every device has a network card, as in a DGX, a ring's all-gather uses all of them: by our cost model it is then the shorter
of the two for 256 devices, and the paper's 3.9 times between the two is not reproduced here.

## Reference
Chou et al., ZeCO: Zero Communication Overhead Sequence Parallelism for Linear Attention, NeurIPS 2025, arXiv 2507.01004.
"""

from dataclasses import dataclass
from typing import ClassVar

from narrows.cost import Limit
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.modules.split_sequence import passed
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice


@dataclass(frozen=True)
class ZeCO(Measures):
    """What devices send that share sequences of linear attention by a scan of their states in blocks."""

    card: ClassVar[Card] = Card(
        "zeco",
        relieves=(Limit.COMMUNICATION, Limit.CAPACITY),
        phases=("train", "prefill"),
        exact=True,
        price="for linear attention alone; every device holds all weights",
        claims=(
            Claim("error", "of the largest number", None, "losses, gradients, weights and moments of two AdamW steps of a small "
                  "Llama with gated linear attention in double precision, 2 and 4 ranks over gloo, against one process",
                  "section 3.2", "run", "rounding alone", at_most=1e-9),
            Claim("sent_bytes", "of the least", 1.0, "bytes of states that 4 ranks sent over one state a layer, pass and rank "
                  "but the last", "abstract: precisely the initial operator state, a minimal communication footprint", "run",
                  "a count against a closed form", at_least=1.0, at_most=1.0),
            Claim("rank_growth", "x", 1.0, "bytes from a rank to its neighbours, 4 ranks and 128 tokens over 2 ranks and 32; an "
                  "all-gather's are threefold", "section 3.4", "run", "a count", at_least=1.0, at_most=1.0),
            Claim("weak_scaling", "x", 1.0, "step of Llama-3.2-1B's shape with linear attention: 1,048,576 tokens on 64 A100, "
                  "over 16,384 on one, the scan not hidden at all; infinite if its results are wrong",
                  "abstract: 1M on 64 devices takes roughly as long as 16k on one", "simulated", "roughly: a sixth",
                  at_most=1.167),
        ),
    )  # fmt: skip
    devices: int = choice(64, 2, 4, 8, 256, help="that share each sequence")
    exchange: str = choice("scan", "none", help="none: a device attends over its own tokens alone")
    blocks: int = choice(16, 4, 64, help="that a state is cut into")

    def baseline(self) -> "ZeCO":
        return ZeCO(self.devices, "none", self.blocks)

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Bytes that one device sends in a step if its layers mix tokens by states, and their seconds, beside other ways."""
        sent = passed(graph, machine, step, self.devices, self.exchange, self.blocks)
        rows = tuple({"passed by": by, "sent, bytes": passed(graph, machine, step, self.devices, by, self.blocks).sent_bytes}
                     for by in ("scan", "gather"))  # fmt: skip
        values = {"sent_bytes": sent.sent_bytes} | ({"seconds": sent.seconds} if machine.link else {})
        return Reading(values, {name: "s" if name == "seconds" else "B" for name in values}, rows)
