"""Fit the fractions of a datasheet's peak that good kernels reach, and write them into the package.

    python bench/fit_efficiency.py [DATA_DIR] [--write]

Reads `kernels_and_decode_measured.csv`. Every second row of each series is fitted, the rest is reported: the error
of the fitted fraction there, beside a null model (one constant rate for the whole series) and how often the 80 %
interval holds.
"""

import csv
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from narrows.capture import bundled, capture
from narrows.cost import tile_use, total
from narrows.machine import Machine, machine
from narrows.step import Step

MACHINES = {"A100": "a100-80gb", "MI210": "mi210", "H100": "h100-sxm", "H200": "h200"}
TARGET = Path(__file__).parents[1] / "src" / "narrows" / "data" / "efficiency.toml"


def machine_of(row: dict[str, str]) -> Machine | None:
    name = next((n for key, n in MACHINES.items() if row["hardware"].startswith(key)), None)
    return machine(name) if name else None


def matmul(rows: list[dict[str, str]]) -> Iterator[tuple[float, float]]:
    """(fraction of what the tiles allow, seconds) of products that the roofline says are bound by arithmetic."""
    for row in rows:
        shape = re.fullmatch(r"GEMM M=(\d+) N=(\d+) K=(\d+)", row["model"])
        here = machine_of(row)
        if not shape or here is None:
            continue
        m, n, k = map(int, shape.groups())
        seconds = float(row["value"]) * 1e-3 - here.kernel_seconds
        ideal = 2 * m * n * k / here.peak("fp16") / float(tile_use(m, n, 1, here))
        if ideal > 2 * (m * k + n * k + m * n) * 2 / here.memory.bandwidth_bytes_per_s:
            yield ideal / seconds, float(row["value"]) * 1e-3


def attention(rows: list[dict[str, str]]) -> Iterator[tuple[float, float]]:
    for row in rows:
        here = machine_of(row)
        if row["metric"] == "throughput" and row["unit"] == "TFLOP/s" and "ttention" in row["model"] and "Triton" not in row["model"] and here:
            yield float(row["value"]) * 1e12 / here.peak("fp16"), 1.0


def memory(rows: list[dict[str, str]]) -> Iterator[tuple[float, float]]:
    """Weight streams of batch-1 decoding on one device: the bandwidth its authors reach, without the kernels' fixed time."""
    for row in rows:
        found = re.search(r"achieved HBM bandwidth ([\d.]+) GB/s", row["note"])
        here, name = machine_of(row), row["model"].lower()
        if found and here and row["n_devices"] == "1" and name in bundled():
            step = Step.decode(1, int(row["output"]) // 2)
            fixed = float(total(capture(name), step).launches) * here.kernel_seconds
            seconds = 1 / float(row["value"])
            yield float(found[1]) * 1e9 / here.memory.bandwidth_bytes_per_s * seconds / (seconds - fixed), seconds


def link(rows: list[dict[str, str]]) -> Iterator[tuple[float, float]]:
    """All-reduces of at least 16 MB in one node, as a ring over the scale-up link."""
    for row in rows:
        size = re.fullmatch(r"([\d.]+) ([KMG])B", row["prompt"])
        here = machine_of(row)
        if row["model"] != "all_reduce" or not size or here is None or here.link is None or row["note"] != "nodes=1":
            continue
        count, ranks = float(size[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[size[2]], int(row["n_devices"])
        seconds = float(row["value"]) * 1e-6
        if count >= 16e6:
            sent = 2 * count * (ranks - 1) / ranks
            yield sent / here.link.bandwidth_bytes_per_s / (seconds - 2 * (ranks - 1) * here.link.latency_seconds), seconds


SERIES: dict[str, Callable[[list[dict[str, str]]], Iterator[tuple[float, float]]]] = {
    "matmul": matmul, "attention": attention, "memory": memory, "link": link}  # fmt: skip


def main() -> None:
    places = [a for a in sys.argv[1:] if not a.startswith("-")]
    folder = Path(places[0]) if places else Path(__file__).parents[2] / "shared" / "data"
    with (folder / "kernels_and_decode_measured.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    out = ["# Fractions of the datasheet's peak that good kernels reach: median, and the 10 % and 90 % quantile.",
           "# Written by bench/fit_efficiency.py; `any` holds where nothing was measured, as an assumption.", ""]  # fmt: skip
    out += ["[gpu]"]
    print(f"{'series':<10} {'fitted':>6} {'held':>5} {'median':>7} {'80 % interval':>15} {'MAPE':>6} {'null':>6} {'covered':>8}")
    for name, read in SERIES.items():
        found = np.array([fraction for fraction, _ in read(rows)])
        fit, held = found[::2], found[1::2]
        low, median, high = np.quantile(fit, (0.1, 0.5, 0.9))
        mape = np.mean(np.abs(held / median - 1))  # predicted seconds over measured is measured fraction over fitted
        null = np.mean(np.abs(held / np.mean(fit) - 1))
        covered = np.mean((held >= low) & (held <= high))
        print(f"{name:<10} {len(fit):>6} {len(held):>5} {median:>7.3f} {low:>7.3f}-{high:<7.3f} {mape:>6.1%} {null:>6.1%} {covered:>8.0%}")
        out.append(f"{name} = {{ median = {median:.3f}, low = {low:.3f}, high = {high:.3f}, rows = {len(fit)} }}")
    out += ["vector = { median = 0.7, low = 0.5, high = 0.9 }  # assumption: pointwise arithmetic is almost never the limit", "",
            "[any]  # assumptions",
            *(f"{k} = {{ median = {a}, low = {b}, high = {c} }}" for k, a, b, c in
              (("matmul", 0.7, 0.5, 0.85), ("attention", 0.5, 0.3, 0.7), ("vector", 0.7, 0.5, 0.9), ("memory", 0.8, 0.65, 0.92), ("link", 0.75, 0.5, 0.9))), ""]  # fmt: skip
    if "--write" in sys.argv:
        TARGET.write_text("\n".join(out))
        print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
