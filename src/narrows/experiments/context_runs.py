"""Runs of a small Llama whose sequences several ranks share: what the rows on context parallelism have in common."""

from typing import Any

from narrows.backward import training
from narrows.capture import capture
from narrows.costmodel import op_time
from narrows.layout import Layout
from narrows.machine import cluster
from narrows.modules.split_sequence import exchanged, passed, share
from narrows.run.check import Checked, check
from narrows.run.job import Run
from narrows.simulate.network import wire
from narrows.step import Step

RANKS = (2, 4)
_MODEL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
    "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
LAYERS, STATE = int(_MODEL["num_hidden_layers"]), 4 * 16 * 16  # numbers in the state of a layer's linear attention


def run(by: str, exchange: str, ranks: int, linear: str = "", sequence: int = 32) -> Checked:
    """The run of a way to share sequences; `exchange` none is what is left of it without the exchange."""
    chosen = "alone" if exchange == "none" else exchange
    layout = Layout(context=ranks, context_by=by)
    return check(Run(layout, exchange=chosen, linear=linear, sequence=sequence, config=_MODEL))


def errors(by: str, exchange: str, linear: str = "") -> float:
    """The largest difference from one process, over the numbers of ranks."""
    return max(run(by, exchange, ranks, linear).error for ranks in RANKS)


def volumes(by: str, exchange: str, kind: str) -> list[float]:
    """Bytes of a kind of collective that all ranks sent over those of the graph, for each number of ranks."""
    found = [run(by, exchange, ranks) for ranks in RANKS]
    return [one.sent.get(kind, 0.0) / one.predicted[kind] for one in found]


def farthest(ratios: list[float]) -> float:
    """Of several ratios the one farthest from one."""
    return max(ratios, key=lambda ratio: abs(ratio - 1))


def linear_step(group: str, tokens: int, devices: int, by: str) -> float:
    """Seconds of a training step of Llama-3.2-1B's shape with linear attention, whose own products are left out.

    States pass by gather, scan or chain and add to the step; a ring's messages hide behind the computing as far as they go.
    """
    graph, on = capture("llama-3.2-1b"), wire(cluster(group), 1, devices)
    own = share(Step.train(1, tokens), devices)
    ops = [op for op in training(graph) if op.kind != "attention" and op.phase != "update"]
    busy = sum(float(op_time(op, own, on).seconds) for op in ops)
    if by == "ring":
        return max(busy, exchanged(graph, on, Step.train(1, tokens), devices, by).seconds)
    return busy + passed(graph, on, Step.train(1, tokens), devices, by, blocks=16).seconds
