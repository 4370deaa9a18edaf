"""What DEFT claims: fine-tuning to half the activation density at the same loss, on plain, quantized and pruned weights."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.experiments.small_tasks import characters
from narrows.experiments.steady import one_thread
from narrows.modules.adapted_linear import activations, density
from narrows.techniques.sparsity_pruning.deft_density_efficient_fine_tuning import Deft

CONTEXT, BATCH, STEPS, SEEDS, LOSS = 16, 128, 300, 3, 1.01  # the last: of the loss without the price


class _Block(nn.Module):  # type: ignore[misc]
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.mlp(x)
        return x + added


def _learn(network: nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor, seed: int) -> None:
    """Steps on random ones of the rows, with a falling rate."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(seed)
    network.train()
    for _ in range(STEPS):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        F.cross_entropy(network(batch[:, :CONTEXT]), batch[:, CONTEXT]).backward()
        optimizer.step()
        schedule.step()
    network.eval()


@cache
def _pretrained() -> nn.Sequential:
    """A network that predicts the next character, trained on the first half of the text; change only copies of it."""
    windows, symbols = characters(CONTEXT)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(symbols, 16), nn.Flatten(), nn.Linear(16 * CONTEXT, 96),
                            *(_Block(96) for _ in range(3)), nn.LayerNorm(96), nn.Linear(96, symbols))  # fmt: skip
    _learn(network, torch.optim.Adam(network.parameters(), 3e-3), windows[: len(windows) // 2], 0)
    return network


def _rounded(weight: Tensor) -> Tensor:
    """To the nearest of 15 steps, with a scale for each output."""
    scale = weight.abs().amax(1, keepdim=True) / 7
    return (weight / scale).round() * scale


def _halved(weight: Tensor) -> Tensor:
    """Without its smaller half."""
    return torch.where(weight.abs() > weight.abs().median(), weight, 0.0)


@cache
@one_thread()
def _network(technique: Deft, change: Callable[[Tensor], Tensor] | None, seed: int) -> nn.Sequential:
    """The network after tuning on the text's second half, from weights changed before."""
    windows, _ = characters(CONTEXT)
    network = deepcopy(_pretrained())
    if change:
        with torch.no_grad():
            for layer in network.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight.copy_(change(layer.weight))
    torch.manual_seed(seed)
    _learn(network, technique.attach(network, lr=3e-3), windows[len(windows) // 2 : -20_100], seed)
    return network


def _nats(network: nn.Module) -> float:
    """Held-out loss per character."""
    rows = _held_out()
    with torch.no_grad():
        return float(F.cross_entropy(network(rows[:, :CONTEXT]), rows[:, CONTEXT]))


def _density(network: nn.Module) -> float:
    return density(network, [_held_out()[:, :CONTEXT]])


def _held_out() -> Tensor:
    return characters(CONTEXT)[0][-20_000::5]


def _reduction(technique: Deft, change: Callable[[Tensor], Tensor] | None = None) -> float:
    """Percent less density than with adapters alone, the least of the seeds; 0 where the loss is more than LOSS times theirs."""
    found = []
    for seed in range(SEEDS):
        ours, plain = (_network(one, change, seed) for one in (technique, technique.baseline()))
        found.append(100 * (1 - _density(ours) / _density(plain)) if _nats(ours) <= LOSS * _nats(plain) else 0.0)
    return min(found)


def density_reduction(technique: Deft) -> float:
    """Percent less density than with adapters alone, on the weights as they were trained."""
    return _reduction(technique)


def density_reduction_quantized(technique: Deft) -> float:
    """The same on weights rounded to 4 bits."""
    return _reduction(technique, _rounded)


def density_reduction_pruned(technique: Deft) -> float:
    """The same on weights without their smaller half."""
    return _reduction(technique, _halved)


@one_thread()
def nats_below_threshold(technique: Deft) -> float:
    """How much lower its loss is than that of adapters alone, both cut to 4 % density: the least of the seeds."""
    found = []
    for seed in range(SEEDS):
        ours, plain = (deepcopy(_network(one, None, seed)) for one in (technique, technique.baseline()))
        for network in (ours, plain):
            _cut(network, 0.04)
        found.append(_nats(plain) - _nats(ours))
    return min(found)


def _cut(network: nn.Module, share: float) -> None:
    """Set activations to zero below the threshold that leaves this share of all of them on the held-out rows."""
    seen: list[Tensor] = []
    layers = activations(network)
    hooks = [layer.register_forward_hook(lambda _, __, h: seen.append(h.flatten())) for layer in layers]
    _nats(network)
    for hook in hooks:
        hook.remove()
    every = torch.cat(seen)
    threshold = every.kthvalue(max(1, round((1 - share) * len(every)))).values
    for layer in layers:
        layer.register_forward_hook(lambda _, __, h: torch.where(h > threshold, h, 0.0))
