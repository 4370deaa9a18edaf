"""Split the time of generating a token into idle, attention, linear and other, and say what each of four levers gives in turn.

Models that generate text, speech or images token by token leave a GPU idle between small kernels that the host launches one
by one; what is left is attention and linear layers that read the cache and the weights. Four levers, pulled in order: fused
attention over a cache in place; a compiler with a recorded graph, so that the host launches once; int8 weights; and layer
skipping, where the first layers draft tokens that the whole network then checks in one step.

## What it does
`measure` predicts both from a graph, with attention unfused, a cache that is copied when it grows, and every kernel launched
by the host as the starting point; `profile` reads the shares from a run.

## When it helps
Decoding of small batches, in eager mode, where launches take longer than kernels.

## When it does not
Large batches and prompts keep the device busy: nothing is idle and compilation gives little. Layer skipping needs a network
trained to exit early; `acceptance` is then yours to measure. Hosts that do more Python between kernels than the machine's
launch time says idle longer than predicted.

## Reference
Lee et al., Characterizing and Efficiently Accelerating Multimodal Generation Model Inference, 2024, arXiv 2410.00215; layer
skipping as in Elhoushi et al., LayerSkip, ACL 2024.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, ClassVar

from narrows.cost import Limit
from narrows.diagnose import Diagnosis, diagnose
from narrows.errors import NarrowsError
from narrows.graph import BF16, FP32, DType, Graph, Op
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

LEVERS = ("attention", "compile", "int8", "skip")
SHARES = ("idle", "attention", "linear", "other")
_INT8 = DType("int8", 8, 0, scale_bits=16)
_UNFUSED = (".cache", ".scores", ".mask", ".softmax", ".values")
_LINEAR = ("aten::linear", "aten::addmm", "aten::mm")
_ATTENTION = ("aten::scaled_dot_product_attention", "aten::matmul", "aten::bmm", "aten::softmax")
_CPU = "a decoder of 4 layers, 512 wide, random weights, bf16, batch 1, 256 tokens of context, one core: "


@dataclass(frozen=True)
class GenerationLevers(Measures):
    """Shares of a step's time, and the gain of each lever over the step before it."""

    card: ClassVar[Card] = Card(
        "multimodal-generation-inference-characte",
        relieves=(Limit.LAUNCH, Limit.BANDWIDTH),
        phases=("decode",),
        exact=False,
        claims=(
            Claim("cumulative_gain", "x", 3.88, "all four levers, decoders as large as Chameleon-7B and -34B, batch 1, after "
                  "1,024 tokens, A100-80GB, geometric mean", "abstract", "simulated",
                  "the paper's is a mean over other tasks as well, with Python between the kernels", at_least=3.0),
            Claim("idle_share", "fraction", None, "SmolLM2-135M decoding in eager mode, batch 1, after 1,024 tokens, A100-80GB",
                  "abstract", "simulated", "idle time dominates: more than half", at_least=0.5),
            Claim("measured_gain", "x", None, _CPU + "first three levers, seconds a token before over after", "abstract", "run",
                  "no fourth lever, and a CPU waits for its host less than a GPU does", at_least=2.0),
            Claim("idle_error", "of the time", None, "products with sleeps between them, one core: the profiled idle share less "
                  "the slept one", "the profiler", "run", "clocks around the sleeps; what Python does besides is idle too",
                  at_most=0.1),
        ),
        price="rounding to int8; early exits must be trained",
    )  # fmt: skip
    levers: int = choice(4, 3, 2, 1, 0, help="how many of attention, compile, int8, skip are pulled, in this order")
    count_idle: bool = choice(True, help="count time in which no kernel runs; False counts kernels alone")
    exit_share: float = choice(0.25, 0.5, help="share of the layers after which a draft token is taken")
    drafted: int = choice(4, 2, 6, help="tokens drafted before each check")
    acceptance: float = choice(0.7, 0.5, 0.9, help="share of drafted tokens that the whole network agrees with: an assumption")

    def __post_init__(self) -> None:
        if self.levers not in range(len(LEVERS) + 1) or not (0 < self.exit_share < 1 and 0 <= self.acceptance < 1):
            problem = f"levers={self.levers}, exit_share={self.exit_share}, acceptance={self.acceptance}."
            raise NarrowsError(problem, where=self.card.slug, remedy="Give 0 to 4 levers, and shares between 0 and 1.")
        if self.drafted < 1:
            raise NarrowsError(f"drafted is {self.drafted}.", where=self.card.slug, remedy="Draft one token or more.")

    def baseline(self) -> "GenerationLevers":
        return GenerationLevers(levers=0, count_idle=False)

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Shares of the starting point's seconds, whether it is bound by launches, and a row for each lever pulled.

        A row has seconds (a decoded token's, or the step's), gain over the row before, cumulative gain, and its own shares.
        Layer skipping changes decode steps of networks with repeated layers alone.
        """
        found = diagnose(unfused(graph, step), machine, step)
        rows: list[Mapping[str, Any]] = [{"lever": "none", "seconds": found.seconds, "gain": 1.0, "cumulative": 1.0,
                                          **self._shares(found)}]  # fmt: skip
        for lever in LEVERS[: self.levers]:
            seconds = rows[-1]["seconds"]
            if lever == "skip":
                seconds /= self.skip_gain(_levered(graph, LEVERS[:3]), machine, step)
            else:
                found = diagnose(_levered(graph, LEVERS[: LEVERS.index(lever) + 1]), machine, step)
                seconds = found.seconds
            rows.append({"lever": lever, "seconds": seconds, "gain": rows[-1]["seconds"] / seconds,
                         "cumulative": rows[0]["seconds"] / seconds, **self._shares(found)})  # fmt: skip
        first, last = rows[0], rows[-1]
        values = {"seconds": first["seconds"], **{f"{name}_share": first[name] for name in SHARES},
                  "launch_bound": float(first["idle"] >= max(first[name] for name in SHARES)),
                  "gain": last["cumulative"], "seconds_after": last["seconds"]}  # fmt: skip
        return Reading(values, {"seconds": "s", "seconds_after": "s", "gain": "x"}, tuple(rows))

    def skip_gain(self, graph: Graph, machine: Machine, step: Step) -> float:
        """Decode seconds over those with layer skipping: drafts by the first layers, then a check by the rest in one step.

        The check reuses what the drafts computed. With acceptance p of each of k drafted tokens a round gives
        (1 - p^(k + 1)) / (1 - p) tokens.
        """
        folded = graph.fold()
        if step.phase != "decode" or all(op.repeat == 1 for op in folded):
            return 1.0

        def part(early: bool) -> Graph:
            def cut(op: Op) -> Op | None:
                first = max(1, round(self.exit_share * op.repeat))
                kept = first if early else op.repeat - first
                return op if op.repeat == 1 else op.but(repeat=kept) if kept else None

            return folded.map(cut)

        check = Step(step.batch, 1 + self.drafted, step.past, step.source, "decode")
        draft, rest = diagnose(part(True), machine, step).seconds, diagnose(part(False), machine, check).seconds
        tokens = (1 - self.acceptance ** (self.drafted + 1)) / (1 - self.acceptance)
        return diagnose(folded, machine, step).seconds * tokens / (self.drafted * draft + rest)

    def _shares(self, found: Diagnosis) -> dict[str, float]:
        seconds = dict.fromkeys(SHARES, 0.0)
        for one in found.ops:
            idle = one.causes.get("launch", 0.0)
            seconds["idle"] += idle * self.count_idle
            seconds[_group(one.op)] += one.seconds - idle
        return _fractions(seconds)

    def profile(self, run: Callable[[], object], rounds: int = 5) -> Reading:
        """Shares of a function's time as torch's profiler sees its outermost operators: medians over some rounds.

        Idle is the time between the first operator's start and the last one's end in which none runs.
        """
        from torch.profiler import ProfilerActivity, profile

        shares: list[dict[str, float]] = []
        for _ in range(rounds):
            with profile(activities=[ProfilerActivity.CPU]) as trace:
                run()
            events = [event for event in trace.events() if event.cpu_parent is None and event.name.startswith("aten::")]
            if not events:
                raise NarrowsError("it runs no operator.", where=self.card.slug, remedy="Give a function that runs a model.")
            seconds = dict.fromkeys(SHARES, 0.0)
            for event in events:
                kind = "linear" if event.name in _LINEAR else "attention" if event.name in _ATTENTION else "other"
                seconds[kind] += event.cpu_time_total
            span = max(event.time_range.end for event in events) - min(event.time_range.start for event in events)
            seconds["idle"] = max(span - sum(seconds.values()), 0.0) * self.count_idle
            shares.append(_fractions(seconds))
        return Reading({f"{name}_share": median(one[name] for one in shares) for name in SHARES})


def _fractions(seconds: Mapping[str, float]) -> dict[str, float]:
    whole = sum(seconds.values())
    if not whole:
        raise NarrowsError("it takes no time.", where="shares", remedy="Give a graph with ops.")
    return {name: part / whole for name, part in seconds.items()}


def _group(op: Op) -> str:
    if "attention" in op.kind or (op.name.endswith(_UNFUSED) and op.kind in ("matmul", "elementwise")):
        return "attention"
    return "linear" if op.kind in ("linear", "expert") else "other"


def _levered(graph: Graph, levers: Iterable[str]) -> Graph:
    """A graph with fused attention, and further levers pulled: recorded launches, int8 weights."""
    levered = replace(graph, eager="compile" not in levers)
    if "int8" not in levers:
        return levered

    def narrow(op: Op) -> Op:
        wide = op.kind in ("linear", "expert") and op.weight is not None and op.weight.bits > 8
        return op.but(weight=_INT8, act=BF16 if op.act == FP32 else op.act) if wide else op

    return levered.map(narrow)


def unfused(graph: Graph, step: Step) -> Graph:
    """The graph at a step in eager mode, its attention as products, mask and softmax, its cache copied to grow by a token."""

    def parts(op: Op) -> Op | tuple[Op, ...]:
        dims = op.sized(step)
        if op.kind != "attention" or not dims["queries"]:
            return op
        keys, rows, scores = dims["pairs"] / dims["queries"], dims["queries"] * dims["heads"], dims["pairs"] * dims["heads"]
        held = dims["context"] * dims["kv_heads"] * (dims["head_dim"] + dims["value_dim"])
        heads = dims["context"] / keys * dims["kv_heads"]  # the matrices of keys

        def one(name: str, kind: str, kernels: int = 1, **own: float) -> Op:
            return Op(op.name + name, kind, own, act=op.act, inputs=op.inputs, repeat=op.repeat, kernels=kernels)

        whole = (
            one(".scores", "matmul", rows=rows, inputs=dims["head_dim"], outputs=keys, matrices=heads),
            one(".mask", "elementwise", 2, elements=scores, reads=scores),
            one(".softmax", "elementwise", 3, elements=scores, reads=scores, flop_per_element=5),
            one(".values", "matmul", rows=rows, inputs=keys, outputs=dims["value_dim"], matrices=heads),
        )
        return (one(".cache", "elementwise", 2, elements=held, reads=held), *whole) if dims["held"] else whole

    return replace(graph, eager=True).map(parts)
