"""A pipeline's work, and the order in which its ranks do it: fixed (`orders`), planned (`planned`) or the user's own."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Self

from narrows.errors import NarrowsError
from narrows.simulate.schedule import Need, Task, play
from narrows.simulate.timeline import Timeline


class Pass(NamedTuple):
    """One microbatch through one stage: F forward, I gradients of inputs, W of weights, B both; others as the order needs."""

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


def _each(value: float | Sequence[float], stages: int, what: str) -> tuple[float, ...]:
    found = (float(value),) * stages if isinstance(value, int | float) else tuple(map(float, value))
    if len(found) != stages:
        raise NarrowsError(f"{len(found)} values for {stages} stages.", where=what, remedy="Give one, or one for each stage.")
    return found


@dataclass(frozen=True)
class Work:
    """What one step asks of a pipeline: seconds and bytes of one microbatch in each stage of the model, first to last.

    seconds          by kind of pass; B is I + W where it is not given
    message_seconds  from one rank to another: one number, or [from][to]
    held_bytes       what a forward pass leaves for its backward; released_bytes  of it, what I frees (W frees the rest)
    working_bytes    what a backward pass takes and frees on top, such as activations that it computes again
    input_bytes      of the held, what the stage was handed: all that it must keep if it computes the rest again
    """

    microbatches: int
    seconds: Mapping[str, tuple[float, ...]]
    message_seconds: float | tuple[tuple[float, ...], ...] = 0.0
    held_bytes: tuple[float, ...] = ()
    released_bytes: tuple[float, ...] = ()
    working_bytes: tuple[float, ...] = ()
    input_bytes: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        stages: int,
        microbatches: int,
        forward: float | Sequence[float] = 1.0,
        inputs: float | Sequence[float] = 1.0,
        weights: float | Sequence[float] = 1.0,
        message_seconds: float | Sequence[Sequence[float]] = 0.0,
        held_bytes: float | Sequence[float] = 1.0,
        released_bytes: float | Sequence[float] = 0.0,
        working_bytes: float | Sequence[float] = 0.0,
        input_bytes: float | Sequence[float] = 0.0,
    ) -> Self:
        """Work from the seconds of forward, gradients of inputs and of weights; one number stands for every stage."""
        if min(stages, microbatches) < 1:
            raise NarrowsError(
                f"{stages} stages, {microbatches} microbatches.", where="pipeline", remedy="Give one or more of each."
            )
        seconds = {"F": forward, "I": inputs, "W": weights}
        message = message_seconds if isinstance(message_seconds, int | float) else tuple(map(tuple, message_seconds))
        memory = (held_bytes, released_bytes, working_bytes, input_bytes)
        return cls(
            microbatches,
            {kind: _each(value, stages, f"seconds of {kind}") for kind, value in seconds.items()},
            message,
            *(_each(value, stages, "bytes") for value in memory),
        )

    @property
    def stages(self) -> int:
        return len(self.seconds["F"])

    def of_kind(self, kind: str) -> tuple[float, ...]:
        """Seconds of each stage in passes of a kind."""
        if kind == "B" and "B" not in self.seconds:
            return tuple(map(sum, zip(self.seconds["I"], self.seconds["W"], strict=True)))
        if kind not in self.seconds:
            raise NarrowsError(f"no seconds for passes of kind {kind!r}.", where="pipeline", remedy="Add them to the work.")
        return self.seconds[kind]

    def send_seconds(self, source: int, target: int) -> float:
        """What a message between two ranks takes; nothing within one."""
        if source == target:
            return 0.0
        return self.message_seconds if isinstance(self.message_seconds, float | int) else self.message_seconds[source][target]

    def changes_bytes(self, kind: str, stage: int) -> tuple[float, float]:
        """(taken at the start, freed at the end) of a pass."""
        if not self.held_bytes or kind not in "FBIW":
            return 0.0, 0.0
        held, released, working = self.held_bytes[stage], self.released_bytes[stage], self.working_bytes[stage]
        return {"F": (held, 0.0), "B": (working, working + held), "I": (working, working + released),
                "W": (0.0, held - released)}[kind]  # fmt: skip


@dataclass(frozen=True)
class Order:
    """Which passes each rank runs, in turn.

    paths  the stages that a microbatch goes through, in turn, where that is not every stage from first to last
    """

    ranks: tuple[tuple[Pass, ...], ...]
    paths: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def from_actions(cls, actions: Mapping[int, Sequence[str]] | Sequence[Sequence[str]]) -> Self:
        """An order from the strings of `to_actions`; empty ones (idle slots) are left out."""
        rows = [actions[rank] for rank in sorted(actions)] if isinstance(actions, Mapping) else actions
        return cls(tuple(tuple(_parsed(text, rank) for text in row if text.strip()) for rank, row in enumerate(rows)))

    def to_actions(self) -> dict[int, list[str]]:
        """The order as `torch.distributed.pipelining` writes it: rank to strings of stage, kind (F I W B), microbatch."""
        return {rank: [str(one) for one in row] for rank, row in enumerate(self.ranks)}

    @property
    def placement(self) -> dict[int, int]:
        """The rank of each stage."""
        return {one.stage: rank for rank, row in enumerate(self.ranks) for one in row}

    def check(self, work: Work) -> None:
        """Raises NarrowsError where a pass is missing, extra or on another rank than its stage; `play` finds deadlocks."""
        place, seen = self.placement, set[Pass]()
        for rank, row in enumerate(self.ranks):
            for one in row:
                where = f"{one} on rank {rank}"
                if one in seen:
                    raise NarrowsError("it is there twice.", where=where, remedy="Leave one out.")
                if place[one.stage] != rank:
                    raise NarrowsError(
                        f"its stage is on rank {place[one.stage]} too.", where=where, remedy="Keep a stage on one rank."
                    )
                seen.add(one)
        wanted = {(stage, m) for m in range(work.microbatches) for stage in self.path(m, work)}
        for stage, m in sorted(wanted):
            backward = [kind for kind in "BIW" if (kind, stage, m) in seen]
            if ("F", stage, m) not in seen or backward not in (["B"], ["I", "W"]):
                lacks = "F" if ("F", stage, m) not in seen else "W" if backward == ["I"] else "I" if backward == ["W"] else "B"
                problem = "has B beside I or W" if len(backward) > 1 and "B" in backward else f"lacks {Pass(lacks, stage, m)}"
                where = f"rank {place[stage]}" if stage in place else f"stage {stage}"
                raise NarrowsError(f"it {problem}.", where=where, remedy="Give F, and B or both I and W, for each microbatch.")
        for one in seen:
            if one.kind in "FBIW" and (one.stage, one.microbatch) not in wanted:
                raise NarrowsError(f"{one} is on no path.", where=f"rank {place[one.stage]}", remedy="Leave it out.")

    def path(self, microbatch: int, work: Work) -> Sequence[int]:
        """The stages that a microbatch goes through, in turn."""
        return self.paths.get(microbatch) or range(work.stages)

    def tasks(self, work: Work, also: Mapping[Pass, Iterable[Pass]] | None = None) -> list[Task]:
        """The order as tasks for `schedule.play`, rank after rank; `also` adds needs that the network does not say."""
        self.check(work)
        place, more = self.placement, also or {}
        rows = [one for row in self.ranks for one in row]
        at = {one: i for i, one in enumerate(rows)}
        before: dict[tuple[int, int], int] = {}
        following: dict[tuple[int, int], int] = {}
        for m in range(work.microbatches):
            path = self.path(m, work)
            for stage, other in pairwise(path):
                before[other, m], following[stage, m] = stage, other
        kinds = {one.kind for one in rows}
        seconds = {kind: work.of_kind(kind) for kind in kinds}
        memory = {(kind, stage): work.changes_bytes(kind, stage) for kind in kinds for stage in range(work.stages)}

        def sent(one: Pass, rank: int) -> Need:
            return at[one], work.send_seconds(place[one.stage], rank)

        found = []
        for one in rows:
            kind, stage, m = one
            rank, needs = place[stage], list[Need]()
            if kind == "F":
                if (stage, m) in before:
                    needs.append(sent(Pass("F", before[stage, m], m), rank))
            elif kind == "W":
                needs.append((at[Pass("I", stage, m)], 0.0))
            elif kind in "BI":
                needs.append((at[Pass("F", stage, m)], 0.0))
                if (stage, m) in following:
                    last = Pass("B", following[stage, m], m)
                    needs.append(sent(last if last in at else last._replace(kind="I"), rank))
            needs += [sent(other, rank) for other in more.get(one, ())]
            takes, frees = memory[kind, stage]
            found.append(Task(one, kind, rank, seconds[kind][stage], tuple(needs), None, takes, frees))
        return found

    def play(self, work: Work, also: Mapping[Pass, Iterable[Pass]] | None = None) -> Timeline:
        """What runs when. Raises NarrowsError for an order that lacks a pass or cannot end, naming it."""
        return play(self.tasks(work, also))


def _parsed(text: str, rank: int) -> Pass:
    match = re.fullmatch(r"\s*(\d+)([A-Z]+)(\d+)\s*", text)
    if not match:
        raise NarrowsError(f"{text!r} is no pass.", where=f"rank {rank}", remedy="Write stage, kind and microbatch, such as 0F1.")
    return Pass(match[2], int(match[1]), int(match[3]))
