"""Softmax in two passes over memory with (mantissa, exponent) pairs, compiled for this CPU, beside the usual three passes."""

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from narrows.errors import NarrowsError

PASSES: dict[str, int] = {"two_pass": 3, "three_pass_recompute": 4, "three_pass_reload": 5}  # floats moved per element
LARGEST = 1e6  # logits beyond lose the bits that tell neighbours apart
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC")


@cache
def _built(counting: bool) -> ctypes.CDLL:
    """The C file as a library; its functions count what they load and store if `counting`."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NarrowsError("no C compiler is on the PATH.", where="two-pass softmax", remedy="Install gcc or clang (as `cc`).")
    define = ("-DCOUNT",) if counting else ()
    with tempfile.TemporaryDirectory() as folder, as_file(files("narrows.modules").joinpath("two_pass_softmax.c")) as source:
        library = Path(folder) / "softmax.so"
        command = (compiler, *_FLAGS, *define, "-o", str(library), str(source), "-lm")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NarrowsError(
                f"{' '.join(command)} failed: {done.stderr.strip()[-400:]}",
                where="two-pass softmax",
                remedy="Put a C11 compiler that knows -march=native first on the PATH.",
            )
        return ctypes.CDLL(str(library))


Floats = NDArray[np.float32]


def softmax(x: Floats, algorithm: str = "two_pass", out: Floats | None = None) -> Floats:
    """Softmax of fp32 numbers along the last axis, on one thread; into `out` where it is given (C-ordered, as x).

    `algorithm` is one of PASSES. Compiles on first use. -inf counts as masked; NaN and inf give NaN. Raises NarrowsError
    without a compiler, for another dtype or shape, an empty axis, and logits above 1e6.
    """
    return _run(x, algorithm, np.empty(x.shape, np.float32) if out is None else out, counting=False)[0]


def counted(x: Floats, algorithm: str = "two_pass") -> tuple[Floats, int]:
    """What `softmax` gives, and how many floats the same code loaded and stored for it."""
    return _run(x, algorithm, np.empty(x.shape, np.float32), counting=True)


def _run(x: Floats, algorithm: str, out: Floats, counting: bool) -> tuple[Floats, int]:
    if algorithm not in PASSES:
        raise NarrowsError(f"{algorithm!r} is not one.", where="softmax: algorithm", remedy=f"Use one of {', '.join(PASSES)}.")
    if x.dtype != np.float32 or not x.ndim or not x.size:
        raise NarrowsError(f"{x.dtype} of shape {x.shape}.", where="softmax: x", remedy="Give fp32 numbers, at least one.")
    if out.dtype != np.float32 or out.shape != x.shape or not out.flags.c_contiguous or np.may_share_memory(x, out):
        raise NarrowsError("it is not an array of its own like x.", where="softmax: out", remedy="Leave it out, or give one.")
    library, x = _built(counting), np.ascontiguousarray(x)
    function = getattr(library, f"softmax_{algorithm}")
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64), ctypes.c_float
    width = x.shape[-1]
    for start in range(0, x.nbytes, 4 * width):
        exponent = function(x.ctypes.data + start, out.ctypes.data + start, width)
        if LARGEST < exponent * np.log(2) < np.inf:
            raise NarrowsError(f"a logit is above {LARGEST:g}.", where="softmax: x", remedy="Scale or shift the logits.")
    if not counting:
        return out, 0
    library.numbers_moved.restype = ctypes.c_int64
    return out, int(library.numbers_moved())
