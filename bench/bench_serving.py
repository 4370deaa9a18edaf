"""How fast serving is simulated and planned, beside the peers on the same load.

    python bench/bench_serving.py [--data DIR] [--peer NAME=COMMAND ...] [--record]

CPU seconds and resident memory are of whole processes, start-up included. The load is the Azure conversation trace of 2023,
its first 1,000 and 10,000 requests (lengths like it where the file is not there, and for more than it has).

Peers are run where --peer tells how, else as they were last recorded (results/peers_serving.csv). COMMAND plays that
trace in the setting of PEERS, `{requests}` of its requests; the last line that it prints is JSON: `version`, `note`, and
mean, p50, p90 and p99 of `ttft_s`, `tpot_s` and `e2e_s`. Ours is run in the same setting beside it.
"""

import argparse
import csv
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from narrows.capture import capture
from narrows.figures import write
from narrows.machine import machine
from narrows.search.deployments import EVERY, Job, Kind
from narrows.search.screen import screen
from narrows.search.serve import plan_serve
from narrows.simulate.asked import saturation
from narrows.simulate.workload import Lengths, generate, read

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "peers_serving.csv"
COUNTS = (1_000, 10_000)  # requests that peers play
MODEL, MACHINE, RATE, SIZES, SHOWN = "llama-3.1-8b", "h100-sxm", 12.0, (1_000, 10_000, 100_000, 1_000_000), 12
LATENCIES = [f"{name}_{share}" for name in ("ttft", "tpot", "e2e") for share in ("p50", "p99")]
COLUMNS = (
    "simulator",
    "version",
    "model",
    "setting",
    "requests",
    "cpu_seconds",
    "peak_mb",
    *LATENCIES,
    "note",
    "machine",
    "command",
)


@dataclass(frozen=True)
class Setting:
    """What a peer simulates: one replica of so many devices, the sequences that run at a time and the rows of a step."""

    model: str
    machine: str
    devices: int
    sequences: int
    tokens: int


PEERS = {
    "vidur": Setting("llama-3.1-8b", "a100-80gb", 1, 128, 512),  # its example, chunks as Sarathi-Serve reads them
    "splitwise-sim": Setting("llama-2-70b", "h100-sxm", 8, 512, 2048),  # its Baseline-H100
}
# CPU seconds for 10,000 requests on one replica that were not run here again; survey of November 2026, two x86 cores with AMX
SURVEYED = "DistServe's simulator 18 s; inference-lab 13 s (0.4 s for 1,000); Frontier 279 s"
PEER_PLAN = "AIConfigurator 12-20 s for 110-276 points, means only (survey of November 2026)"


def run(words: list[str]) -> tuple[str, float, float]:
    """What a process prints, its CPU seconds and its bytes of memory; exits as it does where it fails."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    printed = process.stdout.read() if process.stdout else ""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{shlex.join(words)} failed with {process.returncode}")
    return printed, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024.0


def ours(words: list[str]) -> tuple[str, float, float]:
    """`narrows simulate serve` with these options."""
    return run([sys.executable, "-m", "narrows", "simulate", "serve", *words, "--json"])


def row(name: str, s: Setting, count: int, found: dict[str, Any], seconds: float, memory: float) -> dict[str, str]:
    """One line of the results."""
    latencies = {f"{what}_{share}": f"{found[f'{what}_s'][share]:.4g}" for what, share in (c.split("_") for c in LATENCIES)}
    place = f"{s.devices} x {s.machine}, {s.sequences} sequences, {s.tokens} rows"
    return {"simulator": name, "version": found["version"], "model": s.model, "setting": place, "requests": str(count),
            "cpu_seconds": f"{seconds:.3g}", "peak_mb": f"{memory / 1e6:.0f}", **latencies, "note": found.get("note", ""),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "command": "python bench/bench_serving.py --peer NAME=COMMAND --record"}  # fmt: skip


def beside(name: str, command: str, trace: Path) -> list[dict[str, str]]:
    """A peer and ours in its setting, on each number of requests."""
    s, rows = PEERS[name], []
    for count in COUNTS:
        printed, *cost = run(shlex.split(command.replace("{requests}", str(count))))
        rows.append(row(name, s, count, json.loads(printed.splitlines()[-1]), *cost))
        words = [s.model, "-m", s.machine, "-n", str(s.devices), "--trace", str(trace), "--requests", str(count),
                 "--context", "0", "--max-sequences", str(s.sequences), "--max-tokens", str(s.tokens)]  # fmt: skip
        printed, *cost = ours(words)
        rows.append(row("narrows", s, count, {"version": version("narrows"), **json.loads(printed)}, *cost))
    return rows


def show(rows: list[dict[str, str]]) -> None:
    """A line for each run: cost, then seconds that clients see."""
    for r in rows:
        seen = ", ".join(f"{name} {r[f'{name}_p50']} / {r[f'{name}_p99']} s" for name in ("ttft", "tpot", "e2e"))
        print(
            f"  {r['simulator']:>14} {int(r['requests']):>7,} requests {r['cpu_seconds']:>6} CPU s {r['peak_mb']:>5} MB; {seen}"
        )
        if r["note"]:
            print(f"{'':>17}{r['note']}")


def main() -> None:
    """Print each size of load, the peers, and the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="with traces/azure2023_conv.csv")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND", help=", ".join(PEERS))
    parser.add_argument("--record", action="store_true", help="keep what --peer gave")
    given = parser.parse_args()
    trace = given.data / "traces" / "azure2023_conv.csv"
    like = Lengths.like(read(trace)) if trace.is_file() else Lengths(1155, 211, 0.96, 0.77)
    print(f"{MODEL} on one {MACHINE}, {RATE:g} requests a second, {like.prompt:.0f} + {like.output:.0f} tokens in the mean")
    for count in SIZES:
        words = [MODEL, "-m", MACHINE, "--rate", str(RATE), "--requests", str(count), "--prompt", str(like.prompt),
                 "--output", str(like.output), "--spread", str(like.prompt_spread)]  # fmt: skip
        _, seconds, memory = ours(words)
        print(f"  {count:>9,} requests {seconds:>7.2f} CPU s {seconds / count * 1e6:>7.1f} us each {memory / 1e6:>5.0f} MB")
    peers = dict(peer.split("=", 1) for peer in given.peer)
    if unknown := set(peers) - set(PEERS):
        parser.error(f"no setting for {', '.join(unknown)}: --peer knows {', '.join(PEERS)}")
    if peers and not trace.is_file():
        parser.error(f"{trace} is not there: peers are compared on it")
    with RESULTS.open(newline="") if RESULTS.is_file() else io.StringIO() as file:
        recorded = list(csv.DictReader(file))
    for name, setting in PEERS.items():
        kept = [r for r in recorded if r["model"] == setting.model]
        rows = beside(name, peers[name], trace) if name in peers else kept
        recorded = [r for r in recorded if r not in kept] + rows
        print(f"{name} and narrows, the trace as it was, {setting}{'' if name in peers else ', as recorded'}")
        show(rows)
    if given.record:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(recorded)
        write(RESULTS, text.getvalue())
    print("  10,000 requests, published:", SURVEYED)
    job = Job(capture(MODEL), (Kind(machine(MACHINE), 8),), tuple(generate(4 * RATE, 1000, like)), 1.0, 0.05)
    begun = time.process_time()
    found = plan_serve(job)
    print(f"plan: {found.evaluated:,} deployments in {time.process_time() - begun:.1f} CPU s; {PEER_PLAN}")
    points = screen(job, EVERY).points
    ratios = sorted(p.full / saturation(job.requests, *p.config.groups(job)) for p in points[:: len(points) // SHOWN])
    print("screened over simulated saturation:", " ".join(f"{ratio:.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
