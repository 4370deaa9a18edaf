"""One thread for an experiment: sums in the same order on every machine, and no waiting on a busy one."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread inside; also a decorator, `@one_thread()`."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def time_ratio(first: Callable[[], object], second: Callable[[], object]) -> float:
    """Thread seconds of one over those of the other: the median of fifteen interleaved pairs after a warm-up."""
    ratios = []
    for _ in range(16):
        start = time.thread_time()
        first()
        middle = time.thread_time()
        second()
        ratios.append((middle - start) / (time.thread_time() - middle))
    return median(ratios[1:])
