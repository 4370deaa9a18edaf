"""Fit the power model's constants on one half of measured configurations, and write `data/power.toml`.

    python bench/fit_energy.py [DATA_DIR] [--write]

Measured are the peak power of the prompt phase and the average power of a run on A100s. The average counts as that of decoding
where the prompt takes less than a tenth of the run. Prompts of more than 2,048 tokens are left out: there the engine
is slowed by something else than arithmetic (see `crowd` in data/efficiency.toml), so that its use of the peak is not known.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from scipy.optimize import least_squares

from narrows.capture import capture
from narrows.cost import total
from narrows.machine import machine
from narrows.measured.table import Row, configuration, half, read
from narrows.parallel import tensor_parallel
from narrows.step import Step

OUT = Path(__file__).parents[1] / "src" / "narrows" / "data" / "power.toml"
MODELS = {"bloom-176b": "bloom-176b", "llama2-70b": "llama-2-70b"}
LONGEST = 2048  # tokens of a prompt batch
UNKNOWN = (0.4, 1.2)  # real over predicted watts of hardware of which no power was measured here
TEMPLATE = """\
# Constants of the power model (see energy.py): shares of a device's rated power, unless said otherwise.
# Written by bench/fit_energy.py, which fits floor to ceiling on the configurations whose hash is even.
#   floor, compute, memory, ceiling   what a running device draws: at least, per share of a peak in use, at most
#   low, high  10 % and 90 % quantile of measured over predicted
#              where nothing was measured an assumption: decoding on an H200 of 700 W draws 137 to 300 W (arXiv 2605.11999)
#   idle       with a model loaded and nothing to do, where the machine's file does not say: 16 A100 that hold BLOOM draw
#              0.28 kWh in 10 minutes without a request, 75 % of it the GPUs (Luccioni et al., JMLR 24, 2023)
#   exponent   the power above idle falls with the clock to this power: an assumption between 3, where the voltage falls
#              with the clock, and 2, near the lowest voltage

[any]
{shares}
idle = 0.2
exponent = 2.5
low = {loose:.4g}
high = {wide:.4g}
source = "power: assumed to be as on A100, with a wider interval"

[a100]
low = {low:.4g}
high = {high:.4g}
source = "power: {basis}"
"""


@dataclass(frozen=True)
class Point:
    """A phase of one configuration: shares of peak arithmetic and bandwidth in use, and measured watts over rated."""

    phase: str
    compute_use: float
    memory_use: float
    measured: float
    half: int


def points(folder: Path) -> list[Point]:
    """Both phases of each configuration with measured power; medians over its repeats."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in read(folder / "splitwise_a100.csv"):
        if float(row["peak_power"]) > 0:
            groups[configuration(row)].append(row)
    found, there = [], machine("a100-80gb")
    for rows in groups.values():
        first = rows[0]
        graph = tensor_parallel(capture(MODELS[first["model"]]), int(first["tensor_parallel"]))
        batch, prompt, written = (int(first[k]) for k in ("batch_size", "prompt_size", "token_size"))

        def mid(column: str, rows: list[Row] = rows) -> float:
            return median(float(row[column]) for row in rows)

        phases = [("prefill", Step.prefill(batch, prompt), mid("prompt_time") / 1e3, mid("peak_power"))]
        if mid("prompt_time") < 0.1 * mid("e2e_time"):
            phases.append(("decode", Step.decode(batch, prompt + written // 2), mid("token_time") / 1e3, mid("average_power")))
        for phase, step, seconds, measured in phases:
            if phase == "prefill" and batch * prompt > LONGEST:
                continue
            work = total(graph, step)
            compute = float(work.flop) / there.peak("bf16") / seconds
            memory = float(work.read_bytes + work.write_bytes) / there.memory.bandwidth_bytes_per_s / seconds
            found.append(Point(phase, compute, memory, measured, half(first)))
    return found


def predicted(constants: np.ndarray, rows: list[Point]) -> np.ndarray:
    floor, compute, memory, ceiling = constants
    return np.asarray(np.minimum(ceiling, [floor + compute * p.compute_use + memory * p.memory_use for p in rows]))


def ratios(constants: np.ndarray, rows: list[Point]) -> np.ndarray:
    return np.asarray([p.measured for p in rows] / predicted(constants, rows))


def main(arguments: list[str]) -> None:
    folder = Path(next((a for a in arguments if not a.startswith("--")), "../shared/data"))
    rows = points(folder)
    fit, rest = [p for p in rows if not p.half], [p for p in rows if p.half]
    constants = least_squares(lambda c: np.log(ratios(c, fit)), [0.3, 1.0, 0.7, 1.0], bounds=(0.05, 1.5), loss="soft_l1").x
    low, high = np.quantile(ratios(constants, fit), [0.1, 0.9])
    off = np.abs(1 / ratios(constants, rest) - 1)
    null = np.abs(np.exp(np.mean([np.log(p.measured) for p in fit])) / np.array([p.measured for p in rest]) - 1)
    inside = np.mean((ratios(constants, rest) >= low) & (ratios(constants, rest) <= high))
    print(f"fitted on {len(fit)}: floor, compute, memory, ceiling = {np.round(constants, 3)}, {low:.3f} to {high:.3f}")
    print(f"held back {len(rest)}: median error {np.median(off):.1%}, mean {off.mean():.1%}, one constant {null.mean():.1%}")
    print(f"inside the interval: {inside:.0%}")
    if "--write" in arguments:
        shares = "\n".join(f"{k} = {v:.4g}" for k, v in zip(("floor", "compute", "memory", "ceiling"), constants, strict=True))
        error = f"{len(rest)} held back: mean error {off.mean():.1%}, {inside:.0%} inside"
        basis = f"fitted on {len(fit)} phases of splitwise on A100; {error}"
        OUT.write_text(TEMPLATE.format(shares=shares, basis=basis, low=low, high=high, loose=UNKNOWN[0], wide=UNKNOWN[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
