"""What is to be trained on ranks of this machine, and what each of them tells of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrows.errors import NarrowsError
from narrows.layout import Layout
from narrows.simulate.played import stages_of

Arrays = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Run:
    """What to train, and how.

    config     of a Llama or Mixtral (empty: `small` chooses it);  sequence   tokens of each
    dtype      fp64, so that what differs from one process is a mistake and not rounding, or fp32
    exchange   what ranks of a context group do: ring or ulysses (softmax), gather or scan (linear); '' is the layout's;
               alone leaves out what they do, and the sums of a tensor group
    linear     attention without softmax: '' (softmax), plain or gated;  ladder  its residuals wait for one half layer less
    folder     of checkpoints, written every `every` steps, of which a run goes on from the latest;
               own: each rank writes all it has, and reads what the rank of its number wrote;
               lazy: they are written beside the steps that follow, and not between two of them
    dies       (rank, step) at whose end that rank kills itself: what a failure does
    """

    layout: Layout
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    sequence: int = 32
    dtype: str = "fp64"
    steps: int = 2
    exchange: str = ""
    linear: str = ""
    ladder: bool = False
    folder: str = ""
    every: int = 0
    own: bool = False
    lazy: bool = False
    dies: tuple[int, int] = (-1, -1)

    @property
    def model(self) -> dict[str, Any]:
        """The configuration of the model that runs."""
        return dict(self.config) or small(self.layout)


@dataclass(frozen=True)
class Ran:
    """What one rank did: its place in the mesh, losses of each step, gradients of the first.

    state   weights and the optimizer's moments after the last step
    executed, order   passes of the last step in turn, and those planned;  stalls   seconds of each checkpoint
    seconds   of each step;  busy_seconds   of them, in which this rank's thread had a core;  queued_seconds   waited for one
    calls, sent_bytes   of the last step, by kind of collective;  overlapped   products between an exchange and its use
    """

    place: Mapping[str, int]
    losses: tuple[float, ...]
    gradients: Arrays
    state: Arrays
    executed: tuple[str, ...]
    order: tuple[str, ...]
    calls: Mapping[str, int]
    sent_bytes: Mapping[str, float]
    overlapped: int
    seconds: tuple[float, ...]
    busy_seconds: tuple[float, ...]
    queued_seconds: tuple[float, ...]
    stalls: tuple[float, ...]


def small(layout: Layout, wide: int = 1) -> dict[str, Any]:
    """The smallest Llama (with experts: Mixtral) that divides over a layout, or one `wide` times as wide, as a config.json."""
    ways = layout.tensor * (layout.context if layout.context_by == "ulysses" else 1)
    heads, stages = ways * -(-4 // ways), stages_of(layout)  # four of each, or the next number that divides
    ends = 2 * (layout.balance == "layers")
    deep = sum(layout.split) or stages * -(-(4 + ends) // stages) - ends
    config = {"model_type": "llama", "hidden_size": 16 * heads * wide, "intermediate_size": 32 * heads * wide,
              "num_hidden_layers": deep, "num_attention_heads": heads, "num_key_value_heads": heads,
              "vocab_size": 128 * layout.tensor * wide, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
              "tie_word_embeddings": False, "torch_dtype": "float32"}  # fmt: skip
    experts = {"model_type": "mixtral", "num_local_experts": layout.expert * -(-4 // layout.expert), "num_experts_per_tok": 2}
    return config | experts if layout.expert > 1 else config


def require(run: Run) -> None:
    """Raises NarrowsError for a run that is not possible, with what is."""
    from narrows.capture.config import from_config

    layout = run.layout
    layout.require(from_config(run.model, "run"), sequence=run.sequence)
    experts, offloads = "num_local_experts" in run.model, layout.offload != "none"
    for name, wrong, remedy in (
        ("tensor", experts and layout.tensor > 1, "Give tensor=1: experts are shared whole here."),
        ("shard", experts and layout.shard > 0, "Give shard=0: experts are not sharded here."),
        ("offload", layout.offload not in ("none", "optimizer"), "Give offload=optimizer, or none."),
        ("offload_to", offloads and layout.offload_to == "host", "Give offload_to=disk: a CPU's memory is the host's."),
        ("offload", offloads and bool(run.folder), "Give offload=none, or keep no checkpoints."),
        ("balance", layout.balance == "vocabulary", "Give balance=layers, or none."),
        ("recompute", layout.recompute == "selective" and layout.context > 1, "Give recompute=full, none, or context=1."),
        ("recompute", layout.recompute != "none" and run.ladder, "Give recompute=none."),
        (
            "recompute_layers",
            layout.recompute_layers > 0 and stages_of(layout) > layout.pipeline,
            "Give recompute_layers=0, for all of them.",
        ),
        ("shard", layout.shard == 1, "Give shard=2: FSDP2 shards gradients with optimizer states."),
        ("shard", layout.shard > 0 and layout.context > 1, "Give shard=0, or context=1."),
        ("groups", bool(layout.groups), "Leave it out: the ranks of one machine are alike."),
        ("shares", bool(layout.shares), "Leave it out: the ranks of one machine are alike."),
        ("shares", bool(layout.shares), "Leave it out: replicas run equally many microbatches here."),
        ("gradient_bits", layout.gradient_bits < 16, "Give gradient_bits=16: what runs exchanges every bit."),
        ("pipeline", layout.pipeline > 1 and run.ladder, "Give pipeline=1: a ladder's residual crosses no stage."),
    ):
        if wrong:
            raise NarrowsError(f"{getattr(layout, name)} does not run here.", where=f"layout: {name}", remedy=remedy)
