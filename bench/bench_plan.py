"""How fast training layouts are searched, and how their predictions hold: python bench/bench_plan.py [DATA_DIR]

Layouts a second of CPU time on one core, everything included (reading the graph is not), with nothing kept from before:
with pruning, and every one of the space. Each search runs three times; the fastest counts.
"""

import sys
import time
from pathlib import Path

from narrows.capture import capture
from narrows.search import priced, train
from narrows.search.priced import Job
from narrows.search.train import Space, TrainPlan, plan_train
from narrows.simulate import network, training
from narrows.site import site
from narrows.validate import table, validate

PEER = "calculon (Isaev et al., SC 2023): 63 layouts a second; its own search, 8,112 of the 530B model on 5,128 GPUs, 46 to 140 s"
JOBS = (
    ("llama-3.1-70b", "dgx-h100", 64, 512, 8192),
    ("megatron-1t", "selene", 3072, 3072, 2048),
    ("megatron-530b", "selene", 5120, 2560, 2048),
    ("megatron-530b", "selene", 5128, 2564, 2048),
    ("deepseek-v3", "dgx-h100", 512, 4096, 4096),
    ("mixtral-8x7b", "dgx-h100", 64, 512, 4096),
    ("llama-3.1-8b", "a100-v100", 64, 64, 4096),
    ("llama-3.1-8b", "two-a100-pods", 64, 64, 4096),
    ("gpt2", "dgx-a100", 8, 64, 1024),
)


def timed(job: Job, space: Space, prune: bool = True) -> tuple[float, TrainPlan]:
    """CPU seconds of a search with nothing kept from before, and what it found."""
    best = float("inf")
    for _ in range(3):
        for module in (network, training, priced, train):
            for kept in vars(module).values():
                if hasattr(kept, "cache_clear"):
                    kept.cache_clear()
        begun = time.process_time()
        found = plan_train(job, space, prune=prune)
        best = min(best, time.process_time() - begun)
    return best, found


def main() -> None:
    """Print one line for each job, then the error of the training sets."""
    print(f"{'job':<44} {'pruned':>7} {'CPU s':>6} {'all':>8} {'CPU s':>6} {'a second':>9}   fastest")
    for model, name, devices, batch, sequence in JOBS:
        job = Job(capture(model), site(name), devices, batch, sequence)
        seconds, found = timed(job, Space())
        whole, every = timed(job, Space(), prune=False)
        same = [c.seconds for c in found.best] == [c.seconds for c in every.best]
        fastest = f"{found.best[0].seconds:.2f} s {found.best[0].layout}" if found.best else "none fits"
        title, rate = f"{model}, {devices} of {name}, {batch} x {sequence}", every.evaluated / whole
        print(f"{title:<44} {found.evaluated:>7} {seconds:>6.2f} {every.evaluated:>8} {whole:>6.2f} {rate:>9.0f}   {fastest}")
        if not same:
            print("  pruning lost a layout")
    print(PEER)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "shared" / "data"
    if folder.is_dir():
        print("\n".join(table(validate(folder, "training"))))


if __name__ == "__main__":
    main()
