"""What the peak performance analysis of long contexts says of a 34B model on an A100, from the graph of such a model."""

from dataclasses import replace
from functools import cache

from narrows.capture.config import from_config
from narrows.graph import Graph
from narrows.machine import machine
from narrows.step import Step
from narrows.technique import Reading
from narrows.techniques.profiling_cost_models.long_context_peak_performance_analysis import LongContextCost

LONG, SHORT = 50_000, 4_000


@cache
def yi_34b() -> Graph:
    """Yi-34B-200K as published: a Llama of 60 layers, 7,168 wide, 8 heads of keys and values."""
    return from_config(
        {"model_type": "llama", "hidden_size": 7168, "intermediate_size": 20480, "num_hidden_layers": 60, "vocab_size": 64000,
         "num_attention_heads": 56, "num_key_value_heads": 8, "torch_dtype": "bfloat16", "tie_word_embeddings": False},
        "yi-34b",
    )  # fmt: skip


def _read(technique: LongContextCost, context: int, graph: Graph | None = None) -> Reading:
    """The reading on an A100 whose link to the host is the paper's, 20 of its GB per second."""
    there = machine("a100-80gb")
    links = tuple(replace(way, bandwidth_bytes_per_s=20 * 2**30) if way is there.host_link else way for way in there.links)
    return technique.measure(graph or yi_34b(), replace(there, links=links), Step.decode(1, context - 1))


def cache_size(technique: LongContextCost) -> float:
    """GiB of one user's keys and values."""
    return _read(technique, LONG).values["cache_bytes"] / 2**30


def _prefill(technique: LongContextCost, context: int) -> float:
    """Seconds of reading a prompt, counted as the paper does: without the product of scores and values."""
    scores = yi_34b().map(lambda op: op.but(value_dim=0) if op.kind == "attention" else op)
    return _read(technique, context, scores).values["prefill_seconds"]


def prefill_long(technique: LongContextCost) -> float:
    """Seconds of reading the long prompt."""
    return _prefill(technique, LONG)


def prefill_growth(technique: LongContextCost) -> float:
    """How much longer the long prompt takes than the short one."""
    return _prefill(technique, LONG) / _prefill(technique, SHORT)


def users_long(technique: LongContextCost) -> float:
    """Users whose long contexts fit beside the weights."""
    return _read(technique, LONG).values["users"]


def users_short(technique: LongContextCost) -> float:
    """Users whose contexts of 4K fit beside the weights."""
    return _read(technique, SHORT).values["users"]


def answer_long(technique: LongContextCost) -> float:
    """Seconds of an answer after the long context."""
    return _read(technique, LONG).values["answer_seconds"]


def switch_long(technique: LongContextCost) -> float:
    """Seconds of moving one long context to the host and another back."""
    return _read(technique, LONG).values["switch_seconds"]


def terms_cut(technique: LongContextCost) -> float:
    """Terms cut by the way of halving the cache that cuts fewest."""
    return float(min(len(row["cuts"]) for row in _read(technique, LONG).rows if row["halved"] != "nothing"))
