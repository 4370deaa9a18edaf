"""Generated pages are those that the registry and the results give; technique files have their sections."""

import inspect
from pathlib import Path

import pytest

from narrows import docs
from narrows.technique import techniques

FOLDER = Path(__file__).parents[1] / "docs"


def test_generated_pages_are_up_to_date() -> None:
    stale = [name for name, text in docs.pages().items() if not (FOLDER / name).is_file() or (FOLDER / name).read_text() != text]
    assert not stale, "run `make docs`"
    made = {name.removeprefix("techniques/") for name in docs.pages()}
    assert not [p.name for p in (FOLDER / "techniques").glob("*.md") if p.name not in made]


@pytest.mark.parametrize("slug", techniques())
def test_a_technique_s_docstring_has_its_sections_in_order(slug: str) -> None:
    text = inspect.getmodule(techniques()[slug]).__doc__ or ""
    places = [text.find(f"\n## {section}\n") for section in docs.SECTIONS]
    assert -1 not in places, docs.SECTIONS
    assert places == sorted(places)
    assert text.splitlines()[0].endswith("."), "the first line is one sentence"
