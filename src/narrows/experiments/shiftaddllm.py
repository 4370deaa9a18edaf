"""What ShiftAddLLM claims: products by shifts and additions, perplexity beside rounding, energy of arithmetic."""

import math
from dataclasses import replace
from functools import cache
from typing import Any

from narrows.capture.config import bundled_config, from_config
from narrows.errors import NarrowsError
from narrows.experiments.blocks import first_blocks
from narrows.experiments.perplexity import added_nats, language_model
from narrows.experiments.steady import one_thread
from narrows.graph import DType
from narrows.techniques.quantization.shiftaddllm import ShiftAddLLM

BLOCKS = 4
# pJ of one operation on 16-bit numbers in 45 nm, as the authors' own energy model has them (after Horowitz, ISSCC 2014)
PICOJOULES = {"multiplication": 1.1, "addition": 0.4, "look-up": 0.37, "shift": 0.15}


@one_thread()
def shift_and_add_error(technique: ShiftAddLLM) -> float:
    """Largest difference between a layer by integer shifts, look-ups and additions and its product in 64-bit floats."""
    from narrows.modules.calibration import observed
    from narrows.modules.planes import PlanesLinear, shifted

    ours, (model, seen, _) = replace(technique, group=64), language_model(rotated=True)
    linear = model.model.layers[3].self_attn.v_proj
    x = observed(model, {"v": linear}, seen[:1], 128)["v"]
    layer = ours.planes(linear, x)
    if not ours.powers or not isinstance(layer, PlanesLinear):
        return math.nan
    whole = (x[:16] * (2**15 - 1) / x.abs().max()).round().long()
    found, exponent = shifted(whole, layer)
    product = whole.double() @ layer.weight().double().T
    return float((found.double() * 2.0**exponent - product).abs().max() / product.abs().max())


@one_thread()
def perplexity_over_rounding(technique: ShiftAddLLM) -> float:
    """Increase of the log-perplexity over that by rounding to 3 bits in groups of 32 inputs with a scale and a zero."""
    ours = replace(technique, group=64)
    return added_nats(lambda model, seen: ours.apply(first_blocks(model, BLOCKS), seen), rotated=True) / _rounding()


@cache
def _rounding() -> float:
    import torch

    from narrows.modules.packed_linear import requantized

    form = DType("int3", 3, 32, scale_bits=16, zero_bits=16)

    def change(model: Any, seen: object) -> Any:
        with torch.no_grad():
            for linear in ShiftAddLLM(group=64).layers(first_blocks(model, BLOCKS)).values():
                linear.weight.copy_(requantized(linear.weight, form))
        return model

    return added_nats(change, rotated=True)


def arithmetic_energy_saved(technique: ShiftAddLLM) -> float:
    """Share of the energy of the layers' arithmetic in one decode step of Llama-2-7B that shifts and additions save."""
    config = bundled_config("llama-2-7b")
    if config is None:
        raise NarrowsError("llama-2-7b is not bundled.", where="experiment", remedy="Install narrows again.")
    plain = ours = 0.0
    for op in technique.rewrite(from_config(config, "llama-2-7b")).find("linear"):
        if op.weight != technique.form.stored:
            continue
        inputs, outputs = int(op["inputs"]), int(op["outputs"])  # type: ignore[arg-type]
        multiplied = op.repeat * inputs * outputs * (PICOJOULES["multiplication"] + PICOJOULES["addition"])
        plain += multiplied
        ours += op.repeat * _picojoules(technique, inputs, outputs) if technique.powers else multiplied
    return 1 - ours / plain


def _picojoules(technique: ShiftAddLLM, inputs: int, outputs: int) -> float:
    """Of one layer and token: for each plane and group tables of shifted inputs, eight a table, then a look-up a byte."""
    tables = technique.bits * (outputs // technique.group) * inputs / 8
    look_ups = technique.bits * outputs * inputs / 8
    shifts = 8 * technique.powers * tables
    additions = 255 * tables + 8 * (technique.powers - 1) * tables + look_ups
    return shifts * PICOJOULES["shift"] + additions * PICOJOULES["addition"] + look_ups * PICOJOULES["look-up"]
