"""How long a plan takes to apply to SmolLM2-135M, and its peak memory beside the model's bytes; exit 1 beyond a target.

    python bench/bench_apply.py [PLAN ...]

Each plan runs in a process of its own, on one thread. The peak is of what the process holds beyond what it held with torch
loaded and the model in it: its own bytes included. Loading and calibration text are not in the time.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

TARGETS = {"bf16 + int8": 5.0, "bf16 + awq:group=64": 60.0}  # CPU seconds: of rounding, and of a search on activations
PEAK = 1.5  # times the model's bytes


def applied(apply: Callable[[], Any], model_bytes: int) -> tuple[Any, float, float]:
    """(what `apply` gives, its CPU seconds, the most that the process held meanwhile over the model's bytes)."""
    held = _resident()
    start = time.process_time()
    changed = apply()
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held + model_bytes
    return changed, seconds, peak / model_bytes


def measure(text: str) -> dict[str, float | str]:
    """CPU seconds to apply a plan, and the peak and what is left in bytes over the model's."""
    import torch

    from narrows import samples
    from narrows.plan import Plan
    from narrows.verify import resident_bytes

    torch.set_num_threads(1)
    model, tokenizer = samples.smollm2()
    data = samples.token_batches(tokenizer, 8, 256)
    plan, size = Plan.parse(text), resident_bytes(model)
    changed, seconds, peak = applied(lambda: plan.apply(model, data), size)
    return {"plan": text, "seconds": seconds, "peak": peak, "size": resident_bytes(changed) / size}


def _resident() -> int:
    """Bytes this process holds now; its peak so far is forgotten."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main(plans: list[str]) -> int:
    print(f"{'plan':24}{'CPU seconds':>14}{'target':>9}{'peak / model':>15}{'target':>9}{'size':>8}")
    late = False
    for text in plans or list(TARGETS):
        done = subprocess.run([sys.executable, __file__, "--one", text], capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        most = TARGETS.get(text, float("inf"))
        late |= row["seconds"] > most or row["peak"] > PEAK
        print(f"{text:24}{row['seconds']:14.1f}{most:9.0f}{row['peak']:15.2f}{PEAK:9.1f}{row['size']:8.1%}")
    return int(late)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        sys.exit(main(sys.argv[1:]))
