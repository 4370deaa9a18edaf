"""Making a directory or a file appear all at once: filled beside its place, flushed to the disk, renamed.

Whoever looks, and whenever the writer is killed, finds the old one, none, or the whole new one. A kernel lock keeps
a second writer out and falls with its process, so what a killed run has left is known to be dead.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from narrows.errors import NarrowsError

_ELSEWHERE = "Choose another directory."


def home() -> Path:
    """Where narrows keeps what it measured and built here between runs (`NARROWS_HOME`, by default ~/.cache/narrows)."""
    return Path(os.environ.get("NARROWS_HOME", Path.home() / ".cache" / "narrows"))


class Explained:
    """A context that turns what the system and the libraries at work raise into one NarrowsError, which says where.

    expected: error types, besides OSError and ValueError, that mean bad input there.
    """

    def __init__(self, where: Path, remedy: str, *expected: type[Exception]) -> None:
        self.where, self.remedy = where, remedy
        self.expected: tuple[type[Exception], ...] = (OSError, ValueError, *expected)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None or issubclass(kind, NarrowsError):
            return
        # errors without a base of their own: tokenizers raises Exception itself, these packages derive from it
        foreign = kind is Exception or kind.__module__.split(".")[0] in ("safetensors", "huggingface_hub")
        if foreign or issubclass(kind, self.expected):
            said = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
            problem = f"{said}." if issubclass(kind, OSError) else f"{kind.__name__}: {said}."
            raise NarrowsError(problem, where=str(self.where), remedy=self.remedy) from error


@contextmanager
def replacing(out: str | Path, overwrite: bool, mark: str) -> Iterator[Path]:
    """A fresh directory to fill, which becomes `out` when the block ends; an error leaves everything as it was.

    `out` must be absent or empty, unless `overwrite`: then one that holds a file named `mark` goes when the new one is in
    place. Raises NarrowsError where it is taken or another run is writing it, or the disk is full or read-only.
    """
    with Explained(Path(out), "Free some space there, or choose another directory."):
        target = Path(os.path.realpath(out))
        if not target.name:
            raise NarrowsError("is no place for a directory.", where=str(out), remedy=_ELSEWHERE)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_writer(target):
            _recover(target)
            taken = check_place(target, overwrite, mark)
            staging = _beside(target, "")
            try:
                staging.mkdir()
                yield staging
                for path in (*staging.rglob("*"), staging):
                    _flush(path)
                _swap(staging, target, taken)
            finally:
                shutil.rmtree(staging, ignore_errors=True)  # gone after a rename; otherwise the error that led here counts


@contextmanager
def replacing_file(out: str | Path, overwrite: bool) -> Iterator[Path]:
    """A path to write a file to, which becomes `out` when the block ends; an error leaves everything as it was."""
    with Explained(Path(out), "Free some space there, or choose another file."):
        target = Path(os.path.realpath(out))
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_writer(target):
            _recover(target)
            check_place(target, overwrite, "")
            staging = _beside(target, "")
            try:
                yield staging
                _flush(staging)
                os.replace(staging, target)
                _flush(target.parent)
            finally:
                staging.unlink(missing_ok=True)


def check_place(target: Path, overwrite: bool, mark: str) -> bool:
    """Whether something is there that would be replaced: a directory that holds `mark`, or a file where that is ''.

    Raises NarrowsError where it may not be.
    """
    taken = target.exists() and (not target.is_dir() or not mark or any(target.iterdir()))
    if taken and not overwrite:
        raise NarrowsError("is there already.", where=str(target), remedy="Choose another place, or overwrite it.")
    if taken and not (target / mark if mark else target).is_file():
        problem = f"has no {mark}, and is not overwritten." if mark else "is a directory."
        raise NarrowsError(problem, where=str(target), remedy="Choose another place.")
    return taken


def _beside(target: Path, role: str) -> Path:
    """A hidden name of this process in the target's folder, so that a rename moves no data."""
    return target.parent / f".{target.name}.narrows-{role}{os.getpid()}"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(staging: Path, target: Path, taken: bool) -> None:
    aside = _beside(target, "old-")
    if taken:
        os.rename(target, aside)
    try:
        os.rename(staging, target)
    except OSError:
        if taken:
            os.rename(aside, target)
        raise
    _flush(target.parent)
    if taken:
        os.rename(aside, staging)  # by this name it is rubbish, and not a model that `_recover` brings back


def _recover(target: Path) -> None:
    """Undo what killed runs left; called under the lock, so that no such directory has a living owner."""
    leftover = re.compile(rf"\.{re.escape(target.name)}\.narrows-(old-)?\d+")
    for path in list(target.parent.iterdir()):
        match = leftover.fullmatch(path.name)
        if match and match[1] and not target.exists():
            os.rename(path, target)  # killed between the two renames: the old one is whole
        elif match:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _only_writer(target: Path) -> Iterator[None]:
    """Hold the lock file beside a target, or raise NarrowsError; the kernel lets go of it when its process ends."""
    import fcntl  # not everywhere; reading directories does without

    path = target.parent / f".{target.name}.narrows-lock"
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        except BlockingIOError as error:
            os.close(descriptor)
            raise NarrowsError("another run is writing it.", where=str(target), remedy=f"Wait for it. {_ELSEWHERE}") from error
        os.close(descriptor)  # its holder removed it after we had opened it
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
