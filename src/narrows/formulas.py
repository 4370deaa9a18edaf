"""The formulas of `kinds` as texts, for people: what an op costs by name, and the same with the values put in."""

import re
from typing import Any

from narrows.graph import Op, at
from narrows.step import Step

# what `kinds` computes, as text: of one repeat of a forward op, in elements (`touched` is a share)
FORMULAS: dict[str, dict[str, str]] = {
    "linear": {"flop": "2 * rows * inputs * outputs", "reads": "rows * inputs", "writes": "rows * outputs"},
    "sparse": {"flop": "2 * rows * nonzeros", "reads": "rows * inputs", "writes": "rows * outputs"},
    "matmul": {
        "flop": "2 * rows * inputs * outputs",
        "reads": "(rows * inputs + matrices * inputs * outputs)",
        "writes": "rows * outputs",
    },
    "expert": {
        "flop": "2 * rows * top_k * inputs * outputs",
        "reads": "rows * top_k * inputs",
        "writes": "rows * top_k * outputs",
        "touched": "(1 - (1 - min(top_k / experts, 1)) ** rows)",
    },
    "conv": {
        "flop": "2 * positions * (in_channels // groups) * out_channels * kernel",
        "reads": "in_positions * in_channels",
        "writes": "positions * out_channels",
    },
    "attention": {
        "flop": "2 * heads * (head_dim + value_dim) * pairs",
        "reads": "queries * heads * head_dim",
        "writes": "queries * heads * value_dim",
        "cache_reads": "context * kv_heads * (head_dim + value_dim)",
        "cache_writes": "queries * kv_heads * (head_dim + value_dim)",
    },
    "latent_attention": {
        "flop": "2 * heads * min(context * rank * (nope_dim + value_dim) + pairs * (nope_dim + rope_dim + value_dim), "
        "queries * rank * (nope_dim + value_dim) + pairs * (2 * rank + rope_dim))",
        "reads": "queries * heads * (nope_dim + rope_dim)",
        "writes": "queries * heads * value_dim",
        "cache_reads": "context * (rank + rope_dim)",
        "cache_writes": "queries * (rank + rope_dim)",
    },
    "scan": {
        "flop": "rows * channels * (flop_per_state * state + 2)",
        "reads": "rows * (2 * channels + 2 * state)",
        "writes": "rows * channels",
        "cache_reads": "held * channels * state",
        "cache_writes": "held * channels * state",
    },
    "embedding": {"reads": "rows", "writes": "rows * outputs", "touched": "min(rows / vocabulary, 1)"},
    "norm": {"flop": "rows * width * flop_per_element", "reads": "rows * width", "writes": "rows * width"},
    "elementwise": {"flop": "elements * flop_per_element", "reads": "reads", "writes": "elements"},
    "optimizer": {"flop": "elements * flop_per_element"},
    "checkpoint": {},
    "all_reduce": {"link": "2 * elements * (ranks - 1) / ranks"},
    **{name: {"link": "elements * (ranks - 1) / ranks"} for name in ("all_gather", "reduce_scatter", "all_to_all")},
    "send": {"link": "elements"},
}


def formulas(op: Op, step: Step, eager: bool = False) -> dict[str, str]:
    """For each field of `cost` that an op has at a step, the text of its formula: over all repeats, in FLOP and bytes.

    `act_bytes` and `key_bytes` are those of a number of the activations and of the cache, `stored_bytes` those of
    the parameters that one repeat holds.
    """
    own, factors, traffic = FORMULAS[op.kind], op.spec.backward, ""
    flop, reads, writes = own.get("flop", ""), own.get("reads", ""), own.get("writes", "")
    cached, touched = own.get("cache_reads", ""), f" * {own['touched']}" if "touched" in own else ""
    weights = f"stored_bytes{touched}" if op.stored_bytes else ""
    keeps = step.serves and "cache_writes" in own and at(op["held"], step) > 0
    written = f"{own['cache_writes']} * key_bytes" if keeps else ""
    if op.phase == "backward":
        flop, traffic = flop and f"{factors[0]:g} * {flop}", f"{factors[1]:g} * "
        written = weights  # the weights' gradient
    if eager and op.kind in ("norm", "elementwise"):
        reads, writes = f"({reads} + (kernels - 1) * {writes})", f"kernels * {writes}"
    states = ""
    if op.kind == "optimizer":
        states = written = "elements * (act_bytes + 4 * states)"
    sums = [part for part in (f"{traffic}{writes} * act_bytes" if writes else "", written) if part]
    texts = {
        "flop": flop,
        "weight_bytes": weights,
        "cache_bytes": cached and f"{cached} * key_bytes",
        "input_bytes": reads and f"{traffic}{reads} * act_bytes",
        "state_bytes": states,
        "write_bytes": f"({' + '.join(sums)})" if len(sums) > 1 else "".join(sums),
        "link_bytes": own["link"] + " * act_bytes" if "link" in own else "",
    }
    return {part: f"{text} * repeat".replace(" ** ", " ^ ").replace(" * ", " x ") for part, text in texts.items() if text}


def with_values(text: str, op: Op, step: Step) -> str:
    """A text of `formulas` with the sizes of an op at a step put in."""
    values: dict[str, Any] = {
        **op.sized(step),
        "repeat": op.repeat,
        "kernels": op.kernels,
        "act_bytes": op.act.bits / 8,
        "key_bytes": (op.cache or op.act).bits / 8,
        "stored_bytes": op.stored_bytes,
    }

    def put(match: re.Match[str]) -> str:
        return _number(float(values[match[0]])) if match[0] in values else match[0]

    return re.sub(r"[a-z]\w+", put, text)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.6g}"
