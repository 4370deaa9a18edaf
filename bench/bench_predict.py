"""Full-model predictions per second on one core, through steps whose fields are arrays.

python bench/bench_predict.py
"""

import time

import numpy as np

from narrows.capture import capture
from narrows.diagnose import seconds
from narrows.machine import machine
from narrows.step import Step

POINTS = 20_000


def main() -> None:
    """Print predictions per second for decoding and prefill of three models, split over devices."""
    draw = np.random.default_rng(0)
    batch, context = draw.integers(1, 256, (POINTS, 1)), draw.integers(16, 32_000, (POINTS, 1))
    for name, devices in (("llama-3.1-8b", 1), ("llama-3.1-70b", 8), ("mixtral-8x7b", 2)):
        graph, here = capture(name), machine("h100-sxm")
        for step in (Step.decode(batch, context), Step.prefill(batch, context)):
            begun = time.process_time()
            found, low, high = seconds(graph, here, step, devices)
            spent = time.process_time() - begun
            assert np.all((low <= found) & (found <= high))
            print(f"{name:<16} {step.phase:<8} x{devices}  {POINTS / spent:>10,.0f} predictions/s with their 80 % intervals")


if __name__ == "__main__":
    main()
