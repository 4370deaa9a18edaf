"""Building the C files beside the modules for this CPU, with whatever C compiler it has, and running them on its threads."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

from narrows.errors import NarrowsError
from narrows.staging import home

_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC")


def compiler() -> str | None:
    """The C compiler on the PATH."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def library(name: str, where: str, *options: str) -> ctypes.CDLL:
    """The C file `modules/<name>.c` compiled and loaded, a copy of its own at each call.

    What was built is kept in narrows' home, where that can be written, by what it was made of and for. Raises NarrowsError,
    at `where`, without a compiler, or with what the compiler said.
    """
    program = compiler()
    if program is None:
        raise NarrowsError("no C compiler is on the PATH.", where=where, remedy="Install gcc or clang (as `cc`).")
    with tempfile.TemporaryDirectory() as folder, as_file(files("narrows.modules").joinpath(f"{name}.c")) as source:
        built, command = Path(folder) / f"{name}.so", (program, *_FLAGS, *options)
        machine = _said((program, "-march=native", "-dM", "-E", "-x", "c", os.devnull), where)  # its macros
        made_of = "\0".join((*command, machine, source.read_text()))
        kept = home() / "built" / f"{name}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
        if kept.is_file():
            shutil.copyfile(kept, built)
        else:
            _said((*command, "-o", str(built), str(source), "-lm"), where)
            _keep(built, kept)
        return ctypes.CDLL(str(built))


def _said(command: Sequence[str], where: str) -> str:
    """What a call of the compiler printed; raises NarrowsError with what it said where it failed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NarrowsError(
            f"{' '.join(command)} failed: {done.stderr.strip()[-400:]}",
            where=where,
            remedy="Put a C11 compiler that knows -march=native first on the PATH.",
        )
    return done.stdout


def _keep(built: Path, kept: Path) -> None:
    """Copy a file to where later runs find it, whole or not at all; where that cannot be written they build it again."""
    part = kept.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, part)
        part.replace(kept)


def in_parts(first: int, last: int, least: int, threads: int, run: Callable[[int, int], None]) -> None:
    """Call run(begin, end) for parts of first..last that are whole multiples of `least`, on up to so many threads."""
    units = -(-(last - first) // least)
    parts = max(1, min(threads, units))
    if parts == 1:
        run(first, last)
        return
    ends = [min(last, first + units * i // parts * least) for i in range(parts + 1)]
    for _ in _pool(parts).map(run, ends[:-1], ends[1:]):  # the kernels run without the interpreter's lock
        pass


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork has none of its parent's threads
