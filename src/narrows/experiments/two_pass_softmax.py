"""What two-pass softmax claims: loads and stores counted by the compiled code, and its time beside three passes on this CPU."""

import math
from functools import cache
from time import thread_time

import numpy as np

from narrows.modules.two_pass_softmax import PASSES, counted, softmax
from narrows.techniques.attention.two_pass_softmax import TwoPassSoftmax

_LOGITS = 2**26  # 256 MiB: beyond what a core has of any cache
_ROUNDS = 5


def traffic(technique: TwoPassSoftmax) -> float:
    """Floats loaded and stored per logit; NaN if a result is further than 1e-6 from torch.softmax."""
    import torch

    normal = np.random.default_rng(0).standard_normal(50_003, dtype=np.float32)
    moved = []
    for logits in (3 * normal, 1e4 + normal, -1e4 + normal, np.linspace(-1e4, 1e4, 50_003, dtype=np.float32)):
        found, count = counted(logits, technique.algorithm)
        error = np.abs(found - torch.softmax(torch.from_numpy(logits).double(), -1).numpy()).max()
        moved.append(count / logits.size if error <= 1e-6 else math.nan)
    return float(np.max(moved))


def speedup(technique: TwoPassSoftmax) -> float:
    """Processor seconds in three passes that compute the exponentials twice, over the technique's."""
    return _seconds()["three_pass_recompute"] / _seconds()[technique.algorithm]


def speedup_over_reload(technique: TwoPassSoftmax) -> float:
    """Processor seconds in three passes that keep the exponentials, over the technique's."""
    return _seconds()["three_pass_reload"] / _seconds()[technique.algorithm]


@cache
def _seconds() -> dict[str, float]:
    """The quickest run of each algorithm, turn by turn."""
    logits = np.random.default_rng(0).standard_normal(_LOGITS, dtype=np.float32)
    out = np.zeros_like(logits)  # touched: a fresh array would be paged in by whoever writes it first
    took: dict[str, list[float]] = {name: [] for name in PASSES}
    for _ in range(_ROUNDS):
        for name, times in took.items():
            start = thread_time()
            softmax(logits, name, out)
            times.append(thread_time() - start)
    return {name: min(times) for name, times in took.items()}
