"""Training: published step times, tokens or FLOP per second, of GPT-like decoders on one to thousands of devices."""

import re

from narrows.costmodel import generation
from narrows.errors import NarrowsError
from narrows.machine import Machine
from narrows.measured.table import Forecast, NotCovered, Row, count, hardware, number, seconds
from narrows.simulate.training import Fabric, Shape, Split, step_seconds

COLUMNS = (
    "source",
    "model",
    "params",
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
    "metric",
    "value",
    "unit",
    "note",
)

# Shapes of published models (hidden, layers, heads). The tables that are read state those of SC21 table 1, arXiv 2205.05198
# and arXiv 2401.10241 in part; the others are the usual ones of these names. Those of gpt3-1.3b (heads) and of the
# Llama-like 3B are assumptions.
_SHAPES = {
    "gpt-1.7b": (2304, 24, 24),
    "gpt-3.6b": (3072, 30, 32),
    "gpt-7.5b": (4096, 36, 32),
    "gpt-18b": (6144, 40, 48),
    "gpt-39b": (8192, 48, 64),
    "gpt-76b": (10240, 60, 80),
    "gpt-145b": (12288, 80, 96),
    "gpt-175b": (12288, 96, 96),
    "gpt-3 175b": (12288, 96, 96),
    "gpt-310b": (16384, 96, 128),
    "gpt-530b": (20480, 105, 128),
    "mt-nlg 530b": (20480, 105, 128),
    "gpt-1t": (25600, 128, 160),
    "1t": (25600, 128, 160),
    "22b": (6144, 48, 64),
    "gpt-1b": (1536, 40, 16),
    "gpt-2b": (1920, 54, 20),
    "gpt-4b": (2304, 64, 24),
    "gpt-8b": (3072, 72, 32),
    "gpt-1.5b": (2304, 22, 24),
    "gpt-6.2b": (4096, 30, 32),
    "gpt-14.6b": (5120, 46, 40),
    "gpt-28.3b": (6144, 62, 48),
    "gpt3-1.3b": (2048, 24, 16),
    "gpt3-2.7b": (2560, 32, 32),
    "gpt-1.3b": (2048, 24, 16),
    "mpt-125m": (768, 12, 12),
    "mpt-350m": (1024, 24, 16),
    "mpt-760m": (1536, 24, 12),
    "mpt-1b": (2048, 24, 16),
    "mpt-3b": (2560, 32, 20),
    "mpt-7b": (4096, 32, 32),
    "mpt-13b": (5120, 40, 40),
    "mpt-30b": (7168, 48, 56),
    "mpt-70b": (8192, 80, 64),
    "llama-like 3b": (3072, 28, 24),
}
# The share of the 1F1B bubble that a schedule leaves once 2 p - 1 microbatches are there to fill it: an approximation of
# arXiv 2401.10241, table 5.
_BUBBLE = {"ZB-2p": 0.02, "ZB-1p": 0.35, "ZBV": 0.02, "ZB-V": 0.02}
_TIMES = ("iteration_time", "step_time", "layer_forward", "layer_backward", "layer_total")
_RATES = (
    "tflops_per_gpu",
    "tokens_per_s_per_gpu",
    "samples_per_s_per_gpu",
    "tokens_per_s",
    "samples_per_s",
    "mfu",
    "hfu",
    "aggregate_pflops",
    "days_for_300B_tokens",
)


def forecast(row: Row) -> list[Forecast]:
    """The model's forecast of a row of this schema, as seconds of a step; raises NarrowsError that names the column."""
    metric, note = row["metric"].strip(), row.get("note") or ""
    if metric not in _TIMES + _RATES:
        raise NotCovered(
            f"{metric[:40]!r} is not a time or a rate.", where="metric", remedy="Times and rates of a step are judged."
        )
    if metric.startswith("layer_"):
        raise NotCovered("the time of a part of a layer is not forecast.", where="metric", remedy="Give the time of a step.")
    if re.search(r"Offl=Y|offload True|cpu offload", note, re.I):
        raise NotCovered("offloading to the host is not modelled.", where="note", remedy="Judge rows without it.")
    machine, devices = hardware(row["hardware"]), count(row, "n_devices")
    shape, known = _shape(row)
    sequence = count(row, "seq")
    split, batch = _split(row, shape, devices)
    measured = _step(row, metric, shape, batch, sequence, devices, machine)
    found = step_seconds(shape, machine, _fabric(row, machine), split, sequence)
    name = _name(row)
    group = (
        f"{row['source'][:40]} {row['model']} {devices} {batch} {sequence}"
        if name != "training-single-node"
        else f"{row['model']} {devices} {batch} {sequence}"
    )
    ideal = _flop(shape, batch, sequence) * (4 / 3 if split.recompute == "full" else 1) / machine.peak("fp16") / devices
    bound = ideal * (1 + (split.pipeline - 1) / split.microbatches)
    key = f"training-{split.framework or ('node' if name == 'training-single-node' else 'cluster')}-{generation(machine.name)}"
    return [
        Forecast(name, measured, sum(found.values()), key, bound, group, inside=known and generation(machine.name) == "ampere")
    ]


def _flop(shape: Shape, batch: int, sequence: int) -> float:
    """FLOP of a step, forward and backward, without the causal mask's saving (Narayanan et al., SC 2021, equation 3)."""
    h, deep = shape.hidden, shape.layers
    return 72 * batch * sequence * deep * h**2 * (1 + sequence / (6 * h) + shape.vocabulary / (12 * deep * h))


def sets(row: Row) -> tuple[str, ...]:
    """The set that a row is counted in."""
    return (_name(row),)


def _name(row: Row) -> str:
    source = row["source"]
    if "SC21 Table 1" in source:
        return "training-sc21"
    if "bigscience/" in source or "bigscience " in source:
        return "training-tuning-log" if "prequel" in source else "training-v100-log"
    if "llm-foundry" in source:
        return "training-llm-foundry"
    if "vTrain" in source:
        return "training-single-node" if "single" in source else "training-multi-node"
    return "training-other"


def _sizes(text: str) -> dict[str, int]:
    """hidden, layers and heads as far as a name or a note says them."""
    found = {}
    for key, pattern in (
        ("hidden", r"(?:hidden|\bh) ?(\d{3,6})"),
        ("layers", r"(?:\blayers|\bL) ?(\d{1,3})\b(?!/)"),
        ("heads", r"(?:\bheads|\ba) ?(\d{1,3})\b"),
    ):
        match = re.search(pattern, text)
        if match:
            found[key] = int(match[1])
    many, deep = re.search(r"(\d+) heads", text), re.search(r"(\d+) layers(?!/)", text)
    return {**({"heads": int(many[1])} if many else {}), **({"layers": int(deep[1])} if deep else {}), **found}


def _shape(row: Row) -> tuple[Shape, bool]:
    """The decoder of a row, and whether the table states its shape or its name is known; else one of common proportions."""
    note = row.get("note") or ""
    said = _sizes(f"{row['model']}; {note}")
    base = _SHAPES.get(re.sub(r" one layer$", "", row["model"].strip().lower()))
    vocabulary = re.search(r"vocab (\d+)(k?)", note)
    size = (
        (int(vocabulary[1]) * (1024 if vocabulary[2] else 1))
        if vocabulary
        else 50368
        if row["model"].startswith("MPT")
        else 51200
    )
    fused = bool(re.search(r"foundry|playbook|VocabularyParallelism", row["source"])) or (
        "FlashAttention" in note and "no Flash" not in note
    )
    if base and "hidden" not in said:
        return Shape(*base, size, fused), True
    params = number(row, "params") if (row.get("params") or "").strip() else 0.0
    hidden = said.get("hidden") or (128 * max(1, round((params * 128 / 12) ** (1 / 3) / 128)) if params else 0)
    if not hidden:
        raise NotCovered(
            f"the shape of {row['model'][:40]!r} is not known.", where="model", remedy="Write h, L and a, like GPT h1024 L24 a16."
        )
    layers = said.get("layers") or (max(1, round(params / 12 / hidden**2)) if params else 0)
    if not layers:
        raise NotCovered("neither layers nor parameters are given.", where="params", remedy="Give one of them.")
    fitting = [h for h in (64, 80, 48, 32, 40, 16) if hidden % h == 0 and 64 <= hidden // h <= 256]
    usual = next((h for even in (8, 4, 1) for h in fitting if hidden // h % even == 0), 0)
    heads = said.get("heads") or usual
    if not heads or hidden % heads:
        raise NotCovered(f"{heads} heads do not divide {hidden}.", where="note", remedy="Give the number of heads.")
    return Shape(hidden, layers, heads, size, fused), bool(said)


def _split(row: Row, shape: Shape, devices: int) -> tuple[Split, int]:
    note = row.get("note") or ""
    tensor, pipeline = count(row, "tp", 1), count(row, "pp", 1)
    data = count(row, "dp", max(1, devices // (tensor * pipeline)))
    micro_given = (row.get("microbatch") or "").strip()
    if not (row.get("global_batch") or "").strip() and "FlashAttention" not in note and "playbook" not in row["source"]:
        raise NotCovered(
            "the batch of a step is not given.", where="global_batch", remedy="Give it: bubble and exchange depend on it."
        )
    batch = count(row, "global_batch", data * count(row, "microbatch", 4))
    micro = count(row, "microbatch", max(1, batch // data))
    if tensor * pipeline * data > devices * 1.5 or (tensor > 1 and shape.heads % tensor and shape.hidden % tensor):
        raise NotCovered(
            f"{tensor} x {pipeline} x {data} is not {devices} devices.", where="n_devices", remedy="Check tp, pp and dp."
        )
    many = max(1, round(batch / (data * micro)))
    if not micro_given and batch // data > 16:  # nobody keeps that many sequences: a usual microbatch is assumed
        micro, many = 16, max(1, round(batch / data / 16))
    chunks, part = re.search(r"interleaved m=(\d+)", note), re.search(r"(\d+) layers/virtual stage", note)
    schedule = re.search(r"schedule ([\w-]+)", note)
    word = schedule[1] if schedule else ""
    interleave = int(chunks[1]) if chunks else max(1, shape.layers // pipeline // int(part[1])) if part else 1
    if word == "1F1B-I":
        interleave = max(1, shape.layers // pipeline)
    recompute = row["recompute"].strip().lower()
    if recompute and not re.match(r"none|full|selective", recompute):
        raise NarrowsError(
            f"{recompute[:40]!r} is not a kind of recomputation.", where="recompute", remedy="Use none, selective or full."
        )
    kind = "full" if recompute.startswith("full") else "selective" if recompute.startswith("selective") else "none"
    return Split(
        tensor,
        pipeline,
        data,
        micro,
        many,
        interleave,
        kind,
        sharded=bool(re.search(r"FULL_SHARD|ZeRO-3|Zero=3|SHARD_GRAD", note)),
        bubble=max(_BUBBLE.get(word, 1.0), 1 - many / (2 * pipeline - 1)) if word in _BUBBLE else 1.0,
        even="layers"
        if "method redis" in note or "schedule" in note
        else "output"
        if re.search(r"method (vocab|interlaced)", note)
        else "",
        sequence_parallel="seqpar" in recompute or "TP+SP" in note,
        framework="fsdp"
        if "foundry" in row["source"]
        else "deepspeed"
        if re.search(r"bigscience|deepspeed|ZeRO-3", row["source"] + note, re.I)
        else "",
    ), batch


def _step(row: Row, metric: str, shape: Shape, batch: int, sequence: int, devices: int, machine: Machine) -> float:
    """Whatever a row gives, as seconds of one step."""
    if metric in _TIMES:
        return seconds(row)
    value, tokens = number(row, "value"), batch * sequence
    model = _flop(shape, batch, sequence)
    done = model * (
        4 / 3
        if metric in ("tflops_per_gpu", "hfu", "aggregate_pflops")
        and row["recompute"].startswith("full")
        and "model flops" not in row["note"]
        else 1
    )
    known = {
        "tflops_per_gpu": ("TFLOP/s", done / (value * 1e12 * devices)),
        "aggregate_pflops": ("PFLOP/s", done / (value * 1e15)),
        "tokens_per_s_per_gpu": ("tok/s", tokens / (value * devices)),
        "samples_per_s_per_gpu": ("sample/s", batch / (value * devices)),
        "tokens_per_s": ("tok/s", tokens / value),
        "samples_per_s": ("sample/s", batch / value),
        "mfu": ("%", model / (value / 100 * machine.peak("fp16") * devices)),
        "hfu": ("%", done / (value / 100 * machine.peak("fp16") * devices)),
        "days_for_300B_tokens": ("days", value * 86400 * tokens / 300e9),
    }
    unit, time = known[metric]
    if row["unit"].strip() != unit:
        raise NarrowsError(f"{row['unit'][:40]!r} is not the unit of {metric}.", where="unit", remedy=f"Use {unit}.")
    return float(time)


def _fabric(row: Row, machine: Machine) -> Fabric:
    text = row["hardware"]
    each = re.search(r"(\d+) ?/ ?node", text)
    many = int(each[1]) if each else 16 if "DGX-2" in text else 8
    if re.search(r"omni", text, re.I):
        return Fabric(many, 4 * 12.5e9 / many)
    if "Jean Zay" in text:
        return Fabric(many, 4 * 12.5e9 / many)
    return Fabric(many, {"hopper": 50e9, "blackwell": 50e9, "volta": 12.5e9}.get(generation(machine.name), 25e9))
