"""What PTQTP claims: its bits, an error that only falls, and the perplexity of two trit-planes beside one, and beside signs."""

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

from narrows.experiments.blocks import first_blocks
from narrows.experiments.perplexity import added_nats, language_model
from narrows.experiments.steady import one_thread
from narrows.modules.linears import Planes
from narrows.techniques.quantization.ptqtp import PTQTP

BLOCKS = 4


def bits_per_weight(technique: PTQTP) -> float:
    """Bits that a weight of Llama-2-7B's layers takes, scales included, counted in the buffers of layers of its sizes."""
    from torch import nn

    kept = weights = 0
    for inputs, outputs, count in ((4096, 4096, 4), (4096, 11008, 2), (11008, 4096, 1)):
        layer = technique.hollow("", nn.Linear(inputs, outputs, bias=False, device="meta"))
        kept += count * sum(t.numel() * t.element_size() for t in layer.state_dict().values())
        weights += count * inputs * outputs
    return 8 * kept / weights


@one_thread()
def error_after_rounds(technique: PTQTP) -> float:
    """Squared error of a block's weights after the rounds over that before; NaN where a round raised it."""
    from torch import nn

    from narrows.modules.planes import fit

    block = language_model(rotated=True)[0].model.layers[10]
    first = last = 0.0
    for layer in (m for m in block.modules() if isinstance(m, nn.Linear)):
        form = replace(technique, group=64).form
        errors = fit(layer.weight.reshape(-1, 64), form, technique.rounds).errors
        if any(after > before * (1 + 1e-6) for before, after in pairwise(errors)):
            return math.nan
        first, last = first + errors[0], last + errors[-1]
    return last / first


@one_thread()
def perplexity_over_ternary(technique: PTQTP) -> float:
    """Increase of the log-perplexity over the least that one trit-plane or two sign planes, fitted alike, give."""
    ours = replace(technique, group=64)
    return _increase(ours) / min(_increase(replace(ours, planes=1)), _signs(ours.rounds))


@cache
def _increase(technique: PTQTP) -> float:
    return added_nats(lambda model, seen: technique.apply(first_blocks(model, BLOCKS)), rotated=True)


@cache
def _signs(rounds: int) -> float:
    """Increase by two planes of signs in groups of 64."""
    from narrows.modules.planes import PlanesLinear

    def change(model: Any, seen: object) -> Any:
        for name, linear in PTQTP(group=64).layers(first_blocks(model, BLOCKS)).items():
            model.set_submodule(name, PlanesLinear.nearest(linear, Planes(2, 2, 64), rounds))
        return model

    return added_nats(change, rotated=True)
