"""The catalogue: one row for every published technique that narrows knows, built or not."""

import re
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files

from narrows.errors import NarrowsError, closest

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True, slots=True)
class Paper:
    """What one paper proposes, in the words of the catalogue.

    priority    core, wide or fringe
    route       how its claim is checked: apply, kernel, measure, outside, search, simulate or train
    bottleneck  the limit it widens; `headline` is the paper's own figure, empty where it has none
    mechanism   what it does; `works_when` is the check that would show it works
    """

    slug: str
    name: str
    priority: str
    route: str
    family: str
    kind: str
    bottleneck: str
    headline: str
    mechanism: str
    works_when: str
    title: str


@cache
def papers() -> tuple[Paper, ...]:
    """Every row of the catalogue, in its order. Raises NarrowsError naming a damaged line."""
    header, *lines = (files("narrows") / "data" / "papers.tsv").read_text(encoding="utf-8").splitlines()
    names = [f.name for f in fields(Paper)]
    if header.split("\t") != names:
        raise NarrowsError("the header names other columns.", where="papers.tsv", remedy="Install narrows again.")
    rows = [line.split("\t") for line in lines]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(names):
            problem = f"line {number} has {len(row)} columns, not {len(names)}."
            raise NarrowsError(problem, where="papers.tsv", remedy="Install narrows again.")
    return tuple(Paper(*row) for row in rows)


@cache
def _by_slug() -> dict[str, Paper]:
    return {p.slug: p for p in papers()}


def paper(slug: str) -> Paper:
    """The row of one slug. Raises NarrowsError with the nearest slugs for one that the catalogue lacks."""
    found = _by_slug().get(slug)
    if found is None:
        raise NarrowsError(f"{slug!r} is no technique.", where="catalogue", remedy=closest(slug, list(_by_slug())))
    return found


def module_name(slug: str) -> str:
    """The Python module of a slug or family: hyphens become underscores, a leading digit its word.

    `1-bit-adam` is `one_bit_adam`, `2bp` is `two_bp`. Raises NarrowsError for what is no slug.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug):
        raise NarrowsError(f"{slug!r} is no slug.", remedy="Slugs are lower-case words and digits joined by hyphens.")
    spelled = re.sub(r"^(\d)-?", lambda m: f"{_DIGITS[int(m[1])]}-", slug).rstrip("-")
    return spelled.replace("-", "_")
