"""Fit the cost model's constants on one half of published measurements, and write them into the package.

    python bench/fit_efficiency.py [DATA_DIR] [--only STAGE ...] [--write]

Each stage fits a few constants of one class of kernel or engine on the configurations whose hash is even (`half`), with
the constants of earlier stages held. The residuals of the same rows give the 80 % intervals. `narrows validate` reports
on the rest; the rows used here are listed in `data/fitted_rows.txt`, so that they are never judged.
"""

import csv
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

from narrows import costmodel, validate
from narrows.costmodel import fitted, generation
from narrows.errors import NarrowsError
from narrows.measured import kernels, serving, training
from narrows.measured.table import Forecast, Row, fingerprint, half, hardware
from narrows.simulate import closed_loop
from narrows.simulate import training as step_model

DATA = Path(__file__).parents[1] / "src" / "narrows" / "data"
LARGEST = 0.94  # no kernel reaches more of the datasheet's peak over a step
Forecaster = Callable[[Row], list[Forecast]]


@dataclass(frozen=True)
class Stage:
    """Constants `table.name` (with their first guess) that rows of a kind are to fit.

    `names` of forecasts count; `classes` get the residuals as their interval, `keys` too.
    """

    name: str
    table: str
    first: dict[str, float]
    rows: Callable[[Row], bool]
    forecast: Forecaster
    names: tuple[str, ...]
    spread: tuple[str, ...] = ()
    steps: int = 250
    most: int = 0  # at most so many rows, evenly drawn
    shared: bool = False  # its constants also stand, as assumptions, for GPUs of which nothing is measured


def at(family: str, *words: str) -> Callable[[Row], bool]:
    """Rows of one generation of hardware whose model starts with one of the words."""

    def wanted(row: Row) -> bool:
        return row.get("model", "").startswith(words) and generation(hardware(row["hardware"]).name) == family

    return wanted


def collective(over: str) -> Callable[[Row], bool]:
    def wanted(row: Row) -> bool:
        if row.get("phase") != "collective" or (row["model"] == "alltoall" and row["dtype"] == "float"):
            return False  # the float all-to-all rows hold start-up outliers of up to 1,600 us
        many = "nodes=1" not in row["note"]
        return over == ("ethernet" if many else "pcie" if "PCIE" in row["hardware"] else "nvlink")

    return wanted


def stages() -> list[Stage]:
    k = kernels.forecast
    found = []
    for family in ("ampere", "cdna2"):
        found += [
            Stage(
                f"gemm {family}",
                family,
                {"matmul": 0.85, "memory": 0.8, "call-gemm": 20.0},
                at(family, "GEMM"),
                k,
                ("gemm",),
                ("matmul",),
            ),
            Stage(
                f"softmax {family}",
                family,
                {"memory-softmax": 0.5, "call-softmax": 13.0},
                at(family, "softmax"),
                k,
                ("pointwise",),
            ),
            Stage(
                f"layernorm {family}",
                family,
                {"memory-norm": 0.8, "memory-norm-wide": 0.5, "call-layernorm": 30.0, "call_least-layernorm": 50.0},
                at(family, "layernorm"),
                k,
                ("pointwise",),
                ("memory-norm", "memory-norm-wide"),
            ),
            Stage(
                f"gelu {family}",
                family,
                {"memory-pointwise": 0.75, "call-gelu": 30.0, "call_least-gelu": 45.0},
                at(family, "gelu"),
                k,
                ("pointwise",),
                ("memory-pointwise",),
            ),
        ]
    found.append(
        Stage(
            "attention hopper",
            "hopper",
            {
                "attention": 0.8,
                "attention-flash2": 0.4,
                "attention-cudnn": 0.6,
                "attention-triton": 0.5,
                "attention_head": 30.0,
                "attention_keys": 150.0,
            },
            lambda r: r.get("phase") == "operator" and at("hopper", "Flash", "cuDNN", "Triton")(r),
            k,
            ("attention",),
            ("attention",),
            900,
        )
    )
    found.append(
        Stage(
            "nvlink",
            "hopper",
            {"link": 0.95, "link_base": 3.0, "link_hop": 0.6, "link_ramp": 2e7},
            collective("nvlink"),
            k,
            ("collectives",),
            ("link",),
            shared=True,
        )
    )
    for over, bandwidth in (("pcie", 6.0), ("ethernet", 1.0)):
        found.append(
            Stage(
                over,
                "gpu",
                {f"wire-{over}": bandwidth, f"link_base-{over}": 3.0, f"link_hop-{over}": 1.0, f"link_ramp-{over}": 1e5},
                collective(over),
                k,
                ("collectives",),
            )
        )
    found.append(
        Stage(
            "decode",
            "ampere",
            {"memory-bf16": 0.8, "memory-int8": 0.65, "memory-int4": 0.55, "kernel": 2.0, "link_one_shot": 3.0},
            lambda r: r.get("phase") in ("decode", "prefill", "offline_max") and "A100" in r["hardware"],
            k,
            ("decode",),
            ("memory-bf16", "memory-int8", "memory-int4"),
            200,
        )
    )
    found.append(
        Stage(
            "splitwise",
            "engine-splitwise",
            {
                "prefill": 1.3,
                "decode": 1.05,
                "launch": 3.5,
                "crowd": 0.5,
                "crowd_at": 8000.0,
                "norm": 6.0,
                "sequence_us": 100.0,
                "step_ms": 10.0,
            },
            lambda r: "prompt_size" in r,
            serving.batch,
            ("splitwise-prompt", "splitwise-token"),
            (),
            500,
        )
    )
    found.append(
        Stage(
            "hopper",
            "hopper",
            {
                "matmul": 0.7,
                "matmul-fp8": 0.6,
                "memory": 0.8,
                "memory-fp8": 0.75,
                "memory-fp4": 0.5,
                "kernel": 1.2,
                "link_one_shot": 1.5,
            },
            lambda r: (
                r.get("mode") == "agg"
                and r["backend"] != "sglang"
                and (r["concurrency"] or "999") in ("4", "8", "16", "32", "64")
            ),
            serving.closed,
            ("serving-tpot",),
            ("matmul", "matmul-fp8", "memory", "memory-fp8", "memory-fp4"),
            160,
            90,
        )
    )
    for engine in ("trtllm", "vllm", "sglang", "sglang-0.5.1"):
        for mode in ("agg", "disagg"):
            name = engine + ("-disagg" if mode == "disagg" else "")
            first = {
                "decode": 1.05,
                "step_ms": 1.0,
                "sequence_us": 10.0,
                "first": 1.5,
                "burst": 0.06,
                "crowding": 0.9,
                "intake_ms": 20.0 if mode == "agg" else 500.0,
            }
            first |= {"share": 0.9, "memory": 0.88} if mode == "agg" else {}
            found.append(
                Stage(
                    f"serving {name}",
                    f"engine-{name}",
                    first,
                    engine_rows(name),
                    serving.closed,
                    ("serving-ttft", "serving-tpot"),
                    (),
                    400,
                )
            )
    t, names = (
        training.forecast,
        (
            "training-sc21",
            "training-other",
            "training-single-node",
            "training-tuning-log",
            "training-v100-log",
            "training-llm-foundry",
        ),
    )
    found += [
        Stage(
            "training megatron",
            "training",
            {"sustained": 1.1, "launch": 10.0, "norm": 4.0, "network": 0.7, "pipeline": 0.5, "message_us": 50.0, "step_ms": 8.0},
            lambda r: (
                (
                    published("SC21", "2205.05198", "tables.tex", "2401.10241", "Vocabulary", "playbook")(r)
                    and "ZeRO" not in r["note"]
                )
                or (published("vTrain")(r) and int(fingerprint(r), 16) % 6 == 0)
            ),
            t,
            names,
            (),
            500,
        ),
        Stage("training ampere", "ampere", {"unaligned": 0.1}, published("prequel"), t, names, (), 40),
        Stage(
            "training deepspeed",
            "training-deepspeed",
            {"sustained": 1.35, "network": 0.8, "pipeline": 0.8, "message_us": 300.0},
            published("prequel"),
            t,
            names,
            (),
            200,
        ),
        Stage("training zero", "training-deepspeed", {"exposed": 0.9}, lambda r: "ZeRO-3" in r.get("note", ""), t, names, (), 40),
        Stage("training unaligned", "ampere", {"unaligned": 0.1}, published("prequel"), t, names, (), 40),
        Stage("training attention", "ampere", {"attention": 0.6}, published("foundry"), t, names, ("attention",), 40),
        Stage(
            "training fsdp",
            "training-fsdp",
            {"sustained": 1.25, "launch": 8.0, "exposed": 0.2, "step_ms": 10.0, "network": 0.6},
            published("foundry"),
            t,
            names,
            (),
            200,
        ),
        Stage("training volta", "volta", {"matmul": 0.8}, published("gpt2.md", "V100"), t, names, ("matmul",), 40),
    ]
    return found


def published(*words: str) -> Callable[[Row], bool]:
    """Training rows of certain sources; of two tables of one run, the one that gives a time."""

    def wanted(row: Row) -> bool:
        if (
            "recompute" not in row
            or "no Flash" in row["note"]
            or (row["metric"] == "tflops_per_gpu" and "bigscience" in row["source"])
            or (row["metric"] in ("mfu", "hfu") and "Vocab" not in row["source"])
        ):
            return False
        return any(w in row["source"] for w in words) and not ("V100" in row["hardware"] and "gpt2.md" not in words)

    return wanted


def engine_rows(name: str) -> Callable[[Row], bool]:
    """Closed-loop rows whose engine and version are served by one set of constants."""
    return lambda row: (
        "backend" in row and (row["mode"] == "disagg") == name.endswith("disagg") and serving.engine_of(row) == name
    )


def put(table: str, name: str, value: float, **more: object) -> None:
    """Set a constant for the runs that follow."""
    entry = fitted().setdefault(table, {})
    entry[name] = {**entry.get(name, {}), "median": value, "low": value, "high": value, **more}
    costmodel.forget()
    if not table.startswith("engine-"):
        closed_loop._step_seconds.cache_clear()
    if not table.startswith("training"):
        step_model._parts.cache_clear()


def is_share(name: str) -> bool:
    """Whether a constant is a share of a peak."""
    return name.startswith(("matmul", "memory", "attention", "link")) and "_" not in name


def ratios(rows: Sequence[Row], stage: Stage, only: str = "") -> np.ndarray:
    """Predicted over measured of every forecast that counts."""
    found = []
    for row in rows:
        try:
            found += [f.predicted / f.measured for f in stage.forecast(row) if f.name in stage.names and only in ("", f.name)]
        except NarrowsError:
            continue  # validate lists it with its reason
    return np.array(found)


def solve(stage: Stage, rows: list[Row]) -> np.ndarray:
    """Minimise the mean of |ratio - 1| and |log ratio|, both capped, of a stage's rows; its constants are left in `fitted()`."""
    names, guess = list(stage.first), np.log(list(stage.first.values()))
    first = np.log([fitted()[stage.table][name]["median"] for name in names])

    def loss(point: np.ndarray) -> float:
        for name, value in zip(names, point, strict=True):
            put(stage.table, name, min(float(np.exp(value)), LARGEST if is_share(name) else np.inf))
        found = ratios(rows, stage)
        return float(np.mean(np.minimum(np.abs(found - 1), 1.5) + np.minimum(np.abs(np.log(found)), 1.5))) / 2 + 0.01 * float(
            np.mean((point - guess) ** 2)
        )

    best = minimize(
        loss,
        first,
        method="Nelder-Mead",
        options={"maxfev": stage.steps, "xatol": 1e-3, "fatol": 1e-5, "initial_simplex": _simplex(first)},
    )
    loss(best.x)
    return ratios(rows, stage)


def _simplex(first: np.ndarray) -> np.ndarray:
    return np.vstack([first, *(first + 0.25 * np.eye(len(first))[i] for i in range(len(first)))])


def main() -> None:
    """Fit all stages (or --only some), print fit and held error, and write with --write."""
    places = [a for a in sys.argv[1:] if not a.startswith("-")]
    only = sys.argv[sys.argv.index("--only") + 1 :] if "--only" in sys.argv else []
    only = [o for o in only if not o.startswith("-")]
    folder = Path(places[0]) if places and places[0] not in only else Path(__file__).parents[2] / "shared" / "data"
    tables = {}
    for file in sorted(folder.glob("*.csv")):
        with file.open(newline="", encoding="utf-8") as opened:
            tables[file.stem] = list(csv.DictReader(opened))
    everything = [row for rows in tables.values() for row in rows]
    print(f"{'stage':<22} {'fit':>4} {'MAPE':>6} {'held':>5} {'MAPE':>6}   constants")
    for stage in stages():
        if only and not any(stage.name.startswith(o) for o in only):
            continue
        begun = time.monotonic()
        wanted = [row for row in everything if _is(stage, row)]
        if len(wanted) < 12:
            continue
        fit = [row for row in wanted if half(row) == 0]
        held = [row for row in wanted if half(row) == 1]
        for name, value in stage.first.items():
            if name not in fitted().get(stage.table, {}):
                put(stage.table, name, value)
        found = solve(stage, fit[:: max(1, len(fit) // stage.most)] if stage.most else fit)
        out = ratios(held, stage)
        low, high = np.quantile(1 / found, (0.1, 0.9))  # measured over predicted
        for name in stage.first:
            value = fitted()[stage.table][name]["median"]
            wide = (min(1.0, 1 / high), max(1.0, 1 / low)) if name in stage.spread else (1.0, 1.0)
            put(stage.table, name, value)
            fitted()[stage.table][name].update(low=value * wide[0], high=value * wide[1], rows=len(found), data=stage.name)
            if stage.shared or name in ("attention_head", "attention_keys"):
                entry = {k: v for k, v in fitted()[stage.table][name].items() if k != "rows"}
                fitted()["gpu"][name] = {**entry, "data": f"assumption: as on {stage.table}"}
        costmodel.forget()
        shown = ", ".join(f"{n}={fitted()[stage.table][n]['median']:.3g}" for n in stage.first)
        for name in stage.names if len(stage.names) > 1 else ():
            part = ratios(held, stage, name)
            if not len(part):
                continue
            print(f"    {name:<18} held {np.mean(np.abs(part - 1)):>6.1%}  median {np.median(part):.2f}")
        errors = f"{len(found):>4} {np.mean(np.abs(found - 1)):>6.1%} {len(out):>5} {np.mean(np.abs(out - 1)):>6.1%}"
        print(f"{stage.name:<22} {errors}   {shown}  [{time.monotonic() - begun:.0f} s]", flush=True)
        if "--write" in sys.argv:
            write(tables)
    if "--write" in sys.argv:
        spread(tables)
        write(tables)
        print(f"wrote {DATA / 'efficiency.toml'}")


def _is(stage: Stage, row: Row) -> bool:
    try:
        return stage.rows(row)
    except (NarrowsError, KeyError):
        return False


def quoted(name: str) -> str:
    return f'"{name}"' if "." in name else name


HEADER = """\
# Constants of the cost model: a fraction of the datasheet's peak that kernels reach, unless the name says otherwise.
# Written by bench/fit_efficiency.py, which fits them on the configurations whose hash is even; `narrows validate`
# reports on the others. `rows` measurements of `data` stand behind a constant; one without `rows` is an assumption.
#   median, low, high     the constant, and its 10 % and 90 % quantile
#   attention_head, _keys numbers: sizes at which fused attention reaches half its speed
#   kernel, launch        factors on a machine's kernel_seconds and launch_seconds
#   link_base, _hop       factors on a link's latency: once per collective, and per hop;  link_ramp: bytes
#   link_one_shot         the same factor where an engine reduces a small message in one kernel
#   call-*, call_least-*  microseconds around, and at least for, a kernel that is timed from Python
#   wire-*                GB/s that a link not described by a machine delivers
# [engine-*]   what an engine adds to its steps: see simulate/closed_loop.py;  [training*]: see simulate/training.py
# [residuals]  measured / predicted of each kind of forecast among the fitted rows: the 80 % interval
# [null]       the one constant of the null model of each set
"""


def spread(tables: dict[str, list[Row]]) -> None:
    """The residuals of the fitted half: the 80 % interval of every kind of forecast, and the null model of every set."""
    found: dict[tuple[str, str], list[float]] = {}
    fitted().pop("residuals", None)
    fitted().pop("null", None)
    for rows in tables.values():
        for row in rows:
            if half(row) == 0:
                for forecast in validate.forecasts(row):
                    found.setdefault(("residuals", forecast.key), []).append(forecast.measured / forecast.predicted)
                    found.setdefault(("null", forecast.name), []).append(forecast.measured / forecast.bound)
    for (table, name), values in sorted(found.items()):
        n = len(values)  # the fewer rows, the further out: they are the fitted ones
        out = min(0.5, 0.4 * (n + 1) / n + 1 / n)
        low, median, high = np.quantile(values, (0.5 - out, 0.5, 0.5 + out))
        low, high = (min(low, 0.95), max(high, 1.05)) if table == "residuals" else (low, high)  # one run to the next
        put(table, name, float(median), low=float(low), high=float(high), rows=n)


def write(tables: dict[str, list[Row]]) -> None:
    """Write the constants, and the fingerprints of every row in the fitted half."""
    lines = [HEADER]
    for table, entries in fitted().items():
        lines.append(f"[{quoted(table)}]")
        for name, entry in entries.items():
            if is_share(name) and table not in ("generations", "residuals", "null"):
                entry["high"] = min(entry["high"], 1.0)
            if isinstance(entry, list):
                lines.append(f"{name} = [{', '.join(chr(34) + str(v) + chr(34) for v in entry)}]")
            else:
                cells = ", ".join(
                    f"{k} = {v:.4g}" if isinstance(v, float) else f"{k} = {v}" if isinstance(v, int) else f'{k} = "{v}"'
                    for k, v in entry.items()
                )
                lines.append(f"{quoted(name)} = {{ {cells} }}")
        lines.append("")
    (DATA / "efficiency.toml").write_text("\n".join(lines))
    known = sorted({fingerprint(row) for rows in tables.values() for row in rows if half(row) == 0})
    (DATA / "fitted_rows.txt").write_text("\n".join(known) + "\n")


if __name__ == "__main__":
    main()
