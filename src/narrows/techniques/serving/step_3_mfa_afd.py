"""Decode with attention on one pool of devices and feed-forward layers on another, each sized and chosen for its own part.

Attention is bound by the cache of keys and values, feed-forward layers by arithmetic once enough tokens meet there. Apart, each
part runs on the machine that is cheapest for it, and three batches go round at once: one is attended to, one is between the
pools, one is in the feed-forward layers. The model's side of the design is attention whose FLOP per byte of cache lie near
what machines offer: many wide heads over one head of keys and values, with queries through a low-rank product.

## When it helps
Models of several hundred billion parameters whose experts are not too sparse, long contexts, machines of two kinds: one with
cheap memory bandwidth for attention, one with cheap arithmetic.

## When it does not
Small models, which a few devices serve whole. Links between nodes that do not carry every layer's tokens within a third of a
layer's time. Equal machines on which a node holds the whole model, or long contexts on them: feed-forward devices keep no
cache, so both parts on every device serve as many tokens or more. Prices are bounds at the machines' peaks, as the
paper's; the throughput uses the rates that kernels reach, takes collectives inside a node as hidden and the pipeline as never
waiting. Its baseline runs attention, network and feed-forward layers of one batch in turn.

## Reference
StepFun, Step-3 is Large yet Affordable: Model-system Co-design for Cost-effective Decoding, 2025, arXiv 2507.19427.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from narrows.cost import Limit, cost, total
from narrows.costmodel import ATTENTION, peak
from narrows.diagnose import timed
from narrows.errors import NarrowsError
from narrows.footprint import footprint
from narrows.graph import Graph, Op
from narrows.kinds import COLLECTIVES
from narrows.machine import Machine
from narrows.machine import machine as named
from narrows.parallel import is_layer, layer_count, tensor_parallel
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

NODE = 8  # devices that an instance of either pool has: the paper's
POOLS = (1, 2, 3, 4, 6, 8, 12, 16)  # instances tried for each pool
FILL = 0.9  # of a device's memory
_FFN = re.compile(r"mlp|ffn|feed_forward|moe|expert|fc\d|dense_h|ff_")
_USD = "on the paper's prices (table 4), everything in 8 bits, at the peaks"


def parts(graph: Graph) -> dict[str, Graph]:
    """The ops of a decoding step by where they run: attention over the cache, products around it, feed-forward layers, the rest.

    Raises NarrowsError for a graph without attention or without feed-forward layers.
    """

    def part(op: Op) -> str:
        if op.kind in ATTENTION:
            return "attention"
        if is_layer(op) and _FFN.search(op.name):
            return "ffn"
        return "linear" if is_layer(op) and op.spec.matmul else "rest"

    found = {
        name: replace(graph, ops=tuple(op for op in graph if part(op) == name)) for name in ("attention", "linear", "ffn", "rest")
    }
    missing = [name for name in ("attention", "ffn") if not found[name].ops]
    if missing:
        raise NarrowsError(f"{graph.name} has no {missing[0]} in its layers.", where="step-3-mfa-afd", remedy="Give a decoder.")
    return found


@dataclass(frozen=True)
class Pools:
    """What a deployment reaches: instances of either kind, sequences, seconds a token, and tokens per second and device."""

    attention: int
    ffn: int
    batch: int
    tpot: float
    rate: float


@dataclass(frozen=True)
class Step3(Measures):
    """What a decoded token costs part by part, and the pools that serve most tokens per device within a limit."""

    card: ClassVar[Card] = Card(
        "step-3-mfa-afd",
        relieves=(Limit.BANDWIDTH, Limit.COMPUTE),
        phases=("decode",),
        exact=True,
        price="two pools that must be kept in balance as contexts change, and every layer's tokens cross the network twice",
        claims=(
            Claim("usd_8k", "USD per million tokens", 0.055, f"Step-3, 8K context, H800 and H20, {_USD}", "section 4.2",
                  "checked", "the paper's two digits, and 5 %", at_least=0.052, at_most=0.058),
            Claim("usd_32k", "USD per million tokens", 0.129, f"Step-3, 32K context, H800 and H20, {_USD}", "section 4.2",
                  "checked", "the paper's figure and 5 %", at_least=0.1226, at_most=0.1354),
            Claim("qwen_usd_32k", "USD per million tokens", 0.193, f"Qwen3-235B-A22B, 32K context, H800 and H20, {_USD}",
                  "section 4.2", "checked", "the paper's figure and 5 %", at_least=0.183, at_most=0.203),
            Claim("over_deepseek", "x", 1.64, f"DeepSeek-V3 over Step-3, 32K context, {_USD}", "section 4.2 (0.211 and 0.129)",
                  "checked", "a tenth either way: the paper counts one product of latent attention 1/16 wider",
                  at_least=1.48, at_most=1.80),
            Claim("tokens_per_device", "tokens/s", 4039.0, "simulated, Step-3 on 32 H800, 400 Gb/s a device, 4K context, 8 bits, "
                  "at most 50 ms a token: the best sizes of both pools", "table 8", "simulated",
                  "a fifth either way: the pipeline never waits here", at_least=3231.0, at_most=4847.0),
        ),
    )  # fmt: skip
    apart: bool = choice(True, False, help="attention and feed-forward layers in two pools; without, every device does both")
    other: str = choice("", "h20", "a100-80gb", help="a second machine that may run either part")
    tpot: float = choice(0.05, 0.02, 0.1, help="seconds a token may take")
    gigabits: float = choice(400.0, 200.0, help="per second and device between nodes")

    def __post_init__(self) -> None:
        for name in ("tpot", "gigabits"):
            if not getattr(self, name) > 0:
                raise NarrowsError(f"it is {getattr(self, name)}.", where=f"{self.card.slug}: {name}", remedy="Give more than 0.")

    def baseline(self) -> "Step3":
        return replace(self, apart=False)

    def shares(self, graph: Graph, on: Machine, step: Step) -> dict[str, float]:
        """Seconds of one device for each token, at its peaks: attention with the products around it, and feed-forward layers."""
        found, tokens = parts(graph), float(step["tokens"])

        def arithmetic(part: str) -> float:
            return sum(float(cost(op, step).flop) / peak(op, on) for op in found[part] if op.spec.matmul)

        moved = float(total(found["attention"], step).cache_bytes) / on.memory.bandwidth_bytes_per_s
        attention = max(arithmetic("attention"), moved) + arithmetic("linear")
        return {"attention": attention / tokens, "ffn": arithmetic("ffn") / tokens}

    def price(self, graph: Graph, machines: Sequence[Machine], step: Step) -> tuple[float, dict[str, str]]:
        """US dollars per million tokens, and where each part runs: apart each on its cheapest machine, else both on one."""
        if any(one.price_per_hour is None for one in machines):
            raise NarrowsError("a machine has no price.", where=self.card.slug, remedy="Give price_per_hour in its TOML file.")
        usd = [
            {p: s * float(one.price_per_hour or 0) / 3600 * 1e6 for p, s in self.shares(graph, one, step).items()}
            for one in machines
        ]
        if not self.apart:
            best = min(range(len(machines)), key=lambda i: sum(usd[i].values()))
            return sum(usd[best].values()), dict.fromkeys(("attention", "ffn"), machines[best].name)
        chosen = {p: min(range(len(machines)), key=lambda i: usd[i][p]) for p in ("attention", "ffn")}
        return sum(usd[i][p] for p, i in chosen.items()), {p: machines[i].name for p, i in chosen.items()}

    def pools(self, graph: Graph, on: Machine, context: int, instances: int = 0) -> Pools:
        """The sizes of pools, and the batch, that give the most tokens per second and device within `tpot`.

        instances   of both pools together, each of NODE devices (0: any number). Raises NarrowsError where none fits.
        """
        sizes = [(a, f) for a in POOLS for f in (POOLS if self.apart else (0,)) if instances in (0, a + f)]
        found = [self._filled(graph, on, context, a, f) for a, f in sizes]
        best = max(found, key=lambda one: one.rate, default=None)
        if best is None or not best.rate:
            problem = f"no pools of {on.name} decode {graph.name} in {self.tpot:g} s a token."
            raise NarrowsError(problem, where=self.card.slug, remedy="Allow more time or instances, or a shorter context.")
        return best

    def _filled(self, graph: Graph, on: Machine, context: int, a: int, f: int) -> Pools:
        """The largest batch that fits in time and memory on so many instances; a rate of 0 where none does."""
        found, layers = parts(graph), layer_count(graph)
        mine = replace(graph, ops=found["rest"].ops + found["linear"].ops + found["attention"].ops)
        width = [float(op["outputs"]) for op in found["ffn"] if op.spec.matmul][-1]  # type: ignore[arg-type]
        theirs, count = tensor_parallel(found["ffn"], NODE * (f or a)), NODE * a
        own = replace(theirs, ops=tuple(op for op in theirs if op.kind not in COLLECTIVES))
        each = np.arange(1.0, 513.0)  # sequences of a batch on each attention device
        attention = np.asarray(timed(mine, on, Step.decode(each[:, None], context))[0])
        ffn = np.asarray(timed(own, on, Step.decode((each * count)[:, None], context))[0])
        wire = self.gigabits / 8 * 1e9
        # a layer's tokens leave in 8 bits and come back in 16: in a pipeline at once; one wire ends at each device of either pool
        sent = layers * width / wire * np.maximum(each * (f or a), each * count / NODE) * (f + a > 1)
        batches = 3 if f else 1
        seconds = 3 * np.maximum(np.maximum(attention, ffn), 2 * sent) if f else attention + ffn + 3 * sent
        step = Step.decode((each * batches)[:, None], context)
        cached = np.asarray(footprint(mine, step).kv_bytes)
        room = on.memory.capacity_bytes * FILL - mine.weight_bytes - (0 if f else own.weight_bytes)
        fits = (seconds <= self.tpot) & (cached <= room) & (own.weight_bytes <= on.memory.capacity_bytes * FILL)
        rate = np.where(fits, each * count * batches / seconds / (NODE * (a + f)), 0.0)
        best = int(rate.argmax())
        return Pools(a, f, int(each[best] * count * batches), float(seconds[best]), float(rate[best]))

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """FLOP per byte of cache beside each machine's, device-seconds of each part per million tokens, and the best pools.

        At the step's context (4,096 where it has none); US dollars where all machines have a price. A network that keeps no
        cache of keys and values decodes nothing: zeros.
        """
        if not any(op["held"] for op in graph.find(*ATTENTION)):
            return Reading({"batch": 0.0, "tokens_per_device": 0.0}, {"tokens_per_device": "tokens/s"})
        context = int(np.max(step.past)) or 4096
        one, best, machines = Step.decode(1, context), self.pools(graph, machine, context), [machine]
        if self.other:
            machines.append(named(self.other))
        attention = parts(graph)["attention"]
        work = total(attention, one)
        rows: list[Mapping[str, Any]] = [
            {"machine": m.name, **{f"{part}_device_seconds": s * 1e6 for part, s in self.shares(graph, m, one).items()},
             "flop_per_byte": peak(attention.ops[0], m) / m.memory.bandwidth_bytes_per_s} for m in machines
        ]  # fmt: skip
        values = {"flop_per_cache_byte": float(work.flop) / float(work.cache_bytes), "attention_instances": float(best.attention),
                  "ffn_instances": float(best.ffn), "batch": float(best.batch), "tpot": best.tpot,
                  "tokens_per_device": best.rate}  # fmt: skip
        units = {"flop_per_cache_byte": "FLOP/B", "tpot": "s", "tokens_per_device": "tokens/s"}
        if all(m.price_per_hour is not None for m in machines):
            values["usd_per_million_tokens"], units["usd_per_million_tokens"] = self.price(graph, machines, one)[0], "USD"
        return Reading(values, units, tuple(rows))
