"""CPU seconds to plan and to play pipelines, and what the plans reach.

python bench/bench_schedule.py
"""

import resource
import time
from collections.abc import Callable

from narrows.simulate.orders import interleaved, one_f_one_b
from narrows.simulate.pipeline import Order, Work
from narrows.simulate.planned import v_shaped, zero_bubble

REPLICAS = 640


def report(name: str, make: Callable[[], Order], work: Work) -> None:
    """Print CPU seconds of planning and of playing, bubble rate, peak in activations of a rank, and peak memory so far."""
    begun = time.process_time()
    order = make()
    planned = time.process_time()
    timeline = order.play(work)
    played = time.process_time()
    peak, memory = max(timeline.peak_bytes.values()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(
        f"{name:<44} plan {planned - begun:6.2f} s  play {played - planned:6.2f} s  {len(timeline.spans):>7,} passes  "
        f"bubble {timeline.bubble_rate:6.2%}  peak {peak:5.1f}  {memory:5.0f} MB"
    )


def main() -> None:
    """Plans and plays for one pipeline of many, and for a job of 10,240 ranks."""
    line, vee = Work.of(64, 256, 1.0, 1.0, 0.8, 0.02), Work.of(128, 256, 0.5, 0.5, 0.4, 0.02, 0.5)
    report("1F1B, 64 stages, 256 microbatches", lambda: one_f_one_b(64, 256), line)
    report("interleaved, 64 ranks x 2", lambda: interleaved(64, 256, 2), vee)
    report("zero bubble, memory of 1F1B", lambda: zero_bubble(line, 64), line)
    report("zero bubble, twice that", lambda: zero_bubble(line, 128), line)
    for shape in ("min", "half", "zero"):
        report(f"V-{shape}, 64 ranks", lambda shape=shape: v_shaped(vee, shape=shape), vee)  # type: ignore[misc]
    # replicas do the same at the same time: one is played, whatever their number
    small = Work.of(16, 128, 1.0, 1.0, 0.8, 0.02)
    report(f"16 stages x {REPLICAS} replicas = {16 * REPLICAS:,} ranks", lambda: zero_bubble(small, 16), small)


if __name__ == "__main__":
    main()
