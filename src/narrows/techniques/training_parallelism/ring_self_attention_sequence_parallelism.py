"""Split each sequence over devices; keys and values go round them in a ring, and meet every query on their way.

A device keeps the activations of its own tokens alone, in every layer. Attention is exact: partial sums of each block of
scores are brought to one maximum as the next keys arrive, and the backward pass sends keys and values round once more, with
their gradients. Any number of devices can take part, also more than there are heads.

## When it helps
Sequences, or batches of them, whose activations do not fit, on more devices than tensor parallelism can use: BERT-Base has
12 heads. A ring of messages between neighbours hides behind attention once the part of a sequence is long.

## When it does not
Weights lie whole on every device. Short parts leave the messages exposed: every device still gets all keys. Ulysses sends
less for the same split wherever there are enough heads.

## Reference
Li et al., Sequence Parallelism: Long Sequence Training from System Perspective, ACL 2023, arXiv 2105.13120. The running
maximum over blocks is that of Liu et al., Ring Attention with Blockwise Transformers, arXiv 2310.01889.
"""

from dataclasses import dataclass
from typing import ClassVar

from narrows.cost import Limit
from narrows.graph import FP32, Graph, at
from narrows.machine import Machine
from narrows.modules.split_sequence import exchanged, share
from narrows.parallel import tensor_parallel
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

STATES_BYTES = 16  # of a parameter in fp32: itself, its gradient, and the two moments of Adam
SCORE_BYTES = 9  # of a score that is written to memory: its probability before and after dropout, and the mask


def held_bytes(graph: Graph, step: Step, devices: int, by: str) -> float:
    """Bytes that one device holds to train in fp32: by `ring`, `tensor` parallelism, or `none`.

    Weights, gradients and moments, what the backward pass keeps, and attention's scores, as kernels that do not fuse it do.
    """
    cut = tensor_parallel(graph, devices) if by == "tensor" else graph
    own = share(step, devices) if by == "ring" else step
    kept = sum(float(at(op.saved, own)) * op.repeat for op in cut.forward)
    sized = [(op.sized(step), op.repeat) for op in cut.find("attention")]
    scores = float(sum(dims["pairs"] * dims["heads"] * repeat for dims, repeat in sized))
    scores /= devices if by == "ring" else 1  # a device has its part of the queries, and meets all keys
    return cut.parameters * STATES_BYTES + kept * FP32.bits / 8 + scores * SCORE_BYTES


@dataclass(frozen=True)
class RingSelfAttention(Measures):
    """What devices hold and send if they share each sequence in a ring."""

    card: ClassVar[Card] = Card(
        "ring-self-attention-sequence-parallelism",
        relieves=(Limit.CAPACITY,),
        phases=("train", "prefill"),
        exact=True,
        price="every device holds all weights, and all keys pass by it",
        claims=(
            Claim("error", "of the largest number", None, "losses, gradients, weights and moments of two AdamW steps of a small "
                  "Llama in double precision, 2 and 4 ranks over gloo, against one process", "abstract: compute the attention "
                  "output", "run", "rounding alone", at_most=1e-9),
            Claim("sent_bytes", "of predicted", None, "bytes of messages that 2 and 4 ranks sent, counted, over those of the "
                  "training graph that context_parallel cuts; the farther from one", "section 3.2.2", "run",
                  "messages and their sizes are known exactly", at_least=0.999, at_most=1.001),
            Claim("max_batch", "x", 13.7, "BERT-Base, 512 tokens, 16 GB devices: a ring of 64 over tensor parallelism on 12, as "
                  "many as it has heads", "abstract", "simulated", "the row asks for a quarter", at_least=10.3, at_most=17.1),
            Claim("max_length", "x", 3.0, "BERT-Base, batch 64, the same devices", "abstract", "simulated",
                  "the row asks for a quarter", at_least=2.25, at_most=3.75),
        ),
    )  # fmt: skip
    devices: int = choice(8, 2, 4, 16, 64, help="that share each sequence")
    exchange: str = choice("ring", "none", help="none: a device attends over its own tokens, and no sequence is shared")

    def baseline(self) -> "RingSelfAttention":
        return RingSelfAttention(self.devices, "none")

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Bytes that one device sends in a step and, in fp32 with Adam, holds, beside those of other ways to share it."""
        devices = self.devices if self.exchange == "ring" else 1
        sent = exchanged(graph, machine, step, self.devices, self.exchange)
        held = held_bytes(graph, step, devices, "ring")
        rows = tuple({"shared by": by, "sent, bytes": exchanged(graph, machine, step, self.devices, by).sent_bytes}
                     for by in ("ring", "ulysses", "megatron"))  # fmt: skip
        values = {"sent_bytes": sent.sent_bytes, "held_bytes": held, "held_alone_bytes": held_bytes(graph, step, 1, "none"),
                  "held_by_tensor_parallelism_bytes": held_bytes(graph, step, devices, "tensor")}  # fmt: skip
        values |= {"seconds": sent.seconds} if machine.link else {}
        return Reading(values, {name: "s" if name == "seconds" else "B" for name in values}, rows)
