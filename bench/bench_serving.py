"""How fast serving is simulated and planned, beside the peers: python bench/bench_serving.py [DATA_DIR]

Our figures are CPU seconds and resident memory of whole processes, start-up included, on lengths like the Azure
conversation trace (or log-normal ones of the same mean where it is not there) on one H100 that keeps up. Then the plan:
how many deployments in how long, and how near the screening's saturation is to the simulated one.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from narrows.capture import capture
from narrows.machine import machine
from narrows.search.screen import EVERY, Job, Kind, screen
from narrows.search.serve import plan_serve
from narrows.simulate.asked import saturation
from narrows.simulate.workload import Lengths, generate, read

# CPU seconds for 10,000 requests on one replica; survey of November 2026, on two shared x86 cores with AMX.
PEERS = (
    ("vidur", "19-20 s, after 2,425 s of training its forests"),
    ("splitwise-sim", "13 s"),
    ("DistServe's simulator", "18 s"),
    ("inference-lab", "13 s (0.4 s for 1,000)"),
    ("Frontier", "279 s"),
)
PEER_PLAN = "AIConfigurator: 12-20 s for 110-276 points, means only"
MODEL, MACHINE, RATE, SIZES, SHOWN = "llama-3.1-8b", "h100-sxm", 12.0, (1_000, 10_000, 100_000, 1_000_000), 12


def lengths(data: Path) -> Lengths:
    """Lengths of a public trace, or of its moments where it is not there."""
    trace = data / "traces" / "azure2023_conv.csv"
    return Lengths.like(read(trace)) if trace.is_file() else Lengths(1155, 211, 0.96, 0.77)


def run(count: int, like: Lengths) -> tuple[float, float]:
    """CPU seconds and bytes of memory of a process that simulates so many requests."""
    words = ["simulate", "serve", MODEL, "-m", MACHINE, "--rate", str(RATE), "--requests", str(count), "--json",
             "--prompt", str(like.prompt), "--output", str(like.output), "--spread", str(like.prompt_spread)]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "narrows", *words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024.0


def main() -> None:
    """Print one line for each size of load, the peers, and the plan."""
    data = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "shared" / "data"
    like = lengths(data)
    print(f"{MODEL} on one {MACHINE}, {RATE:g} requests a second, {like.prompt:.0f} + {like.output:.0f} tokens in the mean")
    for count in SIZES:
        seconds, memory = run(count, like)
        print(f"  {count:>9,} requests {seconds:>7.2f} CPU s {seconds / count * 1e6:>7.1f} us each {memory / 1e6:>5.0f} MB")
    print("  10,000 requests, published:", "; ".join(f"{name} {said}" for name, said in PEERS))
    job = Job(capture(MODEL), (Kind(machine(MACHINE), 8),), tuple(generate(4 * RATE, 1000, like)), 1.0, 0.05)
    begun = time.process_time()
    found = plan_serve(job)
    print(f"plan: {found.evaluated:,} deployments in {time.process_time() - begun:.1f} CPU s; {PEER_PLAN}")
    points = screen(job, EVERY).points
    ratios = sorted(p.full / saturation(job.requests, *p.config.groups(job)) for p in points[:: len(points) // SHOWN])
    print("screened over simulated saturation:", " ".join(f"{ratio:.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
