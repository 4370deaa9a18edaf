"""How well the cost model predicts what it has not seen: configurations held back, and whole groups left out of the fit.

    python bench/fit_groups.py [DATA_DIR]

For each set of rows: our mean absolute error on the held half beside one constant and the best published predictor, how
often the 80 % interval holds, and the error where all rows of a machine, or of a model (training: a source), were left
out of every stage of the fit before they were predicted; then the groups one by one. Takes minutes.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fit_efficiency import crossed, measured
from narrows import validate
from narrows.errors import NarrowsError
from narrows.measured.table import Row, hardware


def machine_of(row: Row) -> str:
    """The machine of a row, by name."""
    try:
        return hardware(row.get("system") or row["hardware"]).name
    except (NarrowsError, KeyError):
        return "unknown"


def subject_of(row: Row) -> str:
    """The source of a training row, the model that a row serves, the operator of a kernel."""
    if "recompute" in row:
        return row["source"].split(" (")[0][:48]
    return (row.get("model_path") or row.get("model") or "").split("=")[0].split("/")[-1][:48]


def left_out(rows: list[Row], group: Callable[[Row], str]) -> dict[str, dict[str, list[float]]]:
    """By set and group: errors of rows whose group was left out."""
    found: dict[str, dict[str, list[float]]] = {}
    for label, _, f in crossed(rows, group):
        found.setdefault(f.name, {}).setdefault(label, []).append(abs(f.predicted / f.measured - 1))
    return found


def main() -> None:
    """Print the table, and the groups of each set."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else validate.beside()
    rows = measured(folder)
    by = {"machine": left_out(rows, machine_of), "model, source": left_out(rows, subject_of)}
    print(f"{'':<22} {'held half':>33}  {'left out':>26}")
    print(f"{'set':<22} {'rows':>5} {'ours':>6} {'null':>6} {'peer':>6} {'80 %':>6}  {'machine':>12} {'model, source':>13}")
    for score in validate.validate(folder).scores:
        cells = [score.mape, score.null_mape, validate.PEERS.get(score.name, (None,))[0], score.coverage80]
        ends = []
        for sets in by.values():
            errors = [e for part in sets.get(score.name, {}).values() for e in part]
            ends.append(float(np.mean(errors)) if errors else None)
        shown = " ".join(f"{'-' if c is None else f'{c:.1%}':>6}" for c in cells)
        print(
            f"{score.name:<22} {score.covered:>5} {shown}  " + " ".join(f"{'-' if e is None else f'{e:.1%}':>13}" for e in ends)
        )
    for kind, sets in by.items():
        print(f"\nwithout the {kind}:")
        for name, groups in sorted(sets.items()):
            print(f"  {name:<22} " + ", ".join(f"{label} {np.mean(part):.1%} of {len(part)}" for label, part in groups.items()))


if __name__ == "__main__":
    main()
