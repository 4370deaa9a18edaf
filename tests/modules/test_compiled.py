"""C files are built once for a compiler and a CPU, kept whole or not at all, and run on parts that cover what was asked."""

from pathlib import Path

import pytest

from narrows.errors import NarrowsError
from narrows.modules import compiled

needs_compiler = pytest.mark.skipif(compiled.compiler() is None, reason="no C compiler")


@needs_compiler
def test_what_was_built_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARROWS_HOME", str(tmp_path))
    calls, said = [], compiled._said
    monkeypatch.setattr(compiled, "_said", lambda command, where: calls.append(command) or said(command, where))
    for _ in range(2):
        assert compiled.library("two_pass_softmax", "here").softmax_two_pass
    assert [("-E" in call) for call in calls] == [True, False, True], "the second time the compiler is only asked what it is"
    assert compiled.library("two_pass_softmax", "here", "-DCOUNT").numbers_moved, "other options, another file"
    assert len(list((tmp_path / "built").iterdir())) == 2


@needs_compiler
def test_a_home_that_cannot_be_written_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NARROWS_HOME", str(tmp_path / "file"))
    assert compiled.library("two_pass_softmax", "here").softmax_two_pass


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NarrowsError, match="no C compiler") as error:
        compiled.library("two_pass_softmax", "here")
    assert "gcc" in error.value.remedy


@pytest.mark.parametrize("first, last, least, threads", [(0, 10, 1, 3), (5, 9, 3, 8), (0, 1, 64, 4), (0, 7, 100, 2)])
def test_parts_cover_everything_once(first: int, last: int, least: int, threads: int) -> None:
    seen: list[tuple[int, int]] = []
    compiled.in_parts(first, last, least, threads, lambda begin, end: seen.append((begin, end)))
    assert sorted(i for begin, end in seen for i in range(begin, end)) == list(range(first, last))
    assert 1 <= len(seen) <= threads and all((begin - first) % least == 0 for begin, _ in seen)
