"""Measuring what papers claim: running a technique's experiments, keeping the evidence, deriving its status from it.

A claim's experiment is the function of the claim's name in `experiments/<module>.py`: it takes the technique and
gives our figure. Given the technique's `baseline()` it must give a figure that fails the claim.
"""

import csv
import importlib
import io
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from narrows.errors import NarrowsError
from narrows.figures import write
from narrows.papers import module_name, papers
from narrows.technique import Claim, Described, Technique, built, face, technique


@dataclass(frozen=True, slots=True)
class Evidence:
    """One claim measured once, in `unit`. `paper` None: it states a direction and no figure; `baseline` None: not run."""

    slug: str
    claim: str
    paper: float | None
    ours: float
    baseline: float | None
    unit: str
    how: str
    tolerance: str
    passed: bool
    seconds: float
    machine: str
    versions: str


def reproduce(slug: str, with_baseline: bool = False) -> list[Evidence]:
    """Run every claim of a built technique; raises NarrowsError for one that is only described."""
    found = technique(slug)
    if isinstance(found, Described):
        raise NarrowsError(f"{slug} is described but not built.", where="reproduce", remedy=f"Built are {', '.join(built())}.")
    ours = found()
    return [_measure(ours, claim, with_baseline) for claim in found.card.claims]


def _measure(ours: Technique, claim: Claim, with_baseline: bool) -> Evidence:
    slug = ours.card.slug
    try:
        module = importlib.import_module(f"narrows.experiments.{module_name(slug)}")
    except ModuleNotFoundError as error:
        raise NarrowsError(f"it needs {error.name}.", where=f"reproduce: {slug}", remedy="pip install 'narrows[hf]'.") from error
    experiment = getattr(module, claim.name, None)
    if experiment is None:
        raise NarrowsError(
            f"no function {claim.name!r}.", where=module.__name__, remedy="An experiment has the name of its claim."
        )
    start = time.perf_counter()
    figure = float(experiment(ours))
    seconds = time.perf_counter() - start
    other = float(experiment(ours.baseline())) if with_baseline else None
    return Evidence(slug, claim.name, claim.paper, figure, other, claim.unit, claim.how, claim.tolerance, claim.holds(figure),
                    seconds, platform.machine() + ", " + str(os.cpu_count()) + " cores", versions())  # fmt: skip


def versions() -> str:
    """The versions that a measured figure depends on, as one string."""
    from importlib.metadata import PackageNotFoundError, version

    found = [f"python {platform.python_version()}"]
    for name in ("narrows", "torch", "transformers", "numpy"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def results_file() -> Path:
    """`results/claims.csv` of a clone, or the copy that an installed package carries."""
    clone = Path(__file__).parents[2] / "results" / "claims.csv"
    return clone if clone.parent.is_dir() else Path(__file__).parent / "data" / "claims.csv"


def record(evidence: Iterable[Evidence]) -> None:
    """Put evidence into the results file, one row a claim, replacing what was known of it; atomic."""
    rows = {(e.slug, e.claim): e for e in kept()}
    rows.update({(e.slug, e.claim): e for e in evidence})
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [f.name for f in fields(Evidence)], lineterminator="\n")
    writer.writeheader()
    for key in sorted(rows):
        row = asdict(rows[key])
        writer.writerow({k: "" if v is None else f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    write(results_file(), text.getvalue())
    kept.cache_clear()


@cache
def kept() -> tuple[Evidence, ...]:
    """The evidence in the results file."""
    path = results_file()
    if not path.is_file():
        return ()
    kinds: dict[str, Any] = {f.name: f.type for f in fields(Evidence)}
    read: dict[Any, Callable[[str], Any]] = {
        float: float,
        bool: lambda text: text == "True",
        str: str,
        float | None: lambda text: float(text) if text else None,
    }
    with path.open(newline="") as file:
        return tuple(Evidence(**{k: read[kinds[k]](v) for k, v in row.items()}) for row in csv.DictReader(file))


def passing(slug: str) -> int:
    """How many of a technique's present claims the kept evidence passes (a changed tolerance voids old evidence)."""
    found = technique(slug)
    if isinstance(found, Described):
        return 0
    known = {(e.slug, e.claim): e for e in kept()}
    rows = [(claim, known.get((slug, claim.name))) for claim in found.card.claims]
    return sum(row is not None and row.passed and row.tolerance == claim.tolerance for claim, row in rows)


def status(slug: str) -> str:
    """described (a card only), built (it has a face) or works (evidence for every claim); derived, never typed in."""
    if slug not in built():
        return "described"
    found = technique(slug)
    claims = () if isinstance(found, Described) else found.card.claims
    return "works" if claims and passing(slug) == len(claims) else "built"


def table() -> list[dict[str, object]]:
    """Every row of the catalogue with its derived status: the contract of `narrows papers --json`."""
    rows = []
    for p in papers():
        found = technique(p.slug)
        count = 0 if isinstance(found, Described) else len(found.card.claims)
        rows.append({"slug": p.slug, "name": p.name, "family": p.family, "priority": p.priority, "route": p.route,
                "face": face(found),
                     "status": status(p.slug), "claims": count, "passing": passing(p.slug)})  # fmt: skip
    return rows
