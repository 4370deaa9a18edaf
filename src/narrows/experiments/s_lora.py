"""S-LoRA against merged adapters in the serving simulator; and adapters of several ranks in one batch, on real numbers."""

import math
from dataclasses import replace

from narrows.capture import capture
from narrows.experiments.serving import load
from narrows.machine import machine
from narrows.simulate.demand import Demand
from narrows.simulate.fleet import Group, rules
from narrows.simulate.workload import scaled
from narrows.techniques.serving.s_lora import SLoRA

PAGE = 64  # numbers of a page: one row of an adapter's matrix


def demand() -> Demand:
    """1,000 requests that are there at once, lengths spread as evenly from 8 to 512 tokens are."""
    spread = (512 - 8) / math.sqrt(12) / 260
    group = Group(capture("llama-2-7b"), machine("a100-80gb"), replace(rules("vllm-v1"), prefix_cache=False))
    return Demand(group, tuple(scaled(load((260, spread), (260, spread), 4096), 1000.0)))


def throughput(technique: SLoRA, adapters: int) -> float:
    """Requests per second."""
    wanted = demand()
    seen = wanted.play(replace(technique, adapters=adapters, rank=8).deploy(wanted))
    return seen.requests / seen.seconds


def over_switching(technique: SLoRA) -> float:
    """Requests per second over those of one merged adapter after another, a hundred adapters."""
    return throughput(technique, 100) / throughput(technique.baseline(), 100)


def flat(technique: SLoRA) -> float:
    """Requests per second with 2,000 adapters over those with 5."""
    return throughput(technique, 2000) / throughput(technique, 5)


def outputs(technique: SLoRA) -> float:
    """The largest difference of a mixed batch's outputs from those of merged weights, over the largest output."""
    import torch

    if technique.merged:
        return math.inf
    draw, width = torch.Generator().manual_seed(0), PAGE
    weight = torch.randn(width, width, generator=draw)
    ranks = (8, 16, 32, 64)
    adapters = [(torch.randn(r, width, generator=draw), torch.randn(width, r, generator=draw) / r) for r in ranks]
    pool = torch.empty(2 * sum(ranks), width)
    pages = torch.randperm(len(pool), generator=draw)  # of one pool, wherever there was room
    owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
    down, up = pages[: len(owner)], pages[len(owner) :]
    pool[down] = torch.cat([a for a, _ in adapters])
    pool[up] = torch.cat([b.T for _, b in adapters])
    x = torch.randn(len(ranks), width, generator=draw)
    scores = (x[owner] * pool[down]).sum(1, keepdim=True)  # row i of the batch asks for adapter i
    mixed = (x @ weight.T).index_add(0, owner, scores * pool[up])
    merged = torch.stack([(weight + b @ a) @ row for (a, b), row in zip(adapters, x, strict=True)])
    return float((mixed - merged).abs().max() / merged.abs().max())
