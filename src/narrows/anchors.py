"""A shipped machine fitted to a few steps that its owner has timed on the real one.

    model,phase,batch,tokens,context,seconds,devices,dtype
    llama-2-7b,prefill,4,1024,0,0.412,1,bf16
    llama-2-7b,decode,16,1,2048,0.0231,1,int8

`tokens` are the new ones of each sequence, `context` those it has in the cache; `devices` (1) share the model by tensor
parallelism; `dtype` (bf16) is that of the weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from narrows.calibrate import interval
from narrows.costmodel import achieved
from narrows.diagnose import prepared, timed
from narrows.errors import NarrowsError, closest
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.measured.kernels import format_of, in_format
from narrows.measured.table import Row, count, graph_of, model, number, read
from narrows.step import PHASES, Step

COLUMNS = ("model", "phase", "batch", "tokens", "context", "seconds")
FEWEST, MOST = 5, 20
# What is scaled, and which constant's spread over kernels says how far a machine may be from it before any anchor is seen.
CAUSES = {"compute": "matmul", "bandwidth": "memory", "launch": "launch", "link": "link"}
LEAST_SPREAD = 0.15  # of a logarithm: no constant is known better than this for a machine that was not measured
LAUNCH_SPREAD = 0.5  # hosts differ more than chips: an assumption
NOISE = 0.1  # of a logarithm: what scales alone leave of the error of a step, by experience; beyond 1.5 times it counts less


@dataclass(frozen=True)
class Anchor:
    """One measured step: the graph of one device, and the seconds it took."""

    row: int
    graph: Graph
    step: Step
    seconds: float


@dataclass(frozen=True)
class Fit:
    """A machine fitted to anchors.

    scales       by cause: the factor on what the machine does of it in a second (below 1: slower than was thought)
    identified   by cause: the share of its prior variance that the anchors took away, from 0 (nothing known) to 1
    before, after, left_out   |predicted / measured - 1| of each anchor: of the machine as it was, as fitted, and as
                              fitted to the other anchors alone
    """

    machine: Machine
    scales: dict[str, float]
    identified: dict[str, float]
    before: tuple[float, ...]
    after: tuple[float, ...]
    left_out: tuple[float, ...]


def anchors(path: Path, machine: Machine) -> tuple[list[Anchor], list[str]]:
    """The measured steps of a CSV file, and a line for each row that is wrong: it names row and column.

    Raises NarrowsError for a file that cannot be read or lacks a column, and for fewer or more sound rows than a fit is for.
    """
    rows = read(path)
    missing = [column for column in COLUMNS if not rows or column not in rows[0]]
    if missing:
        raise NarrowsError(f"it has no column {missing[0]!r}.", where=str(path), remedy=f"Its header is {','.join(COLUMNS)}.")
    found, errors = [], []
    for place, row in enumerate(rows, 2):
        try:
            found.append(_anchor(place, row, machine))
        except NarrowsError as error:
            errors.append(str(error.inside(f"{path.name}: row {place}")))
    if not FEWEST <= len(found) <= MOST:
        first = f" The first that is wrong: {errors[0]}" if errors else ""
        problem = f"it has {len(found)} sound rows.{first}"
        raise NarrowsError(problem, where=str(path), remedy=f"Give {FEWEST} to {MOST} measured steps.")
    return found, errors


def _anchor(place: int, row: Row, machine: Machine) -> Anchor:
    if None in row or any(row[column] is None for column in COLUMNS):
        raise NarrowsError("it has more or fewer cells than the header.", where="row", remedy="Check its commas and quotes.")
    phase = row["phase"].strip()
    if phase not in PHASES:
        raise NarrowsError(f"{phase[:40]!r} is not a phase.", where="phase", remedy=closest(phase, list(PHASES)))
    named = row["model"].strip()
    weight = format_of(row.get("dtype") or "bf16")
    graph = in_format(graph_of(named if Path(named).exists() else model(named)), weight)
    tokens, context = count(row, "tokens"), int(number(row, "context", zero=True))
    if phase == "decode" and tokens != 1:
        raise NarrowsError(f"a decode step makes 1 token, not {tokens}.", where="tokens", remedy="Give seconds of one step.")
    step = Step(count(row, "batch"), tokens, context, 0, phase)
    return Anchor(place, prepared(graph, step, machine, count(row, "devices", 1)), step, number(row, "seconds"))


def fit(machine: Machine, found: Sequence[Anchor], source: str) -> Fit:
    """The machine scaled by what the anchors say of each cause, and how well it then predicts those it has not seen.

    Maximum a posteriori: logarithms of the errors with Huber's weights, those of the scales normal around 0 with the
    spread of the fitted constants. A cause that no anchor depends on keeps its scale of 1.
    """
    prior = _prior(machine)
    theta, covariance = _solve(machine, found, prior, np.zeros(len(prior)))
    out = []
    for i in range(len(found)):
        others = [*found[:i], *found[i + 1 :]]
        out.append(float(_off(_scaled(machine, _solve(machine, others, prior, theta)[0]), found[i : i + 1])[0]))
    scales = {cause: float(np.exp(t)) for cause, t in zip(CAUSES, theta, strict=True)}
    shares = {cause: float(1 - covariance[k, k] / prior[k] ** 2) for k, cause in enumerate(CAUSES)}
    fitted = replace(
        _scaled(machine, theta), title=f"{machine.title}, fitted to {len(found)} measured steps", provenance="calibrated"
    )  # fmt: skip
    fitted = replace(fitted, efficiency={**fitted.efficiency, "step": interval([math.exp(o) for o in out])})
    old, new = machine.figures(), fitted.figures()
    said = ", ".join(f"{cause} x{scale:.3g}" for cause, scale in scales.items())
    sources = {}
    for key, value in new.items():
        was = machine.sources.get(key)
        sources[key] = was if was and old[key] == value else f"{was}; fitted: {said} ({source})" if was else source
    return Fit(
        replace(fitted, sources=sources), scales, shares, _errors(_off(machine, found)), _errors(_off(fitted, found)),
        _errors(np.array(out)),
    )  # fmt: skip


def _prior(machine: Machine) -> Any:
    """Standard deviation of each scale's logarithm: what kernels of other machines spread around their constant."""
    spread = []
    for cause, what in CAUSES.items():
        known = achieved(machine, what)
        spread.append(LAUNCH_SPREAD if cause == "launch" else max(math.log(known.high / known.low) / 2.563, LEAST_SPREAD))
    return np.array(spread)


def _scaled(machine: Machine, theta: Any) -> Machine:
    by = dict(zip(CAUSES, np.exp(theta).tolist(), strict=True))
    return machine.scaled(**{**by, "launch": 1 / by["launch"]})


def _off(machine: Machine, found: Sequence[Anchor]) -> Any:
    """The logarithm of measured / predicted of each anchor."""
    return np.array([math.log(a.seconds / float(timed(a.graph, machine, a.step)[0])) for a in found])


def _errors(off: Any) -> tuple[float, ...]:
    return tuple(np.abs(np.exp(-off) - 1).tolist())


def _solve(machine: Machine, found: Sequence[Anchor], prior: Any, start: Any) -> tuple[Any, Any]:
    """(theta, its posterior covariance) by Gauss-Newton steps on the reweighted squares; slopes by differences."""
    theta, small = start.copy(), 1e-4
    hessian = np.diag(prior**-2)
    for _ in range(8):
        off = _off(_scaled(machine, theta), found)
        slopes = np.array([_off(_scaled(machine, theta + small * one), found) - off for one in np.eye(len(theta))]).T / small
        weight = np.minimum(1.0, 1.5 * NOISE / np.maximum(np.abs(off), 1e-12)) / NOISE**2
        hessian = slopes.T @ (weight[:, None] * slopes) + np.diag(prior**-2)
        change = np.linalg.solve(hessian, -slopes.T @ (weight * off) - theta / prior**2)
        theta = theta + np.clip(change, -0.5, 0.5)
        if np.abs(change).max() < 1e-3:
            break
    return theta, np.linalg.inv(hessian)
