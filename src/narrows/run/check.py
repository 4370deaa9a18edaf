"""What is to be trained on ranks of this machine, and whether they did what one process does and sent what the graph says."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrows.errors import NarrowsError
from narrows.kinds import COLLECTIVES
from narrows.layout import Layout
from narrows.run.expected import predicted_bytes, stages_of
from narrows.run.launch import PATIENCE_SECONDS, launch
from narrows.technique import Reading

Arrays = Mapping[str, NDArray[np.float64]]
TOLERANCE = 1e-9  # of double precision; what is left out or added twice shows at 1e-3 and above


@dataclass(frozen=True)
class Run:
    """What to train, and how.

    config     of a Llama (empty: `small` chooses it);  sequence   tokens of each
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
    executed, order   passes of the last step in turn, and those planned;  seconds   of each step;  stalls   of each checkpoint
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
    stalls: tuple[float, ...]


@dataclass(frozen=True)
class Checked:
    """A run beside one process and the graph.

    error   the largest difference in losses, gradients, weights and moments, over the largest number there is
    sent, predicted   bytes of all ranks in a step, by kind of collective;  ordered   passes ran in the planned order
    """

    run: Run
    losses: tuple[float, ...]
    error: float
    ordered: bool
    sent: Mapping[str, float]
    predicted: Mapping[str, float]
    seconds: float
    ran: tuple[Ran, ...]

    @property
    def volume(self) -> float:
        """Bytes sent over bytes predicted."""
        return sum(self.sent.values()) / sum(self.predicted.values()) if self.predicted else 1.0

    @property
    def passed(self) -> bool:
        """Whether it computed what one process does, in the planned order, and sent what was predicted within 2 %.

        The 2 % are for sums that no graph has: of a vocabulary's loss, and of norms' gradients under sequence parallelism.
        """
        return self.error <= TOLERANCE and self.ordered and abs(self.volume - 1) <= 0.02

    @property
    def reading(self) -> Reading:
        """As a table: what was sent of each kind, and the rest in figures."""
        kinds = [kind for kind in COLLECTIVES if kind in self.sent or kind in self.predicted]
        rows = tuple({"collective": kind.replace("_", " "), "sent, bytes": self.sent.get(kind, 0),
                      "predicted, bytes": self.predicted.get(kind, 0.0)} for kind in kinds)  # fmt: skip
        values = {"first_loss": self.losses[0], "last_loss": self.losses[-1], "largest_error": self.error,
                  "passes_in_order": float(self.ordered), "step": self.seconds}  # fmt: skip
        return Reading(values, {"step": "s"}, rows)

    def as_json(self) -> dict[str, Any]:
        """As plain data (SI units)."""
        return {"layout": str(self.run.layout), "ranks": self.run.layout.devices, "model": self.run.model,
                "losses": self.losses, "error": self.error, "ordered": self.ordered, "sent_bytes": self.sent,
                "predicted_bytes": self.predicted, "volume": self.volume, "step_seconds": self.seconds,
                "passed": self.passed}  # fmt: skip


def small(layout: Layout) -> dict[str, Any]:
    """The smallest Llama that divides over a layout, as a config.json."""
    ways = layout.tensor * (layout.context if layout.context_by == "ulysses" else 1)
    heads, stages = ways * -(-4 // ways), stages_of(layout)  # four of each, or the next number that divides
    deep = stages * -(-4 // stages)
    return {"model_type": "llama", "hidden_size": 16 * heads, "intermediate_size": 32 * heads, "num_hidden_layers": deep,
            "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 128 * layout.tensor,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "tie_word_embeddings": False,
            "torch_dtype": "float32"}  # fmt: skip


def rank(run: Run) -> Ran:
    """This process's part in a run, once it is joined to the others."""
    from narrows.run.train import Trainer

    return Trainer(run).train()


def alone(run: Run) -> Run:
    """The same steps in one process."""
    whole = Layout(microbatch=run.layout.batch)
    return replace(run, layout=whole, config=run.model, exchange="", folder="", every=0, own=False, lazy=False, dies=(-1, -1))


@cache
def check(run: Run, patience: float = PATIENCE_SECONDS) -> Checked:
    """Run it on as many ranks as its layout has devices, and in one process, and compare. Raises what `launch` raises."""
    require(run)
    return compared(run, launch(rank, run.layout.devices, run, patience=patience), patience)


def compared(run: Run, ran: Iterable[Ran], patience: float = PATIENCE_SECONDS) -> Checked:
    """What ranks did beside one process, which is started for it; it takes all steps, also where they went on from some."""
    ran = tuple(ran)
    losses = np.array([r.losses for r in ran if r.place["tensor"] == 0]).sum(0)
    if not losses.size:
        raise NarrowsError(f"its checkpoints have {run.steps} steps or more.", where=run.folder, remedy="Ask for more steps.")
    (one,) = launch(rank, 1, alone(run), patience=patience)
    whats = ("gradients", "state") if len(losses) == run.steps else ("state",)  # those of the first step are gone
    error = max(largest_error({"loss": losses}, {"loss": np.array(one.losses[-len(losses) :])}),
                *(largest_error(merged(ran, what), getattr(one, what)) for what in whats))  # fmt: skip
    sent: Counter[str] = Counter()
    for r in ran:
        sent.update({kind: round(count) for kind, count in r.sent_bytes.items()})
    seconds = float(np.median(np.max([r.seconds for r in ran], axis=0)[-max(1, len(losses) - 1) :]))
    return Checked(run, tuple(losses.tolist()), error, all(r.executed == r.order for r in ran), dict(sent),
                   predicted_bytes(run.model, run.layout, run.sequence), seconds, ran)  # fmt: skip


def largest_error(ours: Arrays, theirs: Arrays) -> float:
    """The largest difference of two sets of arrays over the largest of the second; NaN where their names differ."""
    if ours.keys() != theirs.keys():
        return float("nan")
    top = max(float(np.abs(value).max()) for value in theirs.values())
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs) / top


def merged(ran: Iterable[Ran], what: str) -> Arrays:
    """Gradients or state of the whole model from the ranks that have parts of it."""
    return {name: value for one in ran for name, value in getattr(one, what).items()}


def require(run: Run) -> None:
    """Raises NarrowsError for a run that is not possible, with what is."""
    from narrows.capture.config import from_config

    layout = run.layout
    layout.require(from_config(run.model, "run"), sequence=run.sequence)
    for name, wrong, remedy in (
        ("expert", layout.expert > 1, "Give expert=1: the model that runs has no experts."),
        ("offload", layout.offload != "none", "Give offload=none."),
        ("balance", layout.balance != "none", "Give balance=none."),
        ("recompute", layout.recompute == "selective" or layout.recompute_layers > 0, "Give recompute=none or full."),
        ("recompute", layout.recompute == "full" and run.ladder, "Give recompute=none."),
        ("shard", layout.shard == 1, "Give shard=2: FSDP2 shards gradients with optimizer states."),
        ("shard", layout.shard > 0 and layout.context > 1, "Give shard=0, or context=1."),
        ("gradient_bits", layout.gradient_bits == 8, "Give gradient_bits=16: what runs exchanges every bit."),
        ("pipeline", layout.pipeline > 1 and run.ladder, "Give pipeline=1: a ladder's residual crosses no stage."),
    ):
        if wrong:
            raise NarrowsError(f"{getattr(layout, name)} does not run here.", where=f"layout: {name}", remedy=remedy)
