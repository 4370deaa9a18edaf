"""Reading tables of measurements: cells with their units, hardware by its published name, errors that name row and column."""

import csv
import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from narrows.capture import bundled, capture
from narrows.costmodel import fitted, generation
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import Machine, machine, machines

Row = Mapping[str, str]

# How published tables name hardware, most special first, and the bundled machine that it is.
_HARDWARE = (
    (r"gb200", "gb200"),
    (r"(?<!g)b200", "b200"),
    (r"gh200|h200", "h200"),
    (r"h100.*(pcie|nvl)", "h100-pcie"),
    (r"h100", "h100-sxm"),
    (r"h800", "h800"),
    (r"h20\b", "h20"),
    (r"a100.*80 ?gb|a100.*sxm.*80", "a100-80gb"),
    (r"a100.*pcie", "a100-pcie-40gb"),
    (r"a100.*40 ?gb", "a100-40gb"),
    (r"a100", "a100-80gb"),
    (r"a10\b", "a10"),
    (r"a40\b", "a40"),
    (r"v100", "v100-sxm2-32gb"),
    (r"t4\b", "t4"),
    (r"rtx.?pro.?6000", "rtx-pro-6000"),
    (r"4090", "rtx-4090"),
    (r"3090", "rtx-3090"),
    (r"l40s?\b", "l40s"),
    (r"l4\b", "l4"),
    (r"mi300", "mi300x"),
    (r"mi250", "mi250x"),
    (r"mi210", "mi210"),
    (r"orin", "jetson-orin-agx"),
    (r"tpu.?v5p", "tpu-v5p"),
    (r"tpu.?v5e", "tpu-v5e"),
    (r"tpu.?v4", "tpu-v4"),
)
UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "days": 86400.0}
# Spellings of units, and the one that stands for them.
_SPELLED = (
    (r"µ|μ", "u"),
    (r"\(.*\)|\s", ""),
    (r"tokens?", "tok"),
    (r"samples?|sequences?|seqs?", "sample"),
    (r"elem(ent)?s?", "elem"),
    (r"_?per_?", "/"),
    (r"microsec(onds?)?|usecs?", "us"),
    (r"millisec(onds?)?|msecs?", "ms"),
    (r"seconds?|secs?", "s"),
    (r"minutes?|mins", "min"),
    (r"hours?|hrs?", "h"),
    (r"days?", "days"),
    (r"flops?(/s)?", "flop/s"),
    (r"/(gpu|device|chip)", "/device"),
    (r"percent", "%"),
)
# Bytes per second and device between nodes where a table does not say: one network card of its time for each device.
_NETWORK = {"hopper": 50e9, "blackwell": 50e9, "volta": 12.5e9}

_MODELS = {
    "llama-70b": "llama-3.1-70b",
    "llama-8b": "llama-3.1-8b",
    "llama-7b": "llama-2-7b",
    "llama-13b": "llama-2-13b",
    "bloom": "bloom-176b",
}
# What follows a model's name and does not change its graph: tuning, date, format.
_VARIANT = re.compile(
    r"-(instruct|chat|hf|it|base|thinking|\d+k|v0\.\d|2[45]\d\d|0\d{3}"
    r"|fp8|fp4|nvfp4|mxfp4|bf16|fp16|int8|int4|[48]bit|bnb|awq|gptq|gguf|dynamic|quantized|w\d+a\d+)(?=[-.]|$)(\.w\d+a\d+)?"
)


class NotCovered(NarrowsError):
    """A row that is sound, but that the model does not reach: it is counted, with this reason."""


@dataclass(frozen=True)
class Forecast:
    """What the model says about one measured figure: prediction and 80 % interval in SI units, and where it belongs.

    name       the set it is counted in
    measured   the figure, in the same unit as `predicted`
    group      rows of one group are rival configurations of one job: the best of them is the choice that regret judges
    best       min or max: which of the figures of a group is the best
    key        which fitted residuals give the interval (see `interval`)
    bound      what the datasheet's peaks allow at best: the null model is this, times one constant for the set
    place      the machine, and what else decides whether the constants of `key` were fitted on such a case
    """

    name: str
    measured: float
    predicted: float
    key: str
    bound: float
    place: str
    group: str = ""
    best: str = "min"

    @property
    def inside(self) -> bool:
        """Whether rows of the same key and place were among the fitted ones."""
        return self.place in fitted()["seen"].get(self.key, ())


def read(path: Path) -> list[Row]:
    """The rows of a CSV file with a header, its columns in lower case; raises NarrowsError for one that cannot be read."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval=None, skipinitialspace=True)
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
            return list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise NarrowsError(f"cannot be read ({error}).", where=str(path), remedy="Give a CSV file in UTF-8.") from error


def number(row: Row, column: str, *, zero: bool = False) -> float:
    """A cell as a finite number above zero; raises NarrowsError that names the column."""
    text = (row.get(column) or "").strip()
    try:
        found = math.nan if "_" in text else float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found) or found < 0 or (found == 0 and not zero):
        raise NarrowsError(f"{text[:40]!r} is not a number above zero.", where=column, remedy="Write the measured figure.")
    return found


def count(row: Row, column: str, default: int | None = None) -> int:
    """A cell as a whole number of at least 1; an empty one is the default."""
    if default is not None and not (row.get(column) or "").strip():
        return default
    found = number(row, column)
    if found != int(found) or found > 1e9:
        raise NarrowsError(f"{row[column]!r} is not a whole number.", where=column, remedy="Write a count.")
    return int(found)


def unit(text: str) -> str:
    """A unit in the spelling of these tables: `tokens/sec` is `tok/s`, `TFLOPS` is `tflop/s`."""
    found = text.strip().lower()
    for pattern, plain in _SPELLED:
        found = re.sub(pattern, plain, found)
    return found


def seconds(row: Row) -> float:
    """The value of a row whose unit is a time, in seconds."""
    if unit(row["unit"]) not in UNITS:
        raise NarrowsError(f"{row['unit'][:40]!r} is not a unit of time.", where="unit", remedy=f"Use {', '.join(UNITS)}.")
    return number(row, "value") * UNITS[unit(row["unit"])]


def rate(row: Row, units: Mapping[str, float]) -> float:
    """The value of a row whose unit is one of `units` (as `unit` spells them), in SI units."""
    factor = units.get(unit(row["unit"]))
    if factor is None:
        problem = f"{row['unit'][:40]!r} is not a unit of {row['metric'][:40]}."
        raise NarrowsError(problem, where="unit", remedy=f"Use {', '.join(units)}.")
    return number(row, "value") * factor


@cache
def hardware(text: str, column: str = "hardware") -> Machine:
    """The bundled machine that a published name means; raises NarrowsError for hardware that is not known."""
    low = re.sub(r"[\s_-]+", " ", text.lower()).strip()
    found = next((name for pattern, name in _HARDWARE if re.search(pattern, low)), low.replace(" ", "-"))
    if found not in machines():
        raise NarrowsError(
            f"there is no machine {text[:60]!r}.", where=column, remedy="`narrows machines` lists those there are."
        )
    return machine(found)


def network_bytes_per_s(here: Machine) -> float:
    """Bytes per second and device between nodes, where a table does not say: an assumption by generation."""
    return _NETWORK.get(generation(here.name), 25e9)


def model(text: str, column: str = "model") -> str:
    """The bundled model that a published name means ('meta-llama/Llama-3.1-8B-Instruct' is llama-3.1-8b)."""
    low = re.sub(r"[\s_]+", "-", text.strip().lower().split("/")[-1])
    low = re.sub(r"^deepseek-r1-distill-(llama|qwen)-", r"\1-", low)
    low = re.sub(r"^(meta-llama|meta-llama-|llama)-?(?=\d)", "llama-", low)
    low = _VARIANT.sub("", low)
    low = re.sub(r"^llama-3(\.3)?-(\d+b)", r"llama-3.1-\2", _MODELS.get(low, low))
    low = re.sub(r"^deepseek-(r1|v3)\b.*", "deepseek-v3", low)
    if low not in bundled():
        raise NotCovered(f"the model {text[:60]!r} is not among the bundled ones.", where=column, remedy="See `narrows models`.")
    return low


@cache
def graph_of(name: str) -> Graph:
    """A bundled model's graph, read once."""
    return capture(name)


def fingerprint(row: Row) -> str:
    """Twelve characters that tell a row from every other: how fitted rows are known again. Empty cells do not count."""
    text = "\x1f".join(f"{k}={v}" for k, v in sorted((k, v) for k, v in row.items() if k and isinstance(v, str) and v))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def configuration(row: Row) -> tuple[str, ...]:
    """What was measured, without the results: two figures of one run, and repeats of it, have the same.

    Of a closed loop, all layouts of one job count as one; of a collective, its formats.
    """
    if "silicon_ttft_ms" in row:
        return tuple(
            row.get(k, "") for k in ("backend", "model_path", "system", "mode", "isl", "osl", "concurrency", "batch_size")
        )
    if "prompt_size" in row:
        return tuple(row.get(k, "") for k in ("model", "prompt_size", "batch_size", "token_size", "tensor_parallel"))
    if "recompute" in row:
        said = re.findall(r"(hidden|layers|heads|schedule|method|vocab|PTD|Flash\w+)[ =]*([\w-]*)", row.get("note") or "")
        kept = (
            "source",
            "model",
            "hardware",
            "n_devices",
            "tp",
            "pp",
            "dp",
            "microbatch",
            "global_batch",
            "seq",
            "precision",
            "recompute",
        )
        return (*(row.get(k, "") for k in kept), repr(said))
    return tuple(
        row.get(k, "")
        for k in (
            "model",
            "hardware",
            "n_devices",
            "phase",
            "batch",
            "prompt",
            "output",
            "note" if row.get("phase") == "collective" else "phase",
        )
    )


def digest(configuration: tuple[str, ...]) -> bytes:
    """Bytes by which configurations are dealt into parts."""
    return hashlib.sha256(repr(configuration).encode()).digest()


def half(row: Row) -> int:
    """0 for rows that constants are fitted on, 1 for those that are held back: an even split of configurations by hash."""
    return digest(configuration(row))[0] % 2
