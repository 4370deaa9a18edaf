"""Cut layers over the devices of a node, stages over nodes, and the batch over replicas; give every stage several chunks.

Tensor parallelism sends twice a layer and pass, so it stays where links are fast; a pipeline sends once a stage and crosses
nodes. With several chunks of layers on each device, 1F1B goes round the devices several times: each turn is shorter, and so
is the time in which the pipeline fills and drains.

## When it helps
Models that need many devices for their weights alone. Interleaving pays with few microbatches for each stage.

## When it does not
v chunks send v times as many messages between stages, and a device keeps activations of a few microbatches more; with many
microbatches the bubble is small anyway. Microbatches must be a multiple of the stages.

## Reference
Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM, SC 2021, arXiv 2104.04473.
"""

from dataclasses import dataclass
from typing import ClassVar

from narrows.cost import Limit
from narrows.simulate.orders import gpipe, interleaved
from narrows.simulate.pipeline import Order, Work
from narrows.technique import Card, Claim, No, Schedules, Verdict, choice


@dataclass(frozen=True)
class MegatronPTDP(Schedules):
    """Tensor, pipeline and data parallelism, with 1F1B over several chunks of layers on each rank."""

    card: ClassVar[Card] = Card(
        "megatron-lm-ptd-p",
        relieves=(Limit.CAPACITY, Limit.SCHEDULING),
        phases=("train",),
        exact=True,
        price="v chunks on a rank send v times as many messages",
        claims=(
            Claim("error", "of the largest number", None, "losses, gradients, weights and moments of two AdamW steps of a small "
                  "Llama in double precision, tensor = 2, tensor = 4, pipeline = 2 with chunks, and tensor = 2 x pipeline = 2, "
                  "over gloo, against one process", "section 2", "run", "rounding alone", at_most=1e-9),
            Claim("sent_bytes", "of predicted", None, "bytes that the same runs sent, counted, over those of the training graph "
                  "that tensor_parallel cuts and of the stages' messages; the farther from one", "section 3.2", "run",
                  "the sums of a vocabulary's loss, three numbers a token, are in no graph", at_least=0.999, at_most=1.01),
            Claim("in_order", "of passes", None, "passes that 2 and 4 ranks of torch.distributed.pipelining ran in their place "
                  "in the planned order of 1F1B with two chunks, 8 microbatches", "section 2.2", "run", "a count", at_least=1.0),
            Claim("of_peak", "of the peak", 0.52, "GPT of 1 T parameters on 3,072 A100, batch 3,072: tensor = 8, pipeline = 64, "
                  "data = 6; the paper's FLOP, our seconds", "abstract, table 1", "simulated", "the row asks for five points",
                  at_least=0.47, at_most=0.57),
            Claim("interleaving", "x", 1.10, "throughput of GPT-175B on 96 A100, tensor = 8, pipeline = 12, 24 microbatches, "
                  "4 chunks, over one chunk", "abstract: 10+%; section 5.3.2", "simulated", "at least what the paper says",
                  at_least=1.10),
        ),
    )  # fmt: skip
    chunks: int = choice(4, 1, 2, help="of layers on each rank")
    compose: bool = choice(True, False, help="without it: replicas that gather all weights (ZeRO-3), stages in GPipe's order")

    def baseline(self) -> "MegatronPTDP":
        return MegatronPTDP(1, False)

    def check(self, work: Work) -> Verdict:
        """Interleaving asks for stages that divide over the chunks, and microbatches that divide over the ranks."""
        ranks, left = divmod(work.stages, self.chunks)
        if left or not ranks:
            return No(f"{work.stages} stages do not divide into {self.chunks} chunks a rank")
        if self.chunks > 1 and work.microbatches % ranks:
            return No(f"{work.microbatches} microbatches do not divide over {ranks} ranks")
        return True

    def order(self, work: Work) -> Order:
        """1F1B, round and round the ranks."""
        if not self.compose:
            return gpipe(work.stages, work.microbatches)
        return interleaved(work.stages // self.chunks, work.microbatches, self.chunks)
