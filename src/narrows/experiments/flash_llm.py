"""What Flash-LLM claims: expanded tiles are the masked weights, bytes fall with sparsity, and decoding takes fewer devices."""

import math
import tempfile
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from narrows import samples
from narrows.capture import capture
from narrows.costmodel import op_seconds
from narrows.experiments.steady import one_thread
from narrows.footprint import footprint
from narrows.graph import Graph
from narrows.machine import machine
from narrows.parallel import tensor_parallel
from narrows.step import Step
from narrows.techniques.sparsity_pruning.flash_llm import FlashLLM

CONTEXT = 576  # tokens at the end of a run: 64 given, 512 made


def _layer() -> Any:
    """A layer of MiniLM: six linear ones, no two of whose weights are as large as each other."""
    return deepcopy(_minilm().encoder.layer[1])


@cache
def _minilm() -> Any:
    return samples.minilm()[0]


@one_thread()
def expansion_error(technique: FlashLLM) -> float:
    """Largest distance of a layer's outputs from the masked dense layer's, over the largest of those; masks are by sorting."""
    import torch

    from narrows.modules.csl_linear import CSLLinear

    plain, sparse = _layer(), technique.apply(_layer())
    names = [name for name, layer in sparse.named_modules() if isinstance(layer, CSLLinear)]
    worst = 0.0 if names else math.inf
    for name in names:
        layer: Any = sparse.get_submodule(name)
        dense: Any = plain.get_submodule(name)
        sizes = dense.weight.detach().abs()
        threshold = sizes.flatten().sort().values[-round((1 - technique.sparsity) * sizes.numel())]
        masked = (dense.weight.detach() * (sizes >= threshold)).bfloat16()
        if not torch.equal(layer.weight(torch.bfloat16), masked):
            return math.inf
        x = torch.randn(16, sizes.shape[1], generator=torch.Generator().manual_seed(0))
        y = torch.nn.functional.linear(x.double(), masked.double(), dense.bias.double())
        worst = max(worst, float((layer(x) - y).abs().max() / y.abs().max()))
    return worst


def bytes_saved(technique: FlashLLM) -> float:
    """Bytes of the layers in bf16 over the technique's: in memory or in a file, whichever falls less."""
    from safetensors.torch import save_file
    from torch import nn

    from narrows.modules.csl_linear import CSLLinear

    resident, stored = [], []
    with tempfile.TemporaryDirectory() as folder:
        for model in (_layer().bfloat16(), technique.apply(_layer().bfloat16())):
            linear = (m for m in model.modules() if isinstance(m, nn.Linear | CSLLinear))
            tensors = {f"{i}.{name}": t for i, m in enumerate(linear) for name, t in m.state_dict().items()}
            resident.append(sum(t.nbytes for t in tensors.values()))
            save_file(tensors, Path(folder) / "layers.safetensors")
            stored.append((Path(folder) / "layers.safetensors").stat().st_size)
    return min(dense / ours for dense, ours in (resident, stored))


def kernel_speed(technique: FlashLLM) -> float:
    """Seconds that an A100 takes for OPT-66B's dense layers over those of the technique's, at 8 to 32 rows: the mean of them."""
    dense, there = capture("opt-66b"), machine("a100-80gb")

    def seconds(graph: Graph, rows: int) -> float:
        layers = (op for op in graph.find("linear") if not op.tied)
        return sum(float(op_seconds(op, Step.decode(rows, CONTEXT), there)) for op in layers)

    sparse = technique.rewrite(dense)
    return sum(seconds(dense, rows) / seconds(sparse, rows) for rows in (8, 16, 32)) / 3


def tokens_per_gpu_second(technique: FlashLLM) -> float:
    """The most that the technique gains over dense fp16, of OPT-66B and OPT-175B with 8 to 64 sequences."""
    graphs = [capture(name) for name in ("opt-66b", "opt-175b")]
    return max(_rate(technique.rewrite(g), batch) / _rate(g, batch) for g in graphs for batch in (8, 16, 32, 64))


@cache
def _rate(graph: Graph, batch: int) -> float:
    """Tokens per second and device, on as few A100 as hold the model with that many sequences."""
    there, step, devices = machine("a100-80gb"), Step.decode(batch, CONTEXT), 1
    while not footprint(share := tensor_parallel(graph, devices), step).fits(there):
        devices *= 2
    return batch / devices / sum(float(op_seconds(op, step, there)) for op in share)
