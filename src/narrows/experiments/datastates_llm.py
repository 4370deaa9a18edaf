"""What DataStates-LLM claims: checkpoints of a small Llama on two ranks over gloo, and a large one on the schedule engine."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.layout import Layout
from narrows.machine import cluster
from narrows.run.check import merged, rank
from narrows.run.job import Run, small
from narrows.run.launch import launch
from narrows.simulate.training import step_seconds
from narrows.techniques.training_memory_offload.datastates_llm import MASTER_BYTES, WRITE_BYTES_PER_S, DataStates, seconds


def stall(technique: DataStates) -> float:
    """What blocking checkpoints hold training up, over ours; lower quartiles, which leave out much of what others run here."""
    blocking, ours = (float(np.quantile(_stalls(lazy), 0.25)) for lazy in (False, technique.lazy))
    return blocking / ours if _goes_on(technique.lazy) else 0.0


def _run(folder: str, steps: int, every: int, width: int, lazy: bool) -> Run:
    config = {**small(Layout()), "hidden_size": width, "intermediate_size": 2 * width}
    return Run(Layout.parse("data=2,microbatch=2"), config, sequence=64, steps=steps, folder=folder, every=every, lazy=lazy)


@cache
def _stalls(lazy: bool) -> tuple[float, ...]:
    """Seconds for which each checkpoint held each rank up."""
    with TemporaryDirectory() as folder:
        return tuple(seconds for one in launch(rank, 2, _run(folder, 12, 3, 256, lazy)) for seconds in one.stalls)


@cache
def _goes_on(lazy: bool) -> bool:
    """Whether a run that was killed goes on from its checkpoints to the same bits."""
    with TemporaryDirectory() as folder:
        kept = _run(folder, 4, 1, 64, lazy)
        undisturbed = merged(launch(rank, 2, replace(kept, folder="", every=0)), "state")
        try:
            launch(rank, 2, replace(kept, dies=(1, 2)))
        except NarrowsError as error:
            if "SIGKILL" not in str(error):
                raise
        if not any(Path(folder).glob("step-*/manifest.json")):
            return False
        after = merged(launch(rank, 2, kept), "state")
    return after.keys() == undisturbed.keys() and all(np.array_equal(after[name], undisturbed[name]) for name in after)


def end_to_end(technique: DataStates) -> float:
    """Seconds of steps that wait for their checkpoints over those of ours."""
    graph, group = capture("llama-2-13b"), cluster("aws-p4d")
    spent = step_seconds(graph, group, Layout.parse("tensor=4,data=8,shard=1,accumulate=8"), 2048)
    busy, update = sum(spent.values()) - spent["optimizer"], spent["optimizer"]
    held = graph.parameters * (2 + MASTER_BYTES) / 32
    host = group.machine.host_link
    if host is None:
        raise NarrowsError("it has no link to its host.", where=group.name, remedy="Add one to its machine.")
    blocking, ours = (seconds(32, busy, update, held / host.bandwidth_bytes_per_s, held / WRITE_BYTES_PER_S, lazy)
                      for lazy in (False, technique.lazy))  # fmt: skip
    return blocking / ours
