"""What LLM-FP4 claims: shifts in the weights are free, 4-bit floats beat 4-bit integers, shifting beats one scale."""

import math
from copy import deepcopy
from dataclasses import replace

from narrows.experiments.perplexity import language_model, nats_of
from narrows.experiments.steady import one_thread
from narrows.techniques.quantization.llm_fp4 import LLMFP4


@one_thread()
def shifts_are_free(technique: LLMFP4) -> float:
    """Largest relative difference of a layer's outputs from those of inputs that are scaled back channel by channel.

    NaN where a layer has no shifted channel.
    """
    import torch

    from narrows.modules.coded_linear import CodedLinear

    model, seen, _ = language_model()
    blocks = deepcopy(model)
    blocks.model.layers = blocks.model.layers[:2]
    worst = 0.0
    for layer in technique.apply(blocks, seen).modules():
        if not isinstance(layer, CodedLinear) or layer.input_scale is None:
            continue
        a = layer.input_scale.view(torch.bfloat16).float()
        if len(a.unique()) < 2:
            return math.nan
        x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(0)) * a
        weight = layer.weight() / a  # as it was before the shift
        y = (layer.rounded_inputs(x)[0] * a).double() @ weight.double().T
        worst = max(worst, float((layer(x) - y).norm() / y.norm()))
    return worst


def loss_over_int4(technique: LLMFP4) -> float:
    """Nats added, over those added by 4-bit integers whose clipping was searched the same way."""
    return nats_of(technique) / nats_of(technique.baseline())


def loss_over_unshifted(technique: LLMFP4) -> float:
    """Nats added, over those added in the same format with one scale for all input channels."""
    return nats_of(technique) / nats_of(replace(technique, shift=False))
