"""Whether ranks of this machine did what one process does, in the planned order, and sent what the graph says."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from narrows.errors import NarrowsError
from narrows.kinds import COLLECTIVES
from narrows.layout import Layout
from narrows.run.expected import predicted_bytes
from narrows.run.job import Arrays, Ran, Run, require
from narrows.run.launch import PATIENCE_SECONDS, launch
from narrows.technique import Reading

TOLERANCE = 1e-9  # of double precision; what is left out or added twice shows at 1e-3 and above


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
                  "passes_in_order": float(self.ordered)}  # fmt: skip
        return Reading(values, {}, rows)

    def as_json(self) -> dict[str, Any]:
        """As plain data (SI units)."""
        return {"layout": str(self.run.layout), "ranks": self.run.layout.devices, "model": self.run.model,
                "losses": self.losses, "error": self.error, "ordered": self.ordered, "sent_bytes": self.sent,
                "predicted_bytes": self.predicted, "volume": self.volume,
                "passed": self.passed}  # fmt: skip


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
    return Checked(run, tuple(losses.tolist()), error, all(r.executed == r.order for r in ran), dict(sent),
                   predicted_bytes(run), ran)  # fmt: skip


def largest_error(ours: Arrays, theirs: Arrays) -> float:
    """The largest difference of two sets of arrays over the largest of the second; NaN where their names differ."""
    if ours.keys() != theirs.keys():
        return float("nan")
    top = max(float(np.abs(value).max()) for value in theirs.values())
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs) / top


def merged(ran: Iterable[Ran], what: str) -> Arrays:
    """Gradients or state of the whole model from the ranks that have parts of it."""
    return {name: value for one in ran for name, value in getattr(one, what).items()}
