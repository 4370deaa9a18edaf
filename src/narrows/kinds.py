"""The kinds of op there are: which dims each has, and its parameters, FLOP and traffic as formulas of them.

This table is the single place where an op's arithmetic is written down. Capture only fills dims in; cost only
multiplies by dtypes. Every formula works on numbers and on arrays of them. Dims, by the legend of the field:
rows (tokens, or output positions), inputs K, outputs N, heads H, head_dim d, experts E.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Dims = Mapping[str, Any]
Formula = Callable[[Dims], Any]


def _none(_: Dims) -> float:
    return 0.0


@dataclass(frozen=True)
class Kind:
    """What one kind of op costs, in elements; the dtypes of the op turn elements into bytes.

    parameters  owned by one repeat; `matrix` of them form the matrix that a weight format compresses
    flop        forward; a multiply-add is 2
    reads, writes   activation elements, forward
    cache_reads, cache_writes   elements of keys, values or state
    held        elements kept in the cache after the step
    touched     share of the parameters that the step reads (experts that no token chose stay unread)
    backward    FLOP and traffic of the backward pass, as multiples of the forward's
    matmul      runs on the matrix units
    """

    dims: tuple[str, ...]
    flop: Formula = _none
    reads: Formula = _none
    writes: Formula = _none
    parameters: Formula = _none
    matrix: Formula = _none
    cache_reads: Formula = _none
    cache_writes: Formula = _none
    held: Formula = _none
    touched: Formula = lambda d: 1.0
    backward: tuple[float, float] = (2.0, 2.0)
    matmul: bool = False
    link: Formula = _none
    defaults: Mapping[str, float] = field(default_factory=dict)


def expected_experts(rows: Any, experts: Any, top_k: Any) -> Any:
    """How many of E experts at least one of the rows chooses, if each chooses top_k of them evenly: E (1 - (1 - k/E)^rows)."""
    return experts * (1.0 - (1.0 - np.minimum(top_k / experts, 1.0)) ** rows)


def _latent_flop(d: Dims) -> Any:
    """Multi-head latent attention, as served: whichever of the two equal forms needs less work.

    expanded: keys and values of all heads are made from the latent, then plain attention (prefill);
    absorbed: queries move into the latent space, which all heads share as one wide key (decode).
    """
    rank, nope, rope, value = d["rank"], d["nope_dim"], d["rope_dim"], d["value_dim"]
    expand = d["context"] * rank * (nope + value)
    expanded = expand + d["pairs"] * (nope + rope + value)
    absorbed = d["queries"] * rank * (nope + value) + d["pairs"] * (rank + rope + rank)
    return 2 * d["heads"] * np.minimum(expanded, absorbed)


def _conv_weights(d: Dims) -> Any:
    return d["in_channels"] // d["groups"] * d["out_channels"] * d["kernel"]


# elements each of `ranks` devices sends in a ring
_RING: Mapping[str, Formula] = {
    "all_reduce": lambda d: 2 * d["elements"] * (d["ranks"] - 1) / d["ranks"],
    "all_gather": lambda d: d["elements"] * (d["ranks"] - 1) / d["ranks"],
    "reduce_scatter": lambda d: d["elements"] * (d["ranks"] - 1) / d["ranks"],
    "all_to_all": lambda d: d["elements"] * (d["ranks"] - 1) / d["ranks"],
    "send": lambda d: d["elements"],
}
COLLECTIVES = tuple(_RING)

KINDS: dict[str, Kind] = {
    # `matrices` independent products share the rows evenly (batched matmul): rows counts all of them together
    "linear": Kind(
        dims=("rows", "inputs", "outputs", "bias", "matrices"),
        flop=lambda d: 2 * d["rows"] * d["inputs"] * d["outputs"],
        reads=lambda d: d["rows"] * d["inputs"],
        writes=lambda d: d["rows"] * d["outputs"],
        parameters=lambda d: d["matrices"] * (d["inputs"] + (d["bias"] > 0)) * d["outputs"],
        matrix=lambda d: d["matrices"] * d["inputs"] * d["outputs"],
        matmul=True,
        defaults={"bias": 0, "matrices": 1},
    ),
    # a linear layer that keeps `nonzeros` of its inputs x outputs weights and multiplies with those alone, on vector units
    "sparse": Kind(
        dims=("rows", "inputs", "outputs", "nonzeros", "bias"),
        flop=lambda d: 2 * d["rows"] * d["nonzeros"],
        reads=lambda d: d["rows"] * d["inputs"],
        writes=lambda d: d["rows"] * d["outputs"],
        parameters=lambda d: d["nonzeros"] + (d["bias"] > 0) * d["outputs"],
        matrix=lambda d: d["nonzeros"],
        defaults={"bias": 0},
    ),
    # a product of two activations; `matrices` as above, the right-hand side is inputs x outputs each
    "matmul": Kind(
        dims=("rows", "inputs", "outputs", "matrices"),
        flop=lambda d: 2 * d["rows"] * d["inputs"] * d["outputs"],
        reads=lambda d: d["rows"] * d["inputs"] + d["matrices"] * d["inputs"] * d["outputs"],
        writes=lambda d: d["rows"] * d["outputs"],
        matmul=True,
        defaults={"matrices": 1},
    ),
    # one matrix of every expert of a layer; `rows` tokens go to `top_k` of the `experts` each
    "expert": Kind(
        dims=("rows", "experts", "top_k", "inputs", "outputs", "bias"),
        flop=lambda d: 2 * d["rows"] * d["top_k"] * d["inputs"] * d["outputs"],
        reads=lambda d: d["rows"] * d["top_k"] * d["inputs"],
        writes=lambda d: d["rows"] * d["top_k"] * d["outputs"],
        parameters=lambda d: d["experts"] * (d["inputs"] + (d["bias"] > 0)) * d["outputs"],
        matrix=lambda d: d["experts"] * d["inputs"] * d["outputs"],
        touched=lambda d: expected_experts(d["rows"], d["experts"], d["top_k"]) / d["experts"],
        matmul=True,
        defaults={"bias": 0},
    ),
    # `positions` of the output and `in_positions` of the input; `kernel` is the product of its sides
    "conv": Kind(
        dims=("positions", "in_positions", "in_channels", "out_channels", "kernel", "groups", "bias"),
        flop=lambda d: 2 * d["positions"] * _conv_weights(d),
        reads=lambda d: d["in_positions"] * d["in_channels"],
        writes=lambda d: d["positions"] * d["out_channels"],
        parameters=lambda d: _conv_weights(d) + d["out_channels"] * (d["bias"] > 0),
        matrix=_conv_weights,
        matmul=True,
        defaults={"groups": 1, "bias": 0},
    ),
    # fused attention (no score matrix in memory); `pairs` query-key pairs as executed, `context` keys read
    "attention": Kind(
        dims=("heads", "kv_heads", "head_dim", "value_dim", "queries", "pairs", "context", "held"),
        flop=lambda d: 2 * d["heads"] * (d["head_dim"] + d["value_dim"]) * d["pairs"],
        reads=lambda d: d["queries"] * d["heads"] * d["head_dim"],
        writes=lambda d: d["queries"] * d["heads"] * d["value_dim"],
        cache_reads=lambda d: d["context"] * d["kv_heads"] * (d["head_dim"] + d["value_dim"]),
        cache_writes=lambda d: (d["held"] > 0) * d["queries"] * d["kv_heads"] * (d["head_dim"] + d["value_dim"]),
        held=lambda d: d["held"] * d["kv_heads"] * (d["head_dim"] + d["value_dim"]),
        backward=(2.5, 2.5),  # FlashAttention recomputes the scores: 5 products for 2
        matmul=True,
        defaults={"held": 0},
    ),
    # multi-head latent attention with its key-value expansion (DeepSeek-V2/V3)
    "latent_attention": Kind(
        dims=("heads", "rank", "nope_dim", "rope_dim", "value_dim", "queries", "pairs", "context", "held"),
        flop=_latent_flop,
        reads=lambda d: d["queries"] * d["heads"] * (d["nope_dim"] + d["rope_dim"]),
        writes=lambda d: d["queries"] * d["heads"] * d["value_dim"],
        parameters=lambda d: d["rank"] * d["heads"] * (d["nope_dim"] + d["value_dim"]),
        matrix=lambda d: d["rank"] * d["heads"] * (d["nope_dim"] + d["value_dim"]),
        cache_reads=lambda d: d["context"] * (d["rank"] + d["rope_dim"]),
        cache_writes=lambda d: (d["held"] > 0) * d["queries"] * (d["rank"] + d["rope_dim"]),
        held=lambda d: d["held"] * (d["rank"] + d["rope_dim"]),
        backward=(2.5, 2.5),
        matmul=True,
        defaults={"held": 0},
    ),
    # a recurrence over `channels` x `state` numbers a token (Mamba); `held` sequences keep their state
    "scan": Kind(
        dims=("rows", "channels", "state", "flop_per_state", "held"),
        flop=lambda d: d["rows"] * d["channels"] * (d["flop_per_state"] * d["state"] + 2),
        reads=lambda d: d["rows"] * (2 * d["channels"] + 2 * d["state"]),
        writes=lambda d: d["rows"] * d["channels"],
        cache_reads=lambda d: d["held"] * d["channels"] * d["state"],
        cache_writes=lambda d: d["held"] * d["channels"] * d["state"],
        held=lambda d: d["held"] * d["channels"] * d["state"],
        defaults={"flop_per_state": 8, "held": 0},
    ),
    "embedding": Kind(
        dims=("rows", "outputs", "vocabulary"),
        reads=lambda d: d["rows"],
        writes=lambda d: d["rows"] * d["outputs"],
        parameters=lambda d: d["vocabulary"] * d["outputs"],
        matrix=lambda d: d["vocabulary"] * d["outputs"],
        touched=lambda d: np.minimum(d["rows"] / d["vocabulary"], 1.0),
        backward=(0.0, 2.0),
    ),
    # `weights` vectors (scale, shift) as long as `width`
    "norm": Kind(
        dims=("rows", "width", "weights", "flop_per_element"),
        flop=lambda d: d["rows"] * d["width"] * d["flop_per_element"],
        reads=lambda d: d["rows"] * d["width"],
        writes=lambda d: d["rows"] * d["width"],
        parameters=lambda d: d["width"] * d["weights"],
        defaults={"weights": 1, "flop_per_element": 4},
    ),
    # anything done number by number: `elements` of the result, made from `reads` elements and `weights` parameters
    "elementwise": Kind(
        dims=("elements", "reads", "flop_per_element", "weights"),
        flop=lambda d: d["elements"] * d["flop_per_element"],
        reads=lambda d: d["reads"],
        writes=lambda d: d["elements"],
        parameters=lambda d: d["weights"],
        defaults={"flop_per_element": 1, "weights": 0},
    ),
    # what stays in memory between forward and backward pass and costs no time of its own
    "checkpoint": Kind(dims=("elements",), backward=(0.0, 0.0)),
    # `parameters` updated by an optimizer that keeps `states` numbers of 4 bytes for each
    "optimizer": Kind(
        dims=("elements", "states", "flop_per_element"),
        flop=lambda d: d["elements"] * d["flop_per_element"],
        defaults={"states": 2, "flop_per_element": 12},
    ),
    **{name: Kind(dims=("elements", "ranks"), link=sent, backward=(0.0, 1.0)) for name, sent in _RING.items()},
}
