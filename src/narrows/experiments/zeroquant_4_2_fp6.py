"""What ZeroQuant(4+2) claims of FP6: quality with one scale an output, its bytes, and the decode step they allow.

SmolLM2's weights lie on a grid of 16 values for each 32 inputs, each 32 with an offset and a scale of their own; with one
scale for a whole row and no offset neither 4 nor 6 bits hit that grid.
"""

import math
from copy import deepcopy

from narrows.capture.config import bundled_config, from_config
from narrows.cost import cost
from narrows.errors import NarrowsError
from narrows.experiments.perplexity import language_model, perplexity_ratio
from narrows.experiments.steady import one_thread
from narrows.graph import Graph
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.quantization.zeroquant_4_2_fp6 import ZeroQuantFP6

GATE = 1.02


def perplexity(technique: ZeroQuantFP6) -> float:
    """Perplexity over that in fp32."""
    return perplexity_ratio(technique)


@one_thread()
def bits_per_weight(technique: ZeroQuantFP6) -> float:
    """Bits that the segments of a block's layers take for each weight.

    NaN unless each weight, unpacked, is the nearest that a table of e3m2 made by hand has (at the row's scale).
    """
    import torch

    from narrows.modules.coded_linear import CodedLinear

    halves = [fraction / 16 for fraction in range(4)]  # below 2 ** -2: steps of a sixteenth
    halves += [2.0**power * (1 + fraction / 4) for power in range(-2, 5) for fraction in range(4)]
    values = torch.tensor(sorted({sign * half for half in halves for sign in (-1, 1)}))
    model, seen, _ = language_model()
    block = deepcopy(model.model.layers[0])
    plain = {name: m.weight.detach() for name, m in block.named_modules() if type(m) is torch.nn.Linear}
    coded = technique.apply(block, seen)
    held = count = 0
    for name, weight in plain.items():
        layer = coded.get_submodule(name)
        assert isinstance(layer, CodedLinear)
        held += sum(t.numel() * t.element_size() for key, t in layer.named_buffers() if key != "scales")
        count += weight.numel()
        scale = layer.scales.view(torch.bfloat16).float()
        nearest = ((weight / scale)[::16, :, None] - values).abs().amin(-1)
        found = (weight / scale - layer.weight() / scale)[::16].abs()
        if not torch.allclose(found, nearest, atol=1e-5):
            return math.nan
    return 8 * held / count


def decode_speedup(technique: ZeroQuantFP6) -> float:
    """Roofline of a decode step of Llama-2-7B on an A100 in fp16 over that in this format, 1 if its perplexity fails."""
    config = bundled_config("llama-2-7b")
    if config is None:
        raise NarrowsError("llama-2-7b is not bundled.", where="experiment", remedy="Install narrows again.")
    if perplexity(technique) > GATE:
        return 1.0
    plain, step = from_config(config, "llama-2-7b"), Step.decode(1, context=512)
    return _roofline(plain, step) / _roofline(technique.rewrite(plain), step)


def _roofline(graph: Graph, step: Step) -> float:
    """Seconds of a step if every op ran at the datasheet's peak or bandwidth."""
    device, seconds = machine("a100-80gb"), 0.0
    for op in graph:
        work = cost(op, step)
        moved = float(work.read_bytes + work.write_bytes) / device.memory.bandwidth_bytes_per_s
        seconds += max(float(work.flop) / device.peak("fp16"), moved)
    return seconds
