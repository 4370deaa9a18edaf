"""Fit what a GPU reaches of its peaks from recorded serving runs: python bench/fit_serving.py [DATA_DIR] [--write]

Two shares, of the arithmetic and of the memory bandwidth, so that simulated times of the first half of the requests are
nearest to the recorded ones (mean absolute logarithm of their ratio, of first tokens and of later ones). The report is on
the second half, which the fit has not seen. `--write` puts the shares into the machine's file, with their source.
"""

import re
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np

from narrows.costmodel import achieved
from narrows.machine import Machine
from narrows.measured.recorded import Run, Times, figures, runs

ROUNDS = ((0.1, 4), (0.05, 2), (0.02, 2), (0.01, 2))  # grids around the best so far: step, and steps to each side


def reaching(machine: Machine, shares: dict[str, float]) -> Machine:
    """The machine at given shares of its peaks."""
    efficiency = {name: dict.fromkeys(("median", "low", "high"), share) for name, share in shares.items()}
    return replace(machine, efficiency=efficiency)


def plain(machine: Machine) -> Machine:
    """The machine with the constants of its kind alone."""
    return replace(machine, efficiency={}, sources={k: v for k, v in machine.sources.items() if "efficiency" not in k})


def ratios(run: Run, times: Times, part: slice) -> dict[str, np.ndarray]:
    """Simulated over recorded, of each request in a part of the run."""
    found = {what: (getattr(times, what) / getattr(run.measured, what))[part] for what in ("ttft", "tpot")}
    return {what: value[~np.isnan(value)] for what, value in found.items()}


def fit(run: Run) -> dict[str, float]:
    """The shares of the peaks that fit the first half of a run best."""
    half = slice(0, len(run.requests) // 2)
    known: dict[tuple[float, float], float] = {}

    def loss(matmul: float, memory: float) -> float:
        key = round(matmul, 3), round(memory, 3)
        if key not in known:
            times = run.simulated(run.blocks, reaching(plain(run.machine), {"matmul": key[0], "memory": key[1]}))
            known[key] = sum(float(np.abs(np.log(r)).mean()) for r in ratios(run, times, half).values())
        return known[key]

    best = (0.6, 0.6)
    for step, many in ROUNDS:
        around = [step * i for i in range(-many, many + 1)]
        tried = [(best[0] + a, best[1] + b) for a in around for b in around]
        best = min(((a, b) for a, b in tried if 0.1 < a <= 1.0 and 0.1 < b <= 1.0), key=lambda at: loss(*at))
    return {"matmul": round(best[0], 3), "memory": round(best[1], 3)}


def report(run: Run, shares: dict[str, float]) -> None:
    """Print simulated over recorded on the second half, without and with the fit."""
    half = slice(len(run.requests) // 2, None)
    places = {"unfitted": plain(run.machine), "fitted": reaching(plain(run.machine), shares)}
    for title, machine in places.items():
        for blocks in dict.fromkeys((run.blocks, 0)):
            times = run.simulated(blocks, machine)
            errors = []
            for what in ("ttft", "tpot"):
                got, want = (figures(getattr(t, what)[half]) for t in (times, run.measured))
                errors.append(f"{what} " + " ".join(f"{k} {got[k] / want[k] - 1:+.1%}" for k in want))
            print(f"  {title:<9} {f'{blocks} blocks' if blocks else 'own blocks':<12} {'   '.join(errors)}")


def write(run: Run, shares: dict[str, float]) -> None:
    """Put the shares into the machine's file; what it says besides stays as it is."""
    path = Path(str(files("narrows.data").joinpath("machines", f"{run.machine.name}.toml")))
    text = re.sub(r"\[efficiency\.[^\[]*(?=\[)", "", path.read_text("utf-8"))
    text = re.sub(r"^recorded = .*\n", "", text, flags=re.M)
    figure = '{key} = {{ value = {value:.3g}, source = "recorded" }}'
    blocks = ""
    for name, share in shares.items():
        kind = achieved(plain(run.machine), name)
        values = {"median": share, "low": share * kind.low / kind.median, "high": share * kind.high / kind.median}
        lines = [figure.format(key=key, value=value) for key, value in values.items()]
        blocks += "\n".join([f"[efficiency.{name}]", *lines, "", ""])
    said = (
        f"fitted: bench/fit_serving.py on the first half of the requests of {run.path.name} (vLLM {run.meta['vllm_version']}, "
        "LLMServingSim, MIT), with the engine's own constants; low and high as wide as for other machines of its kind"
    )
    path.write_text(text.replace("[sources]\n", f'{blocks}[sources]\nrecorded = "{said}"\n'), "utf-8")


def main() -> None:
    """Fit every run there is."""
    given = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    data = Path(given[0]) if given else Path(__file__).parents[2] / "shared" / "data"
    for path in runs(data):
        run = Run(path)
        shares = fit(run)
        print(f"{path.name}: {run.machine.name} {shares}; simulated over recorded on the second half of {len(run.requests)}:")
        report(run, shares)
        if "--write" in sys.argv:
            write(run, shares)


if __name__ == "__main__":
    main()
