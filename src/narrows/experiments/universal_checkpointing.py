"""What Universal Checkpointing claims: a small Llama saved on ranks over gloo in one layout, and loaded in others."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from narrows.errors import NarrowsError
from narrows.layout import Layout
from narrows.run.check import largest_error, merged, rank
from narrows.run.job import Ran, Run, small
from narrows.run.launch import launch
from narrows.techniques.training_memory_offload.universal_checkpointing import UniversalCheckpointing

_LAYOUTS = ("tensor=2,accumulate=4", "data=2,shard=3,accumulate=2", "tensor=2,pipeline=2,accumulate=4")


def _run(text: str, steps: int, folder: Path | str = "", every: int = 0) -> Run:
    return Run(Layout.parse(text), small(Layout()), steps=steps, folder=str(folder), every=every)


def _ran(run: Run) -> list[Ran]:
    return launch(rank, run.layout.devices, run)


def _elsewhere(technique: UniversalCheckpointing, saved: Run, other: str, folder: Path) -> Run:
    """The run that goes on with what was saved, in another layout."""
    from narrows.run.checkpoint import consolidate, folder_of, latest

    if not technique.universal:
        return replace(saved, layout=Layout.parse(other), every=0)
    step = latest(Path(saved.folder))
    if not folder.exists():
        consolidate(folder_of(Path(saved.folder), step), folder_of(folder, step))
    return replace(saved, layout=Layout.parse(other), every=0, folder=str(folder))


def resumed(technique: UniversalCheckpointing) -> float:
    """The share of pairs of layouts that hand over every bit."""
    same = 0
    with TemporaryDirectory() as place:
        for number, text in enumerate(_LAYOUTS):
            saved = replace(_run(text, 2, Path(place) / str(number), 2), own=not technique.universal)
            before = merged(_ran(saved), "state")
            for other in _LAYOUTS:
                try:
                    after = merged(_ran(_elsewhere(technique, saved, other, Path(place) / f"{number}-atoms")), "state")
                except NarrowsError:
                    continue  # a rank that finds not what it needs stops
                same += _equal(before, after)
    return same / len(_LAYOUTS) ** 2


def _equal(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    return before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)


def continued(technique: UniversalCheckpointing) -> float:
    """How far two ranks that go on after the death of one of four end from where four end."""
    with TemporaryDirectory() as place:
        undisturbed = merged(_ran(_run(_LAYOUTS[-1], 4)), "state")
        broken = replace(_run(_LAYOUTS[-1], 4, Path(place) / "saved", 1), own=not technique.universal, dies=(3, 1))
        try:
            _ran(broken)
        except NarrowsError as error:
            if "rank 3 of 4: SIGKILL" not in str(error):
                raise
        rest = _elsewhere(technique, replace(broken, dies=(-1, -1)), _LAYOUTS[0], Path(place) / "atoms")
        try:
            return largest_error(merged(_ran(rest), "state"), undisturbed)
        except NarrowsError:
            return math.inf


def save_cost(technique: UniversalCheckpointing) -> float:
    """Bytes in files over bytes of what they hold."""
    if not technique.universal:
        return math.inf  # `resumed` shows that they load nowhere else
    with TemporaryDirectory() as place:
        state = merged(_ran(_run(_LAYOUTS[-1], 1, place, 1)), "state")
        written = sum(file.stat().st_size for file in Path(place).rglob("*.safetensors"))
    return written / sum(value.nbytes for value in state.values())
