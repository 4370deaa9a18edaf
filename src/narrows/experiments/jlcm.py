"""What JLCM claims, on blocks of SmolLM2-135M with its residual stream rotated: its weights lie on a 4-bit grid by birth."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from narrows import samples
from narrows.capture import capture
from narrows.experiments.steady import one_thread
from narrows.techniques.low_rank_codebook_sharing.jlcm import JLCM

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = (6, 12)
GATE = 0.2  # of the outputs' energy: what 2 bits must not lose to count
SEEN = 6  # of the eight batches; the others are held out


@cache
def _model() -> Any:
    """(rotated model, batches)."""
    model, tokenizer = samples.smollm2()
    return samples.rotated(model), tuple(samples.token_batches(tokenizer, 8, 256))


@cache
def _layers() -> "dict[str, tuple[Any, Tensor, Tensor]]":
    """The linear layers of the blocks: (layer, inputs [T, K] to learn from, inputs held out)."""
    from torch import nn

    from narrows.modules.calibration import observed

    model, batches = _model()
    blocks = tuple(f"model.layers.{i}." for i in BLOCKS)
    layers = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and n.startswith(blocks)}
    seen, held_out = (observed(model, layers, part, 2048) for part in (batches[:SEEN], batches[SEEN:]))
    return {name: (layer, seen[name], held_out[name]) for name, layer in layers.items()}


@cache
def _weights(technique: JLCM) -> "Mapping[str, Tensor]":
    """What each layer's weight becomes."""
    return {name: technique.codebooks(layer.weight, x).weight() for name, (layer, x, _) in _layers().items()}


@cache
def _error(technique: JLCM, block: int = BLOCKS[-1]) -> float:
    """Share of the outputs' energy that is lost on held-out inputs: the mean over a block's layers."""
    found = []
    for name, (layer, _, x) in _layers().items():
        if name.startswith(f"model.layers.{block}."):
            off = _weights(technique)[name] - layer.weight.detach()
            found.append(float((x @ off.T).square().sum() / (x @ layer.weight.detach().T).square().sum()))
    return sum(found) / len(found)


@one_thread()
def output_error_over_kmeans(technique: JLCM) -> float:
    """Square error of a block's outputs over that with one k-means codebook for each layer."""
    return _error(technique) / _error(technique.baseline())


@one_thread()
def loss_over_kmeans(technique: JLCM) -> float:
    """Nats that two blocks in codebooks add to a held-out token's loss, over those with one k-means codebook a layer."""
    import torch

    model, batches = _model()

    def loss(weights: "Mapping[str, Tensor]") -> float:
        with torch.no_grad():
            plain = {name: layer.weight.detach().clone() for name, (layer, _, _) in _layers().items()}
            for name, weight in weights.items():
                _layers()[name][0].weight.copy_(weight)
            found = sum(float(model(**batch, labels=batch["input_ids"]).loss) for batch in batches[SEEN:])
            for name, weight in plain.items():
                _layers()[name][0].weight.copy_(weight)
        return found

    before = loss({})
    return (loss(_weights(technique)) - before) / (loss(_weights(technique.baseline())) - before)


@one_thread()
def gigabytes_of_7b(technique: JLCM) -> float:
    """Bytes of Llama-2-7B in GB at the fewest bits whose loss of the outputs' energy, on SmolLM2, passes the gate."""
    bits = next((b for b in (2, 3) if _error(replace(technique, bits=b)) <= GATE), 4)
    return replace(technique, bits=bits).rewrite(capture("llama-2-7b")).weight_bytes / 1e9
