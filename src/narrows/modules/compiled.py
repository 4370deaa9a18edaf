"""Building the C files beside the modules for this CPU, with whatever C compiler it has."""

import ctypes
import shutil
import subprocess
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

from narrows.errors import NarrowsError

_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC")


def library(name: str, where: str, *options: str) -> ctypes.CDLL:
    """The C file `modules/<name>.c` compiled and loaded, anew at each call.

    Raises NarrowsError, at `where`, without a compiler, or with what the compiler said.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NarrowsError("no C compiler is on the PATH.", where=where, remedy="Install gcc or clang (as `cc`).")
    with tempfile.TemporaryDirectory() as folder, as_file(files("narrows.modules").joinpath(f"{name}.c")) as source:
        built = Path(folder) / f"{name}.so"
        command = (compiler, *_FLAGS, *options, "-o", str(built), str(source), "-lm")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NarrowsError(
                f"{' '.join(command)} failed: {done.stderr.strip()[-400:]}",
                where=where,
                remedy="Put a C11 compiler that knows -march=native first on the PATH.",
            )
        return ctypes.CDLL(str(built))
