"""Fit the cost model's constants on one half of published measurements, and write them into the package.

    python bench/fit_efficiency.py [DATA_DIR] [--only STAGE ...] [--write]

Each stage (fit_stages.py) fits a few constants of one class of kernel or engine on the configurations whose hash is even
(`half`), with the constants of earlier stages held. The 80 % intervals are those of cross-conformal prediction: in four
folds of configurations, all stages are fitted again without a fold and predict it; the interval of a kind of forecast is
between the 10 % and 90 % quantile of measured / predicted, at rank (n + 1) p. `narrows validate` reports on the other half;
the rows used here are listed in `data/fitted_rows.txt`, so that they are never judged.
"""

import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize

from fit_stages import Stage, stages
from narrows import costmodel, validate
from narrows.costmodel import fitted, generation
from narrows.errors import NarrowsError
from narrows.measured.table import Forecast, Row, configuration, digest, fingerprint, half, hardware, read
from narrows.simulate import closed_loop
from narrows.simulate import training as step_model

DATA = Path(__file__).parents[1] / "src" / "narrows" / "data"
LARGEST = 0.94  # no kernel reaches more of the datasheet's peak over a step
FOLDS = 4


def put(table: str, name: str, value: float, **more: object) -> None:
    """Set a constant for the runs that follow."""
    entry = fitted().setdefault(table, {})
    entry[name] = {**entry.get(name, {}), "median": value, "low": value, "high": value, **more}
    forget(table)


def forget(table: str) -> None:
    """Drop what is cached of a table's constants."""
    costmodel.forget()
    if not table.startswith("engine-"):
        closed_loop._step_seconds.cache_clear()
    if not table.startswith("training"):
        step_model._parts.cache_clear()


def is_share(name: str) -> bool:
    """Whether a constant is a share of a peak."""
    return name.startswith(("matmul", "memory", "attention", "link", "pcie", "ethernet")) and "_" not in name


def ratios(rows: Sequence[Row], stage: Stage, only: str = "") -> np.ndarray:
    """Predicted over measured of every forecast that counts."""
    found = []
    for row in rows:
        try:
            found += [f.predicted / f.measured for f in stage.forecast(row) if f.name in stage.names and only in ("", f.name)]
        except NarrowsError:
            continue  # validate lists it with its reason
    return np.array(found)


def solve(stage: Stage, rows: Sequence[Row], steps: int, simplex: float = 0.25) -> np.ndarray:
    """Minimise the mean of |ratio - 1| and |log ratio|, both capped, over rows; the constants are left in `fitted()`."""
    names, guess = list(stage.first), np.log(list(stage.first.values()))
    first = np.log([fitted()[stage.table][name]["median"] for name in names])

    def loss(point: np.ndarray) -> float:
        for name, value in zip(names, point, strict=True):
            put(stage.table, name, min(float(np.exp(value)), LARGEST if is_share(name) else np.inf))
        found = ratios(rows, stage)
        return float(np.mean(np.minimum(np.abs(found - 1), 4.0) + np.minimum(np.abs(np.log(found)), 1.5))) / 2 + 0.01 * float(
            np.mean((point - guess) ** 2)
        )

    left = steps
    while left > len(names):  # a simplex that has collapsed is spread again
        around = np.vstack([first, *(first + simplex * np.eye(len(first))[i] for i in range(len(first)))])
        options = {"maxfev": left, "xatol": 1e-2, "fatol": 1e-4, "initial_simplex": around}
        best = minimize(loss, first, method="Nelder-Mead", options=options)
        left = left - best.nfev if np.max(np.abs(best.x - first)) > 0.02 else 0
        first = best.x
    loss(first)
    return ratios(rows, stage)


def wanted(stage: Stage, rows: Sequence[Row]) -> list[Row]:
    """The rows that a stage fits, evenly drawn where they are more than it needs."""
    found = [row for row in rows if half(row) == 0 and _is(stage, row)]
    return found[:: max(1, len(found) // stage.most)] if stage.most else found


def _is(stage: Stage, row: Row) -> bool:
    try:
        return stage.rows(row)
    except (NarrowsError, KeyError):
        return False


def crossed(rows: Sequence[Row], group: Callable[[Row], Any], most: int = 2000) -> Iterator[tuple[Any, Row, Forecast]]:
    """(group, row, forecast) of every row, each predicted by constants that were fitted without its group.

    A fit starts from the constants as they are and predicts about `most` rows on its way: a stage whose rows are too many for
    that to move its constants keeps them. Where a stage loses its rows, its constants go too: what they fall back to predicts.
    """
    kept = copy.deepcopy(fitted())
    for label in sorted({group(row) for row in rows}, key=str):
        held = [row for row in rows if group(row) == label]
        for stage in stages():
            mine = wanted(stage, rows)
            others = [row for row in mine if group(row) != label]
            if len(others) == len(mine):
                continue
            if len(others) >= 6:
                solve(stage, others, min(stage.steps, most // len(others)), 0.1)
            else:
                _drop(stage)
        for row in held:
            for forecast in validate.forecasts(row):
                yield label, row, forecast
        fitted().clear()
        fitted().update(copy.deepcopy(kept))
        for table in ("engine-", "training", "gpu"):
            forget(table)


def _drop(stage: Stage) -> None:
    """Forget what a stage fitted, also where it stands for GPUs of which nothing is measured.

    Constants of a generation fall back to those of any; an engine's or a framework's to the first guess.
    """
    for name, guess in stage.first.items():
        if stage.table.startswith(("engine-", "training")):
            put(stage.table, name, guess)
        else:
            fitted().get(stage.table, {}).pop(name, None)
        if stage.shared or name in ("attention_head", "attention_keys"):
            fitted()["gpu"].pop(name, None)
    forget("gpu")


def main() -> None:
    """Fit all stages (or --only some), print fit and held error, and write with --write."""
    places = [a for a in sys.argv[1:] if not a.startswith("-")]
    only = sys.argv[sys.argv.index("--only") + 1 :] if "--only" in sys.argv else []
    only = [o for o in only if not o.startswith("-")]
    rows = measured(Path(places[0]) if places and places[0] not in only else validate.beside())
    print(f"{'stage':<22} {'fit':>4} {'MAPE':>6} {'held':>5} {'MAPE':>6}   constants")
    for stage in stages():
        if only and not any(stage.name.startswith(o) for o in only):
            continue
        fit(stage, rows)
        if "--write" in sys.argv:
            write(rows)
    if "--write" in sys.argv:
        spread(rows)
        write(rows)
        print(f"wrote {DATA / 'efficiency.toml'}")


def measured(folder: Path) -> list[Row]:
    """The rows of all tables of a folder."""
    return [row for file in sorted(folder.glob("*.csv")) for row in read(file)]


def fit(stage: Stage, rows: Sequence[Row]) -> None:
    """Fit one stage, keep its constants with their spread, and print how it does on the rows that it saw and on the others."""
    begun = time.monotonic()
    mine = wanted(stage, rows)
    if len(mine) < 6:
        return
    held = [row for row in rows if half(row) == 1 and _is(stage, row)]
    for name, value in stage.first.items():
        if name not in fitted().get(stage.table, {}):
            put(stage.table, name, value)
    found = solve(stage, mine, stage.steps)
    out = ratios(held, stage)
    low, high = np.quantile(1 / found, (0.1, 0.9))  # measured over predicted
    for name in stage.first:
        value = fitted()[stage.table][name]["median"]
        wide = (min(1.0, 1 / high), max(1.0, 1 / low)) if name in stage.spread else (1.0, 1.0)
        ends = {"low": value * wide[0], "high": min(value * wide[1], 1.0) if is_share(name) else value * wide[1]}
        put(stage.table, name, value, **ends, rows=len(found), data=stage.name)
        if stage.shared or name in ("attention_head", "attention_keys"):
            entry = {k: v for k, v in fitted()[stage.table][name].items() if k != "rows"}
            fitted()["gpu"][name] = {**entry, "data": f"assumption: as on {stage.table}"}
    forget("gpu")
    shown = ", ".join(f"{n}={fitted()[stage.table][n]['median']:.3g}" for n in stage.first)
    for name in stage.names if len(stage.names) > 1 else ():
        part = ratios(held, stage, name)
        if len(part):
            print(f"    {name:<18} held {np.mean(np.abs(part - 1)):>6.1%}  median {np.median(part):.2f}")
    errors = f"{len(found):>4} {np.mean(np.abs(found - 1)):>6.1%} {len(out):>5} {np.mean(np.abs(out - 1)):>6.1%}"
    print(f"{stage.name:<22} {errors}   {shown}  [{time.monotonic() - begun:.0f} s]", flush=True)


def spread(rows: Sequence[Row]) -> None:
    """What the intervals, the null model and the validated domain come from, into `fitted()`.

    residuals   by key: measured over predicted by fits that had not seen the configuration
    elsewhere   by first word of the key: the same without the constants of the generation of hardware at hand
    null        by set: measured over what the datasheet's peaks allow;  seen   by key: machines, and models, of fitted rows
    """
    seen: dict[str, set[str]] = {}
    found: dict[tuple[str, str], list[float]] = {}
    runs: dict[tuple[str, str], set[tuple[str, ...]]] = {}

    def note(table: str, name: str, ratio: float, row: Row) -> None:
        found.setdefault((table, name), []).append(ratio)
        runs.setdefault((table, name), set()).add(configuration(row))

    ours = [row for row in rows if half(row) == 0]
    for row in ours:
        for f in validate.forecasts(row):
            note("null", f.name, f.measured / f.bound, row)
            seen.setdefault(f.key, set()).add(f.place)
    for _, row, f in crossed(ours, lambda row: digest(configuration(row))[1] % FOLDS):
        note("residuals", f.key, f.measured / f.predicted, row)
    for _, row, f in crossed(ours, hardware_group, 0):
        note("elsewhere", f.key.split("-")[0], f.measured / f.predicted, row)
    for table in ("residuals", "elsewhere", "null"):
        fitted()[table] = {}
    for (table, name), values in sorted(found.items()):
        many = max(len(runs[table, name]), 2)  # the figures of a run go together
        tail = max(0.0, (0.1 * (many + 1) - 1) / (many - 1))
        low, median, high = np.quantile(values, (tail, 0.5, 1 - tail))
        put(table, name, float(median), low=float(low), high=float(high), rows=len(values))
    fitted()["seen"] = {key: sorted(places) for key, places in sorted(seen.items())}


def hardware_group(row: Row) -> str:
    """The generation of hardware of a row."""
    try:
        return generation(hardware(row.get("system") or row["hardware"]).name)
    except (NarrowsError, KeyError):
        return ""


def quoted(name: str) -> str:
    return f'"{name}"' if "." in name else name


HEADER = """\
# Constants of the cost model: a fraction of the datasheet's peak that kernels reach, unless the name says otherwise.
# Written by bench/fit_efficiency.py, which fits them on the configurations whose hash is even; `narrows validate`
# reports on the others. `rows` measurements of `data` stand behind a constant; one without `rows` is an assumption.
#   median, low, high     the constant, and its 10 % and 90 % quantile
#   attention_head, _keys numbers: sizes at which fused attention reaches half its speed
#   kernel, launch        factors on a machine's kernel_seconds and launch_seconds
#   link, pcie, ethernet  share of the bandwidth to peers, over links of its own, through the host, over TCP
#   link_base, _hop       factors on that link's latency: once per collective, and per hop;  link_ramp: bytes
#   link_one_shot         the same factor where an engine reduces a small message in one kernel
#   call-*, call_least-*  microseconds around, and at least for, a kernel that is timed from Python
# [engine-*]   what an engine adds to its steps: see simulate/closed_loop.py;  [training*]: see simulate/training.py
# [residuals]  measured / predicted of each kind of forecast by fits that had not seen the row: the 80 % interval
# [elsewhere]  the same without the constants of the row's own generation: the interval outside of the validated domain
# [seen]       the machines (and models) of the fitted rows of each kind of forecast: the validated domain
# [null]       the one constant of the null model of each set
"""


def write(rows: Sequence[Row]) -> None:
    """Write the constants, and the fingerprints of every row in the fitted half."""
    lines = [HEADER]
    for table, entries in fitted().items():
        lines.append(f"[{quoted(table)}]")
        for name, entry in entries.items():
            if isinstance(entry, list):
                lines.append(f"{quoted(name)} = [{', '.join(chr(34) + str(v) + chr(34) for v in entry)}]")
            else:
                cells = ", ".join(
                    f"{k} = {v:.4g}" if isinstance(v, float) else f"{k} = {v}" if isinstance(v, int) else f'{k} = "{v}"'
                    for k, v in entry.items()
                )
                lines.append(f"{quoted(name)} = {{ {cells} }}")
        lines.append("")
    (DATA / "efficiency.toml").write_text("\n".join(lines))
    known = sorted({fingerprint(row) for row in rows if half(row) == 0})
    (DATA / "fitted_rows.txt").write_text("\n".join(known) + "\n")


if __name__ == "__main__":
    main()
