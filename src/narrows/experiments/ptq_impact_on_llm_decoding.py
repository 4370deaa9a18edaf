"""What the study of decoding after quantization claims: temperature matters more at 4 bits, bf16 stays the fastest."""

from copy import deepcopy
from functools import cache

import torch
from torch import Tensor, nn

from narrows.capture import capture
from narrows.experiments.perplexity import language_model
from narrows.experiments.steady import one_thread
from narrows.machine import machine
from narrows.modules.block_tables import tabled
from narrows.modules.linears import is_output
from narrows.step import Step
from narrows.techniques.quantization.ptq_impact_on_llm_decoding import PTQImpact

COOL, WARM = 0.5, 0.8


def _stored(weight: Tensor, name: str) -> Tensor:
    """A matrix as a format keeps it, as numbers."""
    if name == "int8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale).round() * scale
    return tabled(weight, name.removesuffix("-dq"), name.endswith("-dq"))


@cache
@torch.no_grad()  # type: ignore[untyped-decorator]
def _logits(name: str) -> Tensor:
    """Logits [T, V] for held-out text of the model with its linear weights in a format; 'bf16' leaves it as it is."""
    model, _, held_out = language_model(rotated=True)
    if name != "bf16":
        model = deepcopy(model)
        for path, layer in model.named_modules():
            if type(layer) is nn.Linear and not is_output(path):
                layer.weight.data = _stored(layer.weight, name)
    with one_thread():
        return torch.cat([model(**batch).logits[0] for batch in held_out])


@cache
def _sensitivity(name: str) -> float:
    """Nats by which the unquantized model expects tokens less that are drawn at the higher temperature, in place of the lower."""
    surprise = -_logits("bf16").log_softmax(-1)
    cool, warm = ((_logits(name) / t).softmax(-1) for t in (COOL, WARM))
    return float(((warm - cool) * surprise).sum(-1).mean())


def _over_plain(name: str) -> float:
    return _sensitivity(name) / _sensitivity("bf16")


def temperature_sensitivity(technique: PTQImpact) -> float:
    """The least of the formats' sensitivities at 4 bits over that of the unquantized model."""
    return min(_over_plain(name) for name in _narrow(technique))


def nf4_resilience(technique: PTQImpact) -> float:
    """What the last 4-bit format adds to the sensitivity over what the first adds; 1 where they are the same."""
    first, *_, last = (*_narrow(technique), _narrow(technique)[-1])
    return 1.0 if first == last else (_over_plain(last) - 1) / (_over_plain(first) - 1)


def _narrow(technique: PTQImpact) -> list[str]:
    """The 4-bit formats with plain scales; those there are, where none is of 4 bits."""
    return [name for name in technique.names if name in ("nf4", "fp4")] or list(technique.names)


def best_speed_over_bf16(technique: PTQImpact) -> float:
    """Tokens a second of the fastest format over those in bf16."""
    values = technique.measure(capture("llama-2-7b"), machine("a100-80gb"), Step.decode(1, 512)).values
    return max(values[f"{name} tokens_per_s"] for name in technique.names) / values["bf16 tokens_per_s"]


def memory(technique: PTQImpact) -> float:
    """Bytes in bf16 over those of the smallest format."""
    values = technique.measure(capture("llama-2-7b"), machine("a100-80gb"), Step.decode(1, 512)).values
    return values["bf16 weight_bytes"] / min(values[f"{name} weight_bytes"] for name in technique.names)
