"""Is it true? Every measured row that is there, beside what the model says about it: error, interval, rank and regret.

Rows that the constants were fitted on are known by their fingerprints and not judged. A row that cannot be judged is
counted with its reason; a row that is wrong is named with its column, and the others are judged all the same.
"""

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from narrows.costmodel import fitted
from narrows.errors import NarrowsError, closest
from narrows.figures import write
from narrows.measured import kernels, recorded, serving, training
from narrows.measured.table import Forecast, NotCovered, Row, fingerprint, read
from narrows.progress import Tell, silent

ROOT = Path(__file__).parents[2]

# The best published predictor on (nearly) the same rows: mean absolute percentage error, and whose it is. PEERS of the
# survey of 2026-11; each ran with its own stock description of the hardware.
PEERS: dict[str, tuple[float, str]] = {
    "training-sc21": (0.097, "mlsysim; calculon 10.3 %"),
    "training-multi-node": (0.153, "calculon; vTrain claims 14.7 % with a GPU trace"),
    "training-single-node": (0.39, "calculon; vTrain claims 8.4 % with a GPU trace"),
    "training-tuning-log": (0.344, "calculon"),
    "serving-tpot": (0.227, "AIConfigurator, on the 52 % of rows that it covers"),
    "serving-ttft": (0.57, "AIConfigurator, on the 52 % of rows that it covers"),
    "splitwise-prompt": (0.67, "GenZ"),
    "splitwise-token": (0.61, "GenZ"),
    "recorded-vllm-tpot": (0.017, "LLMServingSim, with profiles of the same device"),
    "recorded-vllm-ttft": (0.136, "LLMServingSim, with profiles of the same device"),
}
TARGETS: dict[str, float] = {
    "training-sc21": 0.06,
    "training-multi-node": 0.12,
    "training-single-node": 0.20,
    "training-tuning-log": 0.15,
    "training-llm-foundry": 0.10,
    "training-memory": 0.10,
    "serving-tpot": 0.20,
    "serving-ttft": 0.40,
    "splitwise-prompt": 0.12,
    "splitwise-token": 0.12,
    "gemm": 0.15,
    "attention": 0.15,
    "pointwise": 0.15,
    "collectives": 0.15,
    "decode": 0.15,
    "recorded-vllm-tpot": 0.05,
    "recorded-vllm-ttft": 0.10,
    "recorded-vllm-tpot-own-blocks": 0.05,
    "recorded-vllm-ttft-own-blocks": 0.20,
}


@dataclass(frozen=True)
class Table:
    """A kind of CSV file: its columns, those that may be missing, the forecast of a row, and the sets that it is counted in."""

    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    forecast: Callable[[Row], list[Forecast]]
    sets: Callable[[Row], tuple[str, ...]]

    @property
    def required(self) -> set[str]:
        return set(self.columns) - set(self.optional)


TABLES = (
    Table("training", training.COLUMNS, training.OPTIONAL, training.forecast, training.sets),
    Table(
        "closed loop",
        serving.CLOSED_LOOP,
        serving.OPTIONAL,
        serving.closed,
        lambda row: ("serving-ttft", "serving-tpot"),
    ),
    Table("one batch", serving.ONE_BATCH, (), serving.batch, lambda row: ("splitwise-prompt", "splitwise-token")),
    Table("kernels", kernels.COLUMNS, kernels.OPTIONAL, kernels.forecast, kernels.sets),
)


@dataclass(frozen=True)
class Score:
    """How well one set is predicted: errors are |predicted / measured - 1|, over the rows that are covered.

    rows         judged, with those that are not covered (their reasons count them); `fitted` were not judged
    null_mape    of one constant for the set times what the datasheet's peaks allow
    coverage80   share of the rows inside their 80 % interval;  inside   share inside the validated domain
    regret       how much worse, in the mean over jobs, the predicted best configuration is than the measured best
    worst        the row with the largest error
    """

    name: str
    rows: int
    covered: int
    mape: float | None
    median: float | None
    worst: dict[str, Any] | None
    null_mape: float | None
    coverage80: float | None
    spearman: float | None
    regret: float | None
    fitted: int = 0
    inside: float | None = None
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def target(self) -> float | None:
        return TARGETS.get(self.name)


@dataclass(frozen=True)
class Report:
    """The scores of all sets, and the rows that are wrong: each names its file, row and column."""

    scores: tuple[Score, ...]
    errors: tuple[str, ...]
    ignored: tuple[str, ...]


@dataclass
class _Set:
    rows: int = 0
    fitted: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    found: list[tuple[str, Forecast]] = field(default_factory=list)


@cache
def _fitted_rows() -> frozenset[str]:
    return frozenset(files("narrows.data").joinpath("fitted_rows.txt").read_text("utf-8").split())


def table_of(columns: Iterable[str]) -> Table | None:
    """Which kind of table has most of these columns; None if none has more than half of those it needs among them."""
    there = set(columns)
    share = {t.name: len(there & t.required) / len(t.required) + len(there & set(t.columns)) / 1000 for t in TABLES}
    best = max(TABLES, key=lambda table: share[table.name])
    return best if share[best.name] > 0.5 else None


def forecasts(row: Row) -> list[Forecast]:
    """The forecasts of a row of any table; none for one that is wrong or not covered."""
    table = table_of(row)
    try:
        return table.forecast(row) if table else []
    except NarrowsError:
        return []


def interval(forecast: Forecast) -> tuple[float, float]:
    """The 80 % interval of a forecast, by the residuals of its key among rows that a fit had not seen (`bench/fit_groups.py`).

    Outside of the validated domain it comes from predictions without the constants of the generation, or engine, at hand.
    """
    table, name = ("residuals", forecast.key) if forecast.inside else ("elsewhere", forecast.key.split("-")[0])
    entry = fitted()[table].get(name, {"low": 0.5, "high": 2.0})
    return forecast.predicted * min(entry["low"], 1.0), forecast.predicted * max(entry["high"], 1.0)


def validate(data: Path, only: str = "", tell: Tell = silent) -> Report:
    """Judge every row of the CSV files in a folder (or of one file); `only` keeps the sets whose name starts with it.

    Raises NarrowsError where there is no such file or set. Rows that are wrong are in the report.
    """
    runs = recorded.runs(data)
    places = sorted(data.glob("*.csv")) if data.is_dir() else [p for p in (data,) if p not in runs]
    if not (places or runs) or not all(p.is_file() for p in places):
        raise NarrowsError(
            "there is no CSV file.", where=str(data), remedy="Give a folder of measurements, or one file, with --data."
        )
    sets: dict[str, _Set] = {}
    errors: list[str] = []
    ignored: list[str] = []
    for at, path in enumerate(places):
        tell(path.name, at, len(places))
        try:
            rows = read(path)
        except NarrowsError as error:
            errors.append(str(error))
            continue
        table = table_of(rows[0]) if rows else None
        if table is None:
            ignored.append(
                f"{path.name}: not a table of {', '.join(t.name for t in TABLES)}." if rows else f"{path.name}: it has no rows."
            )
            continue
        missing = [c for c in table.columns if c in table.required and c not in rows[0]]
        if missing:
            lost = f"Add the columns; none of its {len(rows)} rows is judged."
            errors.append(f"{path.name}: row 1: {', '.join(missing)}: missing from a table of {table.name}. {lost}")
        for number, row in enumerate(rows, 2):
            whole = dict.fromkeys((*table.columns, *table.optional), "") | dict(row)
            _judge(table, whole, f"{path.name}: row {number}", bool(missing), sets, errors)
    for path in runs:
        _judge_run(path, sets, errors)
    names = [name for name in sorted(sets) if name.startswith(only)]
    if only and not names:
        raise NarrowsError(f"there are no rows of a set {only!r}.", where="--set", remedy=closest(only, sorted(sets)))
    return Report(tuple(_score(name, sets[name]) for name in names), tuple(errors), tuple(ignored))


def _judge(table: Table, row: Row, where: str, broken: bool, sets: dict[str, _Set], errors: list[str]) -> None:
    try:
        named = table.sets(row)
    except (KeyError, TypeError, AttributeError):  # a column that names the set is missing: said once, for the file
        named = (table.name.replace(" ", "-"),)
    ours = [sets.setdefault(name, _Set()) for name in named]
    if fingerprint(row) in _fitted_rows():
        for one in ours:
            one.fitted += 1
        return
    for one in ours:
        one.rows += 1
    try:
        if broken:
            raise NotCovered("a column is missing.", where="header")
        short = next((column for column, cell in row.items() if cell is None), "")
        if short or None in row:
            problem = f"it has {'fewer' if short else 'more'} cells than the header."
            raise NarrowsError(problem, where=short or "row", remedy="Check its commas and quotes.")
        for forecast in table.forecast(row):
            sets.setdefault(forecast.name, _Set()).found.append((where, forecast))
    except NarrowsError as error:
        if not isinstance(error, NotCovered):
            errors.append(str(error.inside(where)))
        for one in ours:
            reason = f"{error.where}: {error.problem}"
            one.reasons[reason] = one.reasons.get(reason, 0) + 1


def _judge_run(path: Path, sets: dict[str, _Set], errors: list[str]) -> None:
    try:
        for where, forecast in recorded.forecasts(path):
            one = sets.setdefault(forecast.name, _Set())
            one.rows += 1
            one.found.append((where, forecast))
    except NarrowsError as error:
        if not isinstance(error, NotCovered):
            errors.append(str(error.inside(path.name)))
        for name in recorded.SETS:
            one = sets.setdefault(name, _Set())
            one.rows += 1
            reason = f"{error.where}: {error.problem}"
            one.reasons[reason] = one.reasons.get(reason, 0) + 1


def _score(name: str, one: _Set) -> Score:
    if not one.found:
        return Score(name, one.rows, 0, None, None, None, None, None, None, None, one.fitted, None, one.reasons)
    measured, predicted, bound = (np.array([getattr(f, k) for _, f in one.found]) for k in ("measured", "predicted", "bound"))
    error = np.abs(predicted / measured - 1)
    null = fitted().get("null", {}).get(name, {}).get("median") or float(np.median(measured / bound))
    ends = np.array([interval(f) for _, f in one.found])
    worst = int(np.argmax(error))
    return Score(
        name,
        one.rows,
        len(one.found),
        float(error.mean()),
        float(np.median(error)),
        {
            "row": one.found[worst][0],
            "measured": float(measured[worst]),
            "predicted": float(predicted[worst]),
            "error": float(error[worst]),
        },
        float(np.mean(np.abs(null * bound / measured - 1))),
        float(np.mean((ends[:, 0] <= measured) & (measured <= ends[:, 1]))),
        _spearman(measured, predicted),
        _regret([f for _, f in one.found]),
        one.fitted,
        float(np.mean([f.inside for _, f in one.found])),
        one.reasons,
    )


def _ranks(values: Any) -> Any:
    """Ranks from 0; equal values share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place]


def _spearman(a: Any, b: Any) -> float | None:
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / scale if scale else None


def _regret(found: list[Forecast]) -> float | None:
    """In the mean over jobs with rivals: the measured loss of choosing by prediction, against the best that was measured."""
    groups: dict[str, list[Forecast]] = {}
    for f in found:
        if f.group:
            groups.setdefault(f"{f.group} {f.best}", []).append(f)
    losses = []
    for rivals in groups.values():
        if len({f.predicted for f in rivals}) < 2:
            continue
        sign = 1 if rivals[0].best == "min" else -1
        chosen = min(rivals, key=lambda f: sign * f.predicted).measured
        best = min(rivals, key=lambda f: sign * f.measured).measured
        losses.append(chosen / best - 1 if sign > 0 else best / chosen - 1)
    return float(np.mean(losses)) if losses else None


def as_json(report: Report) -> list[dict[str, Any]]:
    """The scores as plain data: the stable contract of `narrows validate --json`."""
    return [
        {
            "name": s.name,
            "rows": s.rows,
            "covered": s.covered,
            "mape": s.mape,
            "median": s.median,
            "worst": s.worst,
            "null_mape": s.null_mape,
            "coverage80": s.coverage80,
            "spearman": s.spearman,
            "regret": s.regret,
            "fitted": s.fitted,
            "inside": s.inside,
            "target": s.target,
            "peer": PEERS.get(s.name, (None, ""))[0],
            "reasons": s.reasons,
        }
        for s in report.scores
    ]


_HEADER = (
    "set",
    "rows",
    "covered",
    "error",
    "median",
    "worst",
    "null",
    "peer",
    "target",
    "in 80 %",
    "inside",
    "Spearman",
    "regret",
)


def lines(report: Report) -> list[list[str]]:
    """The scores as cells for people, header first; a dash where there is no figure."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    rows = [
        [
            s.name,
            str(s.rows),
            str(s.covered),
            percent(s.mape),
            percent(s.median),
            percent(s.worst["error"]) if s.worst else "-",
            percent(s.null_mape),
            percent(PEERS[s.name][0]) if s.name in PEERS else "-",
            percent(s.target),
            percent(s.coverage80),
            percent(s.inside),
            "-" if s.spearman is None else f"{s.spearman:.3f}",
            percent(s.regret),
        ]
        for s in report.scores
    ]
    return [list(_HEADER), *rows]


def table(report: Report) -> list[str]:
    """The scores as lines of aligned text."""
    cells = lines(report)
    wide = [max(len(row[i]) for row in cells) for i in range(len(_HEADER))]
    return [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, wide, strict=True))).rstrip()
        for row in cells
    ]


def uncovered(report: Report) -> list[str]:
    """One line for each reason that rows are not covered for, and for each file that holds no such table."""
    found = [f"{s.name}: {count} not covered: {reason}" for s in report.scores for reason, count in s.reasons.items()]
    return [*found, *(f"not judged: {line}" for line in report.ignored)]


def beside() -> Path:
    """The folder of measurements beside the repository; raises NarrowsError where there is none."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        raise NarrowsError(
            "no measurements are at hand.",
            where="--data",
            remedy="Give a folder of CSV files in the four schemas of docs/accuracy.md.",
        )
    return folder


def record(report: Report) -> None:
    """Keep the scores in `results/accuracy.csv`."""
    (ROOT / "results").mkdir(exist_ok=True)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines(report))
    write(str(ROOT / "results" / "accuracy.csv"), text.getvalue())
