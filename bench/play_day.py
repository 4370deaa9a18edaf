"""Play a day like the Azure conversations on the README's two deployments, and keep what clients see: results/day.csv.

The trace lasts an hour: its rate, bursts and lengths are taken for all day, and that the rate swings by half is an assumption.
"""

import csv
import io
import time
from dataclasses import replace
from pathlib import Path

from narrows.capture import capture
from narrows.figures import write
from narrows.machine import machine
from narrows.simulate.fleet import Group, rules, serve
from narrows.simulate.workload import DAY, like, mean_rate, swung

RESULTS = Path(__file__).parents[1] / "results" / "day.csv"
LOAD, SWING = "azure-2023-conv", 0.5
COMMAND = "narrows simulate serve llama-3.1-70b --machine h100-sxm --devices 4 {} --load azure-2023-conv --hours 24 --swing 0.5"


def main() -> None:
    """Write one row for each deployment."""
    group = Group(capture("llama-3.1-70b"), machine("h100-sxm"), rules("vllm-v1"), devices=4)
    ways = {
        "2 replicas that do both": (replace(group, replicas=2), None, "--replicas 2"),
        "1 that reads, 1 that answers": (group, group, "--replicas 1 --prefill 1"),
    }
    rows = []
    for name, (decode, prefill, options) in ways.items():
        begun = time.process_time()
        requests = swung(like(LOAD, round(DAY * mean_rate(LOAD))), SWING)
        found = serve(requests, decode, prefill)
        whole = sum(found.ledger().values())
        tails = {f"{what}_p99_s": f"{getattr(found, what).quantile(0.99):.4g}" for what in ("ttft", "tpot", "e2e")}
        parts = [f"{part} {seconds / whole:.3f}" for part, seconds in list(found.ledger().items())[:3]]
        rows.append({"deployment": name, "requests": found.requests, **tails, "ledger": "; ".join(parts),
                     "cpu_seconds": f"{time.process_time() - begun:.0f}", "command": COMMAND.format(options)})  # fmt: skip
        print(rows[-1])
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(RESULTS, text.getvalue())


if __name__ == "__main__":
    main()
