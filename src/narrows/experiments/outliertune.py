"""What OutlierTune claims: folding is exact, W8A8 close to fp32, better than per-token scales, faster than 16 bits."""

import math
import time
from copy import deepcopy
from dataclasses import replace
from functools import cache
from statistics import median
from typing import TYPE_CHECKING, Any

from narrows.experiments.perplexity import added_nats, language_model, nats_of, perplexity_ratio
from narrows.experiments.steady import one_thread
from narrows.modules.number_formats import Coding, NumberFormat
from narrows.techniques.quantization.outliertune import OutlierTune

if TYPE_CHECKING:
    import torch

PERPLEXITY_GATE = 1.04


@one_thread()
def folded_equals_explicit(technique: OutlierTune) -> float:
    """Largest relative difference of a layer's outputs from those of rounded inputs scaled back channel by channel.

    The explicit way rebuilds inputs in their own units and multiplies them by weights in theirs. NaN for layers
    whose channels share a scale.
    """
    import torch

    model, seen, _ = language_model()
    blocks = deepcopy(model)
    blocks.model.layers = blocks.model.layers[:2]
    plain = deepcopy(blocks)
    coded = technique.apply(blocks, seen)
    worst = 0.0
    for name, layer in coded.named_modules():
        coding = getattr(layer, "coding", None)
        if coding is None or coding.per == "token":
            continue
        if coding.per != "channel":
            return math.nan
        x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(0))
        a, zero = (bits.view(torch.bfloat16).float() for bits in (layer.input_scale, layer.input_zero))
        whole = layer.rounded_inputs(x)[0] * a + zero  # what the integers stand for
        y = whole.double() @ (layer.weight() / a).double().T
        bias = plain.get_submodule(name).bias
        y = y if bias is None else y + bias
        worst = max(worst, float((layer(x) - y).norm() / y.norm()))
    return worst


def perplexity(technique: OutlierTune) -> float:
    """Perplexity at 8 bits over that in fp32."""
    return perplexity_ratio(technique)


def loss_over_token(technique: OutlierTune) -> float:
    """Nats added at 6 bits, over those added when each token of each layer's input gets a scale as it comes."""
    return nats_of(replace(technique, bits=6)) / _per_token_nats()


@cache
def _per_token_nats() -> float:
    from narrows.modules.coded_linear import CodedLinear

    form = NumberFormat.parse("int6")

    def change(model: Any, seen: Any) -> "torch.nn.Module":
        for name, linear in OutlierTune().layers(model).items():
            coding = Coding(form, inputs=form, per="token")
            model.set_submodule(name, CodedLinear.of(linear.weight, linear.bias, coding))
        return model  # type: ignore[no-any-return]

    return added_nats(change)


@one_thread()
def speed(technique: OutlierTune) -> float:
    """Time of a layer of 4096 x 4096 on 8 rows in bf16 over that in the narrowest format whose perplexity passes the gate.

    CPU seconds of one thread, the median of 15 alternating pairs; fp32 is what is left where no integers pass.
    """
    import torch

    from narrows.modules.coded_linear import CodedLinear

    plain = torch.nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16)
    x = torch.randn(8, 4096, dtype=torch.bfloat16)
    if perplexity_ratio(technique) <= PERPLEXITY_GATE:
        ours: Any = CodedLinear.of(plain.weight, None, technique.coding_of("q_proj"))
    else:
        ours = deepcopy(plain).float()
    own = x.to(next((p.dtype for p in ours.parameters()), x.dtype)) if isinstance(ours, torch.nn.Linear) else x
    ratios = []
    with torch.no_grad():
        for _ in range(16):
            start = time.thread_time()
            plain(x)
            middle = time.thread_time()
            ours(own)
            ratios.append((middle - start) / (time.thread_time() - middle))
    return median(ratios[1:])
