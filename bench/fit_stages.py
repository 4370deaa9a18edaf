"""The stages of the fit: which constants of the cost model come from which published rows (see fit_efficiency.py)."""

from collections.abc import Callable
from dataclasses import dataclass

from narrows.costmodel import generation
from narrows.measured import kernels, serving, training
from narrows.measured.table import Forecast, Row, fingerprint, hardware

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
    for over, share, ramp in (("pcie", 0.3, 1e5), ("ethernet", 0.8, 3e6)):
        found.append(
            Stage(
                over,
                "any",
                {over: share, f"{over}_base": 4.0, f"{over}_hop": 1.0, f"{over}_ramp": ramp}
                | ({"ethernet_flows": 0.3} if over == "ethernet" else {}),
                collective(over),
                k,
                ("collectives",),
                (over,),
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
        Stage(
            "training memory",
            "training-memory",
            {"margin": 0.05},
            lambda r: r.get("metric") == "peak_memory",
            t,
            ("training-memory",),
            (),
            40,
        ),
        Stage(
            "training memory deepspeed",
            "training-memory-deepspeed",
            {"cached": 0.2, "runtime": 2e9},
            lambda r: r.get("metric") == "gpu_memory",
            t,
            ("training-memory",),
            (),
            60,
        ),
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
