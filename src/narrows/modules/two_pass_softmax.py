"""Softmax in two passes over memory with (mantissa, exponent) pairs, compiled for this CPU, beside the usual three passes."""

import ctypes
from functools import cache

import numpy as np
from numpy.typing import NDArray

from narrows.errors import NarrowsError
from narrows.modules.compiled import library

PASSES: dict[str, int] = {"two_pass": 3, "three_pass_recompute": 4, "three_pass_reload": 5}  # floats moved per element
LARGEST = 1e6  # logits beyond lose the bits that tell neighbours apart


@cache
def _built(counting: bool) -> ctypes.CDLL:
    """The C file as a library; its functions count what they load and store if `counting`."""
    return library("two_pass_softmax", "two-pass softmax", *(("-DCOUNT",) if counting else ()))


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
    code, x = _built(counting), np.ascontiguousarray(x)
    function = getattr(code, f"softmax_{algorithm}")
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64), ctypes.c_float
    width = x.shape[-1]
    for start in range(0, x.nbytes, 4 * width):
        exponent = function(x.ctypes.data + start, out.ctypes.data + start, width)
        if LARGEST < exponent * np.log(2) < np.inf:
            raise NarrowsError(f"a logit is above {LARGEST:g}.", where="softmax: x", remedy="Scale or shift the logits.")
    if not counting:
        return out, 0
    code.numbers_moved.restype = ctypes.c_int64
    return out, int(code.numbers_moved())
