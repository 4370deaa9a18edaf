"""Training: published step times, tokens or FLOP per second, of GPT-like decoders on one to thousands of devices."""

import re
from dataclasses import replace

from narrows.costmodel import generation
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.layout import RECOMPUTE, Layout
from narrows.machine import Cluster, Link, Machine
from narrows.measured.published import Shape, decoder
from narrows.measured.table import Forecast, NotCovered, Row, count, hardware, network_bytes_per_s, number, rate, seconds
from narrows.simulate.memory import Memory, memory, stages
from narrows.simulate.network import Axes, network
from narrows.simulate.training import step_seconds

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
OPTIONAL = ("source", "params", "cp_or_ep", "microbatch", "precision", "recompute", "note")

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
# What is no decoder of plain layers: it is not forecast from its number of parameters.
_OTHERS = re.compile(
    r"resnet|vgg|amoeba|inception|efficientnet|u-?net|diffusion|dlrm|lstm|swin|vit\b|clip|mixtral|moe|t5|whisper", re.I
)
_RECOMPUTE = {"": "none", "no": "none", "false": "none", "off": "none", "yes": "full", "true": "full", "on": "full"}
_SCHEDULES = {"ZB-2p": "zb-2p", "ZB-1p": "zb-1p", "ZBV": "zb-v", "ZB-V": "zb-v"}
PEAKS = ("peak_memory", "gpu_memory", "activation_memory_relative")
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
    "days_for_300b_tokens",
)


def forecast(row: Row) -> list[Forecast]:
    """The forecast of a row of this schema, in seconds of a step or bytes of a device; raises NarrowsError naming the column."""
    metric, note = row["metric"].strip().lower(), row.get("note") or ""
    if metric not in (*_TIMES, *_RATES, *PEAKS):
        raise NotCovered(
            f"{metric[:40]!r} is not a time, a rate or a peak of memory.", where="metric", remedy="Those of a step are judged."
        )
    if metric == "activation_memory_relative":
        return [_relative_forecast(row)]
    if metric.startswith("layer_"):
        raise NotCovered("the time of a part of a layer is not forecast.", where="metric", remedy="Give the time of a step.")
    if re.search(r"Offl=Y|offload True|cpu offload", note, re.I):
        raise NotCovered("offloading to the host is not modelled.", where="note", remedy="Judge rows without it.")
    if row["precision"].strip() and not re.search(r"16|amp|mixed|half", row["precision"], re.I):
        raise NotCovered("training is modelled in 16 bits.", where="precision", remedy="Judge rows in fp16 or bf16.")
    machine, devices = hardware(row["hardware"]), count(row, "n_devices")
    shape, known = _shape(row)
    sequence = count(row, "seq")
    layout, batch = _layout(row, shape, devices, machine)
    framework, graph, cluster = _framework(row), decoder(shape, sequence), _cluster(row, machine)
    if metric in PEAKS:
        return [_memory_forecast(row, graph, cluster, layout, sequence, framework, known)]
    measured = _step(row, metric, layout, shape, batch, sequence, machine)
    found = step_seconds(graph, cluster, layout, sequence, framework)
    name = _name(row)
    group = (
        f"{row['source'][:40]} {row['model']} {devices} {batch} {sequence}"
        if name != "training-single-node"
        else f"{row['model']} {devices} {batch} {sequence}"
    )
    ideal = _flop(shape, batch, sequence) * (4 / 3 if layout.recompute == "full" else 1) / machine.peak("fp16") / devices
    bound = ideal * (1 + (layout.pipeline - 1) / layout.accumulate)
    key = f"training-{framework or ('node' if name == 'training-single-node' else 'cluster')}-{generation(machine.name)}"
    return [Forecast(name, measured, sum(found.values()), key, bound, machine.name if known else "another shape", group)]


def _flop(shape: Shape, batch: int, sequence: int) -> float:
    """FLOP of a step, forward and backward, without the causal mask's saving (Narayanan et al., SC 2021, equation 3)."""
    h, deep = shape.hidden, shape.layers
    return 72 * batch * sequence * deep * h**2 * (1 + sequence / (6 * h) + shape.vocabulary / (12 * deep * h))


def sets(row: Row) -> tuple[str, ...]:
    """The set that a row is counted in."""
    return ("training-memory" if row["metric"].strip().lower() in PEAKS else _name(row),)


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
    if _OTHERS.search(row["model"]):
        problem = f"{row['model'][:40]!r} is no decoder of plain layers."
        raise NotCovered(problem, where="model", remedy="Judge rows of GPT-like models.")
    params = _params(row)
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


def _params(row: Row) -> float:
    """The number of parameters that a row gives, or that its model is named after; 0 where neither does."""
    text = (row.get("params") or "").strip()
    size = re.search(r"(?:^|[-_ ])(\d+(?:\.\d+)?) ?([bm])(?:$|[-_ ])", text or row["model"], re.I)
    if size:
        return float(size[1]) * {"b": 1e9, "m": 1e6}[size[2].lower()]
    return number(row, "params") if text else 0.0


def _layout(row: Row, shape: Shape, devices: int, machine: Machine) -> tuple[Layout, int]:
    note = row.get("note") or ""
    pipeline, others = count(row, "pp", 1), re.search(r"\d+", row["cp_or_ep"])
    if others and int(others[0]) > 1:
        raise NotCovered("context and expert parallelism are not modelled.", where="cp_or_ep", remedy="Judge rows without.")
    # what a table leaves out follows from the others: replicas, else the devices that share a replica
    tensor = count(row, "tp", max(1, devices // (pipeline * count(row, "dp", devices))))
    data = count(row, "dp", max(1, devices // (tensor * pipeline)))
    micro_given = (row.get("microbatch") or "").strip()
    steady = row["metric"].strip().lower() in PEAKS  # the peak is that of a pipeline with microbatches enough
    known = (row.get("global_batch") or "").strip() or "FlashAttention" in note or "playbook" in row["source"]
    if not known and not steady:
        raise NotCovered(
            "the batch of a step is not given.", where="global_batch", remedy="Give it: bubble and exchange depend on it."
        )
    usual = count(row, "microbatch", 4) * (4 * pipeline if steady else 1)
    batch = count(row, "global_batch", data * usual)
    micro = count(row, "microbatch", max(1, batch // data))
    if tensor * pipeline * data != devices:
        raise NotCovered(
            f"{tensor} x {pipeline} x {data} is not {devices} devices.", where="n_devices", remedy="Check tp, pp and dp."
        )
    if shape.heads % tensor and shape.hidden % tensor:
        raise NotCovered(f"{shape.heads} heads do not divide over {tensor}.", where="tp", remedy="Check the shape.")
    many = max(1, round(batch / (data * micro)))
    if not micro_given and batch // data > 16:  # nobody keeps that many sequences: a usual microbatch is assumed
        micro, many = 16, max(1, round(batch / data / 16))
    chunks, part = re.search(r"interleaved m=(\d+)", note), re.search(r"(\d+) layers/virtual stage", note)
    schedule = re.search(r"schedule ([\w-]+)", note)
    sharded, stage = bool(re.search(r"FULL_SHARD|ZeRO-3|Zero=3|SHARD_GRAD", note)), re.search(r"Zero=(\d)", note)
    held = 4 * 12 * shape.layers * shape.hidden**2  # weights and gradients in 16 bits
    if tensor * pipeline == 1 and not (sharded or stage) and held > machine.memory.capacity_bytes:
        problem = f"{held / 1e9:.0f} GB of weights and gradients do not fit one device, and how they are cut is not said."
        raise NotCovered(problem, where="tp", remedy="Give tp and pp, or ZeRO-3 in the note.")
    word = schedule[1] if schedule else ""
    interleave = int(chunks[1]) if chunks else max(1, shape.layers // pipeline // int(part[1])) if part else 1
    if word == "1F1B-I":
        interleave = max(1, shape.layers // pipeline)
    recompute = row["recompute"].strip().lower()
    recompute = _RECOMPUTE.get(recompute, recompute)
    if not re.match(r"none|full|selective|seqpar", recompute):
        raise NarrowsError(
            f"{recompute[:40]!r} is not a kind of recomputation.", where="recompute", remedy="Use none, selective or full."
        )
    kind = "full" if recompute.startswith("full") else "selective" if recompute.startswith("selective") else "none"
    # what evens out the output layer: layers moved away from the last stage, or its own work spread over all
    vocabulary, moved = re.search(r"method (vocab|interlaced)", note), "method redis" in note or "schedule" in note
    return Layout(
        tensor=tensor,
        sequence=tensor > 1 and ("seqpar" in recompute or "TP+SP" in note),
        data=data,
        shard=int(stage[1]) if stage else 3 if sharded else int("bigscience" in row["source"]),
        overlap=sharded,
        pipeline=pipeline,
        chunks=interleave if pipeline > 1 else 1,
        schedule=_SCHEDULES.get(word, "1f1b"),
        balance="layers" if moved else "vocabulary" if vocabulary else "none",
        microbatch=micro,
        accumulate=many,
        recompute=kind,
    ), batch


def _framework(row: Row) -> str:
    """Whose constants count: those of FSDP, of DeepSpeed, or of Megatron-LM."""
    if "foundry" in row["source"]:
        return "fsdp"
    return "deepspeed" if re.search(r"bigscience|deepspeed|ZeRO-3", row["source"] + (row.get("note") or ""), re.I) else ""


def _relative_forecast(row: Row) -> Forecast:
    """What a layer keeps for its backward pass, as a share of what it keeps under tensor parallelism alone."""
    if row["unit"].strip() != "% of TP baseline":
        raise NarrowsError(f"{row['unit'][:40]!r} is not its unit.", where="unit", remedy="Use % of TP baseline.")
    machine, sequence, said = hardware(row["hardware"]), count(row, "seq"), row["recompute"].strip().lower()
    if said == "none":
        raise NotCovered("it is the baseline itself.", where="recompute", remedy="Judge the rows beside it.")
    plain = Layout(tensor=count(row, "tp"))
    redo = next((kind for kind in ("selective", "full") if kind in said), "none")
    layout = replace(plain, sequence="seqpar" in said, recompute=redo)
    graph, cluster = decoder(_shape(row)[0], sequence), _cluster(row, machine)
    kept, base = (network(graph, cluster, one, sequence).layer.saved[:, 0] for one in (layout, plain))
    share = float(kept[RECOMPUTE.index(redo)] / base[RECOMPUTE.index("none")])
    return Forecast("training-memory", number(row, "value") / 100, share, "memory", 1.0, machine.name)


def _memory_forecast(
    row: Row, graph: Graph, cluster: Cluster, layout: Layout, sequence: int, framework: str, known: bool
) -> Forecast:
    """Bytes of the device that holds most. A profiler of tensors does not see what nvidia-smi does; both count in 2**30."""
    if row["unit"].strip() not in ("GB", "GiB"):
        raise NarrowsError(f"{row['unit'][:40]!r} is not a unit of memory.", where="unit", remedy="Use GB or GiB.")
    most = _fullest(graph, cluster, layout, sequence, framework)
    shown = min(cluster.machine.memory.capacity_bytes, float(most.total + most.cached))
    found = shown if "nvidia-smi" in (row.get("note") or "") else most.allocated
    least = float(most.weights + most.gradients + most.optimizer)
    place = cluster.machine.name if known else "another shape"
    return Forecast("training-memory", number(row, "value") * 2**30, float(found), "memory", least, place)


def _fullest(graph: Graph, cluster: Cluster, layout: Layout, sequence: int, framework: str) -> Memory:
    """What the rank holds that holds most."""
    net, axes = network(graph, cluster, layout, sequence, framework=framework), Axes.of(layout)
    return max((memory(net, layout, axes, stage, framework) for stage in stages(layout)), key=lambda rank: float(rank.total))


def room(row: Row) -> tuple[float, float]:
    """Bytes that the fullest device of a row's run needs, and that it has; NotCovered as for `forecast`."""
    machine, shape, sequence = hardware(row["hardware"]), _shape(row)[0], count(row, "seq")
    layout, _ = _layout({**row, "metric": PEAKS[0]}, shape, count(row, "n_devices"), machine)
    graph, cluster = decoder(shape, sequence), _cluster(row, machine)
    small = re.search(r"(\d+)GB node", row.get("note") or "")
    has = int(small[1]) * 2**30 if small else machine.memory.capacity_bytes
    return float(_fullest(graph, cluster, layout, sequence, _framework(row)).total), has


def _step(row: Row, metric: str, layout: Layout, shape: Shape, batch: int, sequence: int, machine: Machine) -> float:
    """Whatever a row gives, as seconds of one step."""
    if metric in _TIMES:
        return seconds(row)
    tokens = batch * sequence
    model = _flop(shape, batch, sequence)
    done = model * (
        4 / 3
        if metric in ("tflops_per_gpu", "hfu", "aggregate_pflops")
        and layout.recompute == "full"
        and "model flops" not in (row.get("note") or "")
        else 1
    )
    devices = layout.devices
    peak = machine.peak("fp16") * devices
    known = {  # the unit, and seconds of a step at one of it
        "tflops_per_gpu": ({"tflop/s": 1.0, "tflop/s/device": 1.0}, done / (1e12 * devices)),
        "aggregate_pflops": ({"pflop/s": 1.0}, done / 1e15),
        "tokens_per_s_per_gpu": ({"tok/s": 1.0, "tok/s/device": 1.0}, tokens / devices),
        "samples_per_s_per_gpu": ({"sample/s": 1.0, "sample/s/device": 1.0}, batch / devices),
        "tokens_per_s": ({"tok/s": 1.0}, tokens),
        "samples_per_s": ({"sample/s": 1.0}, batch),
        "mfu": ({"%": 0.01, "fraction": 1.0}, model / peak),
        "hfu": ({"%": 0.01, "fraction": 1.0}, done / peak),
    }
    if metric == "days_for_300b_tokens":
        return seconds(row) * tokens / 300e9
    units, at_one = known[metric]
    return float(at_one / rate(row, units))


def _cluster(row: Row, machine: Machine) -> Cluster:
    """Nodes of the row's machine, as many as it takes, with the network that the row names or that is usual."""
    text = row["hardware"]
    each = re.search(r"(\d+) ?/ ?node", text)
    many = int(each[1]) if each else 16 if "DGX-2" in text else 8
    speed = 4 * 12.5e9 / many if re.search(r"omni|Jean Zay", text, re.I) else network_bytes_per_s(machine)
    link = machine.link or machine.host_link
    if link is None:
        raise NotCovered(f"{machine.name} has no link to others.", where="hardware", remedy="Judge rows of linked devices.")
    network = Link("network", speed, 3 * link.latency_seconds)
    return Cluster(machine.name, machine.title, machine, many, 2**20, link, network, "switch", {})
