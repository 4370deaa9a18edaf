"""What LoQT claims: a small language model in a third of the bytes, changes of any rank, and 7B parameters in 24 GB."""

import math
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from narrows.backward import training
from narrows.capture import capture
from narrows.experiments.small_tasks import characters, learn
from narrows.experiments.steady import one_thread
from narrows.footprint import footprint
from narrows.modules.merged_linear import MergedLinear
from narrows.step import Step
from narrows.techniques.training_memory_offload.loqt import LoQT

CONTEXT, STEPS, BATCH, RATE = 16, 300, 128, 4e-3
SIZE, RANK = 128, 16  # of the layer that learns another


def bytes_at_equal_loss(technique: LoQT) -> float:
    """Bytes that Adam keeps between two steps over those of the technique; 0 where the loss ends more than 3 % above."""
    loss, kept = _trained(replace(technique, rank=112, group=technique.group and 16))
    adams, plain = _trained(None)
    return plain / kept if loss <= 1.03 * adams else 0.0


@cache
@one_thread()
def _trained(technique: LoQT | None) -> tuple[float, int]:
    """Held-out nats per character of a network trained with Adam or a technique, and bytes of all that training keeps."""
    windows, symbols = characters(CONTEXT)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(symbols, 16), nn.Flatten(), nn.Linear(16 * CONTEXT, 512), nn.GELU(),
                            nn.Linear(512, 512), nn.GELU(), nn.Linear(512, symbols))  # fmt: skip
    optimizer = technique.attach(network, lr=RATE) if technique else torch.optim.Adam(network.parameters(), RATE)
    loss = learn(network, optimizer, windows, STEPS, BATCH)
    states = (t for one in optimizer.state.values() for t in one.values() if isinstance(t, Tensor))
    gradients = (p.grad for p in network.parameters() if p.grad is not None)
    return loss, sum(t.nbytes for t in (*network.parameters(), *network.buffers(), *gradients, *states))


def _layers() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(SIZE, SIZE, bias=False), nn.Linear(SIZE, SIZE, bias=False)


@one_thread()
def beyond_low_rank(technique: LoQT) -> float:
    """Distance of a trained layer from the one it learns, over that of the nearest change of its rank."""
    start, target = _layers()
    change = target.weight.detach() - start.weight.detach()
    nearest = float(torch.linalg.svdvals(change)[RANK:].square().sum().sqrt())
    network, generator = nn.Sequential(start), torch.Generator().manual_seed(0)
    optimizer = replace(technique, rank=RANK, gap=technique.gap and 10, group=technique.group and 16).attach(network, lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        x = torch.randn(256, SIZE, generator=generator)
        optimizer.zero_grad()
        (network(x) - target(x).detach()).square().mean().backward()
        optimizer.step()
        schedule.step()
    return float((network[0].weight - target.weight.detach()).norm()) / nearest  # type: ignore[operator]


@one_thread()
def rounding_left(technique: LoQT) -> float:
    """Distance of a layer from what it was before it was frozen in 4 bits, over that of its frozen matrix alone.

    Not a number where nothing is rounded.
    """
    start, target = _layers()
    before, network = start.weight.detach().clone(), nn.Sequential(start)
    optimizer = replace(technique, rank=RANK, group=technique.group and 16).attach(network)
    x = torch.randn(256, SIZE, generator=torch.Generator().manual_seed(0))
    (network(x) - target(x).detach()).square().mean().backward()
    optimizer.step()
    layer = network[0]
    assert isinstance(layer, MergedLinear)
    rounding = float((layer.weight - layer.change - before).norm())
    return float((layer.weight - before).norm()) / rounding if rounding else math.nan


def gigabytes_7b(technique: LoQT) -> float:
    """GB that a step of Llama-2-7B takes at its peak, on a sequence of 256 tokens."""
    changed = replace(technique, rank=512).rewrite(training(capture("llama-2-7b")))
    return float(footprint(changed, Step.train(1, 256)).total_bytes) / 1e9
