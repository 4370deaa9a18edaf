"""What Ring Self-Attention claims: runs of a small Llama on ranks over gloo, and the memory of BERT-Base on 16 GB devices."""

from collections.abc import Callable

from narrows.capture import capture
from narrows.experiments.context_runs import errors, farthest, volumes
from narrows.free import cast
from narrows.graph import FP32
from narrows.step import Step
from narrows.techniques.training_parallelism.ring_self_attention_sequence_parallelism import RingSelfAttention, held_bytes

_ROOM = 16e9  # bytes of a P100


def error(technique: RingSelfAttention) -> float:
    """The largest difference from one process, on 2 and 4 ranks."""
    return errors("ring", technique.exchange)


def sent_bytes(technique: RingSelfAttention) -> float:
    """Bytes of messages over those of the graph, on 2 and 4 ranks."""
    return farthest(volumes("ring", technique.exchange, "send"))


def _most(fits: Callable[[int], bool]) -> int:
    """The largest whole number that fits, by bisection."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _ours_over_tensor(technique: RingSelfAttention, step: Callable[[int], Step]) -> float:
    bert = cast(capture("bert-base"), FP32)
    ways = ((64 if technique.exchange == "ring" else 1, "ring"), (12, "tensor"))
    ours, tensor = (_most(lambda n, d=devices, b=by: held_bytes(bert, step(n), d, b) <= _ROOM)  # type: ignore[misc]
                    for devices, by in ways)  # fmt: skip
    return ours / tensor


def max_batch(technique: RingSelfAttention) -> float:
    """The largest batch of 512 tokens that fits 64 devices in a ring over that on 12 by tensor parallelism."""
    return _ours_over_tensor(technique, lambda batch: Step.train(batch, 512))


def max_length(technique: RingSelfAttention) -> float:
    """The same for the length of 64 sequences."""
    return _ours_over_tensor(technique, lambda tokens: Step.train(64, tokens))
