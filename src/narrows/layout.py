"""How a training step is laid out over devices: one plan object that is read, printed, checked, simulated, emitted and run."""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from narrows.errors import NarrowsError, closest
from narrows.graph import Graph, Op, Size
from narrows.parallel import layer_count

FORMAT = "narrows-train-1"
RECOMPUTE = ("none", "selective", "full")
CONTEXT = ("ring", "ulysses")
OFFLOAD = ("none", "optimizer", "activations", "both")
TIERS = ("host", "disk")
BALANCE = ("none", "layers", "vocabulary")
FRAMEWORKS = ("megatron", "deepspeed", "fsdp")
# Names that the frameworks use for the same numbers; a field's own name works as well.
ALIASES = {
    "tp": "tensor", "sp": "sequence", "cp": "context", "ep": "expert", "dp": "data", "zero": "shard", "pp": "pipeline",
    "vpp": "chunks", "mb": "microbatch", "ga": "accumulate",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Schedule:
    """A pipeline schedule in closed form, for equal stages whose backward pass takes twice the forward.

    bubble   share of the 1F1B bubble, (stages - 1) microbatches, that it leaves where 2 p - 1 microbatches fill it
    held     microbatches whose activations a stage s of p keeps at its peak, given chunks v and microbatches m
    """

    bubble: float
    held: Callable[[Any, Any, Any, Any], Any]


def _one_by_one(p: Any, v: Any, m: Any, s: Any) -> Any:
    """1F1B's warm-up; interleaved, that of Megatron-LM, of which each chunk is a part of a stage."""
    return (v > 1) * (2 * (p - s - 1) + (v - 1) * p + 1) / v + (v == 1) * (p - s)


# From zb-1p on: Qi et al., Zero Bubble (arXiv 2401.10241, sections 2 and 4) and Controllable Memory (arXiv 2405.15362,
# table 1), for equal forward, backward and weight-gradient times; the shares left by zb-1p, zb-2p and zb-v are measured.
SCHEDULES = {
    "1f1b": Schedule(1.0, _one_by_one),
    "gpipe": Schedule(1.0, lambda p, v, m, s: m),
    "zb-1p": Schedule(0.35, lambda p, v, m, s: p),
    "zb-2p": Schedule(0.02, lambda p, v, m, s: 2 * p - 1),
    "zb-v": Schedule(0.02, lambda p, v, m, s: p),
    "v-half": Schedule(0.5, lambda p, v, m, s: p / 2 + 1),
    "v-min": Schedule(2 / 3, lambda p, v, m, s: p / 3 + 4 / 3),
}
_CHOICES = {
    "shard": (0, 1, 2, 3), "context_by": CONTEXT, "schedule": tuple(SCHEDULES), "balance": BALANCE, "recompute": RECOMPUTE,
    "offload": OFFLOAD, "offload_to": TIERS, "gradient_bits": (1, 8, 16, 32),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each part of a training step runs. Devices lie tensor innermost, then context, data and pipeline.

    tensor, sequence   devices that share every layer, and whether norms and residuals are split over them by tokens too
    context, context_by   devices that share a sequence; keys and values go round a ring, or heads are exchanged (ulysses)
    data, shard        replicas, and the ZeRO stage: 0 all-reduces gradients (DDP), 1 splits optimizer states, 2 gradients
                       too, 3 weights too (FSDP)
    expert             of the replicas, how many share the experts of one layer
    overlap            exchanges of data parallelism run beside the computation
    gradient_bits      bits of a gradient on the wire
    pipeline, chunks   stages, and interleaved parts of each
    schedule, balance  the pipeline's order; what makes up for the output layer: nothing, embedding and output counted as
                       a layer each ('layers'), or its own work spread over all stages ('vocabulary')
    microbatch, accumulate   sequences of a microbatch, and microbatches of a step and replica
    recompute, recompute_layers   what the backward pass computes again: nothing, the core of attention, or whole layers,
                       so many of each stage (0: all)
    offload, offload_to   what lies outside of the device, and where: in the host's memory, or on disk
    layers             of each stage, like 26+26+14+14 ('': all have equally many)
    groups             of a site, in the order in which devices are counted, like a100+v100 ('': all, in its own order)
    shares             replicas x microbatches in each group, like 8x6+8x2, where slower ones have fewer ('': accumulate all)

    `Layout.parse(str(layout)) == layout`. Values that contradict each other raise NarrowsError with the nearest legal ones.
    """

    tensor: int = 1
    sequence: bool = False
    context: int = 1
    context_by: str = "ring"
    data: int = 1
    shard: int = 0
    expert: int = 1
    overlap: bool = True
    gradient_bits: int = 16
    pipeline: int = 1
    chunks: int = 1
    schedule: str = "1f1b"
    balance: str = "none"
    microbatch: int = 1
    accumulate: int = 1
    recompute: str = "none"
    recompute_layers: int = 0
    offload: str = "none"
    offload_to: str = "host"
    layers: str = ""
    groups: str = ""
    shares: str = ""

    def __post_init__(self) -> None:
        for one in fields(self):
            value, known = getattr(self, one.name), _CHOICES.get(one.name)
            if known and value not in known:
                raise _wrong(one.name, f"{value!r} is not one of its values.", f"Use {', '.join(map(str, known))}.")
            kind, least = type(one.default), int(one.name != "recompute_layers")
            if type(value) is not kind or (isinstance(value, int) and not known and kind is int and value < least):
                remedy = "Give true or false." if kind is bool else f"Give a whole number from {least}."
                raise _wrong(one.name, f"it is {value!r}.", remedy)
        if self.sequence and self.tensor == 1:
            raise _wrong("sequence", "there is one device per tensor.", "Leave it out, or give tensor=2 or more.")
        if self.chunks > 1 and (self.pipeline == 1 or self.schedule != "1f1b"):
            problem = f"{self.chunks} chunks go with 1f1b over two stages or more, not {self.schedule} over {self.pipeline}."
            raise _wrong("chunks", problem, "Give chunks=1.")
        if self.data % self.expert:
            raise _wrong("expert", f"{self.data} replicas do not divide over {self.expert}.",
                         nearest("expert", self.expert, divisors(self.data)))  # fmt: skip
        if self.layers:
            self._check_layers()
        if self.shares:
            self._check_shares()
        if self.recompute_layers and self.recompute != "full":
            raise _wrong("recompute_layers", f"{self.recompute} recomputes no whole layer.", "Give recompute=full, or 0.")

    def _check_layers(self) -> None:
        if not re.fullmatch(r"[1-9]\d*(\+[1-9]\d*)*", self.layers):
            raise _wrong("layers", f"{self.layers!r} is no list of numbers.", "Write it like 26+26+14+14.")
        if len(self.split) != self.pipeline:
            problem = f"{len(self.split)} numbers for {self.pipeline} stages."
            raise _wrong("layers", problem, f"Give pipeline={len(self.split)}, or a number for each stage.")
        if self.balance == "layers":
            raise _wrong("balance", "layers are shared out by hand already.", "Give balance=none, or no layers.")

    def _check_shares(self) -> None:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(\+[1-9]\d*x[1-9]\d*)*", self.shares):
            raise _wrong("shares", f"{self.shares!r} is no list of replicas x microbatches.", "Write it like 8x6+8x2.")
        replicas, most = sum(n for n, _ in self.rounds), max(m for _, m in self.rounds)
        for field, value, legal in (
            ("data", self.data, replicas),
            ("accumulate", self.accumulate, most),
            ("pipeline", self.pipeline, 1),
        ):
            if value != legal:
                raise _wrong(field, f"it is {value}, and shares are {self.shares}.", f"Give {field}={legal}, or no shares.")
        if any(replicas % self.expert for replicas, _ in self.rounds):
            problem = f"{self.shares} parts replicas that share experts, {self.expert} at a time."
            raise _wrong("expert", problem, nearest("expert", self.expert, divisors(math.gcd(*(n for n, _ in self.rounds)))))
        if self.shard > 1:
            raise _wrong("shard", "replicas with fewer microbatches would miss their exchanges.", "Give shard=1, or no shares.")

    @property
    def rounds(self) -> tuple[tuple[int, int], ...]:
        """Replicas, and microbatches of each of these, group by group where the layout says them."""
        pairs = (part.split("x") for part in self.shares.split("+") if part)
        return tuple((int(replicas), int(many)) for replicas, many in pairs)

    @property
    def devices(self) -> int:
        """How many it takes."""
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def batch(self) -> int:
        """Sequences of a step."""
        rounds = self.rounds or ((self.data, self.accumulate),)
        return self.microbatch * sum(replicas * many for replicas, many in rounds)

    @property
    def split(self) -> tuple[int, ...]:
        """The layers of each stage, where the layout says them."""
        return tuple(int(part) for part in self.layers.split("+")) if self.layers else ()

    def __str__(self) -> str:
        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(f"{name}={str(value).lower()}" for name, value in changed) or "data=1"

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """From `tensor=8,sequence=true,pipeline=8,data=6` (or tp, sp, pp, dp, ...); an unknown name raises."""
        kinds: dict[str, Any] = {f.name: type(f.default) for f in fields(cls)}
        chosen: dict[str, Any] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            name, given, value = (p.strip() for p in part.partition("="))
            name = ALIASES.get(name, name)
            if name not in kinds:
                raise _wrong(name, "no layout has such a part.", closest(name, [*kinds, *ALIASES]))
            if name in chosen:
                raise _wrong(name, "it is given twice.", "Give it once.")
            chosen[name] = _value(name, kinds[name], value if given else "true")
        return cls(**chosen)

    def require(self, graph: Graph, *, devices: int = 0, batch: int = 0, sequence: int = 0) -> None:
        """Raises NarrowsError, with the numbers and the nearest legal choice, where a graph cannot be laid out so.

        `devices`, `batch` (sequences of a step) and `sequence` (tokens of each) are checked where they are given.
        """
        deep = layer_count(graph)
        if self.layers:
            if sum(self.split) != deep:
                problem = f"{self.layers} is {sum(self.split)} layers, and {graph.name} has {deep}."
                last = deep - sum(self.split[:-1])
                remedy = f"Give the last stage {last}." if last > 0 else "Give the stages fewer."
                raise _wrong("layers", problem, remedy)
            for few in self.split:
                self._divide("chunks", self.chunks, few, f"{few} layers of a stage")
        elif self.pipeline > 1:
            units = deep + 2 * (self.balance == "layers")
            what = f"{deep} layers" + (", embedding and output" if units > deep else "")
            self._divide("pipeline", self.pipeline, units, what)
            self._divide("chunks", self.chunks, units // self.pipeline, f"{units // self.pipeline} layers of a stage")
        if self.chunks > 1 and self.accumulate % self.pipeline:
            legal = range(self.pipeline, self.accumulate + 2 * self.pipeline, self.pipeline)
            problem = f"interleaved, {self.accumulate} microbatches do not divide over {self.pipeline} stages."
            raise _wrong("accumulate", problem, nearest("accumulate", self.accumulate, legal))
        for op in graph.find("attention", "latent_attention"):
            exchanged = self.context if self.context_by == "ulysses" else 1
            self._divide("tensor", self.tensor * exchanged, op["heads"], f"{op['heads']} heads of {op.name}", exchanged)
            if op.kind == "attention" and _number(op["kv_heads"]) > self.tensor:
                self._divide("tensor", self.tensor, op["kv_heads"], f"{op['kv_heads']} key-value heads of {op.name}")
        for op in graph.find("linear"):
            if op.split in ("column", "row"):
                side = "outputs" if op.split == "column" else "inputs"
                self._divide("tensor", self.tensor, op[side], f"{op[side]} {side} of {op.name}")
        experts: list[Op] = [op for op in graph.find("expert") if op.split == "experts"]
        for op in experts:
            self._divide("expert", self.expert, op["experts"], f"{op['experts']} experts of {op.name}")
        if self.expert > 1 and not experts:
            raise _wrong("expert", f"{graph.name} has no experts.", "Give expert=1.")
        if (self.tensor > 1 or self.expert > 1) and not any(op.split for op in graph):
            raise _wrong("tensor", f"it is not known how to cut {graph.name}.", "Give tensor=1, expert=1, and more data.")
        if sequence and self.context > 1:  # causal work is even where each device has a part from either end
            self._divide("context", 2 * self.context, sequence, f"{sequence} tokens in two parts a device", 2)
        if sequence and self.sequence:
            self._divide("tensor", self.tensor * self.context, sequence, f"{sequence} tokens", self.context)
        if devices and self.devices != devices:
            inner = self.tensor * self.context * self.pipeline
            advice = f"Give data={devices // inner}." if not devices % inner else nearest(
                "devices", devices, range(inner, devices + 2 * inner, inner), inner)  # fmt: skip
            spread = f"{self.tensor} x {self.context} x {self.data} x {self.pipeline} (tensor, context, data, pipeline)"
            raise _wrong("devices", f"{spread} is {self.devices} devices, not {devices}.", advice)
        if batch and self.batch != batch and self.shares:
            raise _wrong("shares", f"{self.shares} of {self.microbatch} is {self.batch} sequences, not {batch}.",
                         f"Share out {batch // self.microbatch} microbatches.")  # fmt: skip
        if batch and self.batch != batch:
            each = self.data * self.microbatch
            advice = f"Give accumulate={batch // each}." if not batch % each else nearest(
                "global batch", batch, range(each, batch + 2 * each, each))  # fmt: skip
            spread = f"{self.data} x {self.microbatch} x {self.accumulate} (data, microbatch, accumulate)"
            raise _wrong("batch", f"{spread} is {self.batch} sequences, not {batch}.", advice)

    def _divide(self, name: str, parts: int, whole: Any, what: str, unit: int = 1) -> None:
        """Raises unless `whole` divides over `parts`; the nearest legal numbers are given in parts of `unit`."""
        size = _number(whole)
        if size and size % parts:
            legal = [d // unit for d in divisors(int(size)) if d % unit == 0]
            raise _wrong(name, f"{what} do not divide over {parts}.", nearest(name, parts // unit, legal))


def _number(dim: Any) -> float:
    """A dim that does not depend on the step; 0 for one that does, and so cannot be checked."""
    return 0.0 if isinstance(dim, Size) else float(dim)


def _wrong(field: str, problem: str, remedy: str) -> NarrowsError:
    return NarrowsError(problem, where=f"layout: {field}", remedy=remedy)


def _value(name: str, kind: type, text: str) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise _wrong(name, f"{text!r} is neither true nor false.", f"Write {name}=true.")
        return text.lower() == "true"
    if kind is int and not text.isdecimal():
        raise _wrong(name, f"{text!r} is no whole number.", f"Write it like {name}=2.")
    return kind(text)


def divisors(number: int) -> list[int]:
    """All divisors, in order."""
    low = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]


def nearest(name: str, wanted: int, legal: Iterable[int], least: int = 1) -> str:
    """'The nearest are tensor=4 and tensor=8.': the legal numbers next below and above the one that was asked for."""
    known = [n for n in legal if n >= least]
    near = [*[n for n in known if n < wanted][-1:], *[n for n in known if n > wanted][:1]]
    chosen = " and ".join(f"{name}={n}" for n in near)
    return f"The nearest {'are' if len(near) > 1 else 'is'} {chosen}." if near else f"Give {name}=1."


def dump(layout: Layout, **more: Any) -> str:
    """A layout as the text of a plan file, with whatever else belongs to the plan."""
    return json.dumps({"format": FORMAT, "layout": str(layout), **more}, indent=1)


def load(text: str, where: str = "plan") -> tuple[Layout, dict[str, Any]]:
    """The layout of a plan file, and what else it holds; another format raises NarrowsError that names both."""
    try:
        data = json.loads(text)
        found = data["format"], data["layout"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise NarrowsError(
            "it is not a training plan.", where=where, remedy="Write one with `narrows plan train --out`."
        ) from error
    if found[0] != FORMAT:
        raise NarrowsError(f"format is {found[0]!r}, not {FORMAT!r}.", where=where, remedy="Plan again with this version.")
    return Layout.parse(str(found[1])), {key: value for key, value in data.items() if key not in ("format", "layout")}
