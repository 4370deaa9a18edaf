"""What SVDQuant claims: FLUX.1's memory, smaller errors than smoothing, and what a branch in kernels of its own would cost."""

from functools import cache
from statistics import median
from typing import Any

from narrows import samples
from narrows.capture import capture
from narrows.cost import cost
from narrows.experiments.steady import one_thread
from narrows.graph import Op
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.quantization.svdquant_nunchaku import SVDQuant


def memory(technique: SVDQuant) -> float:
    """Weight bytes of FLUX.1-dev's transformer in bf16 over those of its 4-bit form."""
    plain = capture("flux.1-dev")
    return plain.weight_bytes / technique.rewrite(plain).weight_bytes


@cache
def _inputs() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(MiniLM, what its layers read of one text, and of another)."""
    from narrows.modules.calibration import observed

    model, tokenizer = samples.minilm()
    seen = samples.token_batches(tokenizer, 4, 128)
    layers = SVDQuant().layers(model)
    first, second = (observed(model, layers, [dict(b) for b in batches], 256) for batches in (seen[::2], seen[1::2]))
    return model, first, second


@cache
def _errors(technique: SVDQuant) -> tuple[float, ...]:
    """Squared error of each layer's outputs, relative to the outputs, on text that was not looked at."""
    import torch

    model, seen, held_out = _inputs()
    found = []
    with torch.no_grad():
        for name, layer in list(technique.layers(model).items())[::3]:
            x = held_out[name]
            wanted = layer(x)
            found.append(float((technique.replaced(layer, seen[name])(x) - wanted).square().sum() / wanted.square().sum()))
    return tuple(found)


@one_thread()
def error_over_smoothing(technique: SVDQuant) -> float:
    """Median over a third of MiniLM's layers of their outputs' error over that by smoothing and rounding alone."""
    pairs = zip(_errors(technique), _errors(technique.baseline()), strict=True)
    return median(ours / smoothing for ours, smoothing in pairs)


def unfused_overhead(technique: SVDQuant) -> float:
    """Seconds of the branches over those of the layers that they stand beside, by the roofline of an RTX 4090.

    The sum of both is left out, as in the paper: the wide kernel adds the branch's outputs before it writes its own.
    """
    graph, step = technique.rewrite(capture("flux.1-dev")), Step.forward(1, 4096 + 512)
    base = sum(_seconds(op, step) for op in graph.find("linear") if op.compute == "int4")
    return sum(_seconds(op, step) for op in graph.find("linear") if op.name.endswith((".down", ".up"))) / base


def _seconds(op: Op, step: Step) -> float:
    device, work = machine("rtx-4090"), cost(op, step)
    moved = float(work.read_bytes + work.write_bytes) / device.memory.bandwidth_bytes_per_s
    return max(moved, float(work.flop) / device.peak(op.compute or "bf16"))
