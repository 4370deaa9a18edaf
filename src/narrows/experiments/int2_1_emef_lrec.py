"""What INT2.1 claims: small branches, outputs that recover, and tuning in little more memory than the packed weights."""

import math
from copy import deepcopy
from typing import Any

from narrows import samples
from narrows.capture import capture
from narrows.experiments.steady import one_thread
from narrows.techniques.quantization.int2_1_emef_lrec import INT2


def size_overhead(technique: INT2) -> float:
    """Weight bytes of Llama-2-7B in 2 bits with branches over those without."""
    plain = capture("llama-2-7b")
    return technique.rewrite(plain).weight_bytes / technique.baseline().rewrite(plain).weight_bytes


@one_thread()
def error_recovered(technique: INT2) -> float:
    """Share of the squared error of MiniLM's outputs on held-out text, all layers in 2 bits, that training takes away."""
    import torch

    model, tokenizer = samples.minilm()
    texts = samples.token_batches(tokenizer, 40, 64)
    seen = [{"input_ids": torch.cat([b["input_ids"] for b in texts[i:32:8]])} for i in range(8)]
    held_out = {"input_ids": torch.cat([b["input_ids"] for b in texts[32:]])}

    def outputs(network: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = network(**held_out).last_hidden_state
        return found

    wanted = outputs(model)
    rounded, corrected = (outputs(t.apply(deepcopy(model), seen)) for t in (technique.baseline(), technique))
    return 1 - float((corrected - wanted).square().sum() / (rounded - wanted).square().sum())


@one_thread()
def tuning_memory_saved(technique: INT2) -> float:
    """Bytes that tuning a branch beside bf16 weights holds over those beside packed ones; NaN where nothing is tuned."""
    import torch
    from torch import nn

    from narrows.modules.planes import PlanesLinear

    linear = nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16)
    linear.weight.requires_grad_(False)
    if not technique.rank:
        return math.nan
    packed = PlanesLinear.nearest(linear, technique.form, 1)
    plain, ours = (_held(technique.beside(base, linear), linear.in_features) for base in (linear, packed))
    return plain / ours


def _held(layer: Any, inputs: int) -> int:
    """Bytes of a layer, of what its forward pass keeps for the backward one, and of gradients and Adam's states."""
    import torch

    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for tensor in (*layer.parameters(), *layer.buffers()):
        keep(tensor)
    x = torch.randn(64, inputs, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    y.sum().backward()
    if any(p.grad is None for p in trained) or x.grad is None:
        raise AssertionError("a gradient is missing")
    return sum(kept.values()) + 3 * sum(int(p.nbytes) for p in trained)
